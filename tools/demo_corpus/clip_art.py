"""Open Clip Art rows: pictures from the PNG package, captions from the RDF description inside the SVG of the same name."""

import hashlib
import html
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from demo_corpus.coarse import coarse_class
from demo_corpus.pictures import on_white, square_webp, trim

LICENSES = ("http://web.resource.org/cc/PublicDomain", "http://creativecommons.org/licenses/publicdomain/")
NUM_KEYWORDS = 8
MAX_KEYWORD_LENGTH = 24
DESCRIPTION_LENGTH = range(9, 201)
NO_KEYWORDS = ("unsorted", "computer", "svg", "icon", "icons", "clipart")  # how the archive was sorted, not what is drawn
# Titles and descriptions of whole collections, or of how the file was made.
GENERIC = re.compile(
    r"clipart by |clip ?art|collection|etiquette icons|theme|sibmission|svg road signs|inkscape|https?:|public domain", re.IGNORECASE
)


@dataclass(frozen=True)
class Description:
    """What the RDF of one SVG says; an empty string where it says nothing."""

    title: str
    description: str
    creator: str
    keywords: tuple[str, ...]
    license: str


def read_description(svg: Path) -> Description:
    """Read the RDF by pattern, not by an XML parser: many of these files are not well-formed, and entities need no expansion."""
    text = svg.read_text(encoding="utf-8", errors="replace")
    rdf = re.search(r"<(?:\w+:)?RDF.*?</(?:\w+:)?RDF>", text, re.DOTALL)
    rdf = rdf.group(0) if rdf else ""

    def first(pattern: str) -> str:
        found = re.search(pattern, rdf, re.DOTALL)
        return html.unescape(found.group(1)).strip() if found else ""

    return Description(
        title=first(r"<dc:title>(.*?)</dc:title>"),
        description=first(r"<dc:description>(.*?)</dc:description>"),
        creator=first(r"<dc:creator>.*?<dc:title>(.*?)</dc:title>"),
        keywords=tuple(html.unescape(keyword) for keyword in re.findall(r"<rdf:li>(.*?)</rdf:li>", rdf, re.DOTALL)),
        license=first(r'license\s+rdf:resource="(.*?)"'),
    )


def captions_of(path: str, description: Description) -> list[str]:
    """Title, words of the file name, description, "title, keywords": each only where it says something of its own.

    The file name stands in for a missing title and for one that names a whole collection.
    """
    name = _words_of_name(path, description.creator)
    title = _words(description.title).lower()
    if not title or GENERIC.search(title):
        title = name
    captions = [title]
    if name and name not in title:
        captions.append(name)
    sentence = " ".join(description.description.split())
    if len(sentence) in DESCRIPTION_LENGTH and sentence.lower() != title and not GENERIC.search(sentence):
        captions.append(sentence)
    keywords = [_words(keyword).lower() for keyword in description.keywords]
    keywords = [keyword for keyword in keywords if _is_keyword(keyword) and keyword != description.creator.lower()][:NUM_KEYWORDS]
    keywords = [keyword for keyword in keywords if keyword != title]
    if keywords:
        captions.append(", ".join([title, *keywords]))
    return list(dict.fromkeys(captions))


def label_of(path: str) -> str:
    """The first two directories of a path like "food/beverages/alcohol/beer1"."""
    return "/".join(PurePosixPath(path).parent.parts[:2])


def public_domain_paths(root: Path) -> list[str]:
    """Paths (without ending) of the pictures that have an SVG marked public domain and a directory with a coarse class."""
    paths = sorted(file.relative_to(root / "png").with_suffix("").as_posix() for file in (root / "png").rglob("*.png"))
    paths = [path for path in paths if coarse_class(label_of(path)) and (root / "svg" / f"{path}.svg").is_file()]
    return [path for path in paths if read_description(root / "svg" / f"{path}.svg").license in LICENSES]


def distinct_pictures(root: Path, paths: Iterable[str]) -> list[str]:
    """`paths` less those whose PNG is byte for byte that of an earlier path: the package files some pictures in several places."""
    first_path = {}
    for path in paths:
        first_path.setdefault(hashlib.sha256((root / "png" / f"{path}.png").read_bytes()).digest(), path)
    return list(first_path.values())


def clip_art_rows(root: Path, paths: Iterable[str]) -> Iterator[dict]:
    """Rows (columns of the corpus) of the pictures at `paths`, in that order."""
    for path in paths:
        captions = captions_of(path, read_description(root / "svg" / f"{path}.svg"))
        label = label_of(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # on_white has its own limit
            picture = Image.open(root / "png" / f"{path}.png")
        with picture:
            picture_bytes = square_webp(trim(on_white(picture)))
        yield {
            "image": {"bytes": picture_bytes, "path": f"openclipart/{path}.webp"},
            "caption": captions,
            "label": label,
            "source": "openclipart",
            "coarse": coarse_class(label),
            "concept": captions[0],
            "style": "clip art",
            "license": "public-domain",
        }


def _words(text: str) -> str:
    return " ".join(text.replace("_", " ").split())


def _words_of_name(path: str, creator: str) -> str:
    """Words of the file name without numbers, single letters, and the creator's name (names are cut to 24 characters)."""
    stem = re.sub(r"_\d+r?$", "", PurePosixPath(path).name.lower())
    words = [re.sub(r"\d+$", "", word) for word in re.split(r"[_\-\s]+", stem)]
    creator_words = re.split(r"[\s\-(@]+", creator.lower())

    def is_creator(word: str) -> bool:
        return word in creator_words or (len(word) > 2 and any(name.startswith(word) for name in creator_words))

    return " ".join(word for word in words if len(word) > 1 and not is_creator(word))


def _is_keyword(keyword: str) -> bool:
    if keyword in NO_KEYWORDS or not 3 <= len(keyword) <= MAX_KEYWORD_LENGTH:
        return False
    return not keyword.startswith(("0x", "hash")) and not keyword.isdigit() and "/" not in keyword
