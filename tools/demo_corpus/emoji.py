"""Emoji rows: one per vendor and concept, captioned from emojibase (names and keywords of Unicode CLDR, shortcodes)."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from demo_corpus.coarse import coarse_class
from demo_corpus.pictures import on_white, render_icon, square_webp

Pictures = Iterable[tuple[str, Callable[[], Image.Image]]]

# The shortcode sets read, in the order their names enter the captions.
SHORTCODE_SETS = ("iamcal", "github", "joypixels", "emojibase")
NUM_KEYWORDS = 6
MIN_SHORTCODE_LENGTH = 3
_STRAIGHT_QUOTES = str.maketrans("“”’", "\"\"'")


@dataclass(frozen=True)
class Concept:
    """One emoji: `label` is its subgroup, `name` its CLDR name as emojibase writes it (captions have straight quotes)."""

    name: str
    label: str
    captions: tuple[str, ...]


def read_concepts(emojibase: Path) -> dict[str, Concept]:
    """Concepts by code points ("1f469-200d-1f467": lower case, without variation selectors).

    Skin-tone variants are no entries of their own in emojibase, and entries without a subgroup (letters) are left out.
    """
    entries = _read_json(emojibase / "en" / "data.json")
    subgroups = _read_json(emojibase / "meta" / "groups.json")["subgroups"]
    shortcodes = [_read_json(emojibase / "en" / "shortcodes" / f"{name}.json") for name in SHORTCODE_SETS]
    concepts = {}
    for entry in entries:
        if "subgroup" not in entry:
            continue
        name = entry["label"].translate(_STRAIGHT_QUOTES)
        captions = [name]
        for one_set in shortcodes:
            codes = one_set.get(entry["hexcode"], [])
            for code in [codes] if isinstance(codes, str) else codes:
                words = code.replace("_", " ").replace("-", " ").strip()
                # flag_xx of these sets only repeats a two-letter country code
                if len(words) >= MIN_SHORTCODE_LENGTH and words.lower() != name.lower() and not code.startswith("flag_"):
                    captions.append(words)
        keywords = [keyword.translate(_STRAIGHT_QUOTES) for keyword in entry.get("tags", [])[:NUM_KEYWORDS]]
        captions.append(", ".join([name, *keywords]))
        concepts[code_points(entry["hexcode"])] = Concept(entry["label"], subgroups[str(entry["subgroup"])], tuple(dict.fromkeys(captions)))
    return concepts


def code_points(hexcode: str) -> str:
    """The code points of a vendor's file or icon in the one spelling used here."""
    return hexcode.lower().replace("-fe0f", "")


def iconify_pictures(package: Path) -> Pictures:
    """(code points, function that opens the picture) of every emoji in an iconify package, skin tones too."""
    icons = _read_json(package / "icons.json")
    names = {}
    for hexcode, name in sorted(_read_json(package / "chars.json").items()):
        names.setdefault(code_points(hexcode), name)
    for points, name in names.items():
        icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
        box = (icon.get("left", 0), icon.get("top", 0), icon.get("width", icons["width"]), icon.get("height", icons["height"]))
        yield points, lambda icon=icon, box=box: render_icon(icon["body"], *box)


def file_pictures(package: Path) -> Pictures:
    """(code points, function that opens the picture) of every file in `assets` of a package that names files by code points."""
    for path in sorted((package / "assets").glob("*.webp")):
        yield code_points(path.stem), lambda path=path: Image.open(path)


def emoji_rows(pictures: Pictures, concepts: dict[str, Concept], source: str, style: str, license: str) -> Iterator[dict]:
    """Rows (columns of the corpus) of one vendor, for the concepts it draws; a code point drawn twice counts once."""
    done = set()
    for points, open_picture in pictures:
        if points not in concepts or points in done:
            continue
        done.add(points)
        concept = concepts[points]
        yield {
            "image": {"bytes": square_webp(on_white(open_picture())), "path": f"{source}/{points}.webp"},
            "caption": list(concept.captions),
            "label": concept.label,
            "source": source,
            "coarse": coarse_class(concept.label),
            "concept": concept.name,
            "style": style,
            "license": license,
        }


def _read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))
