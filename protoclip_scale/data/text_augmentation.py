"""Augmented captions: one small edit of the words, drawn from the generator given (methods 3.1).

``eda`` is DeCLIP's second text view, which it made with the package textaugment: one of synonym replacement, swap and deletion, each as likely. Where
this differs from textaugment: nothing global is seeded; blank texts and texts of one word are allowed; the two words of a swap always differ in
place; stop words count in capitals too; punctuation around a word does not hide it from WordNet; a synonym is never the empty string.
"""

import functools
import re
from collections.abc import Callable

import numpy as np

from protoclip_scale.data.wordnet import WordNet, open_wordnet

TextAugmentation = Callable[[str, np.random.Generator], str]

DELETED_SHARE = 0.1
# The English stop words of NLTK, which textaugment skips.
STOP_WORDS = frozenset(
    """i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his himself she she's her hers herself
    it it's its itself they them their theirs themselves what which who whom this that that'll these those am is are was were be been being have has had
    having do does did doing a an the and but if or because as until while of at by for with about against between into through during before after above
    below to from up down in out on off over under again further then once here there when where why how all any both each few more most other some such
    no nor not only own same so than too very s t can will just don don't should should've now d ll m o re ve y ain aren aren't couldn couldn't didn didn't
    doesn doesn't hadn hadn't hasn hasn't haven haven't isn isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't
    weren weren't won won't wouldn wouldn't""".split()  # noqa: SIM905 (a list of 179 literals reads worse)
)
_CORE = re.compile(r"\w(?:.*\w)?", re.DOTALL)  # a word without the punctuation around it


def _core(word: str) -> str:
    found = _CORE.search(word)
    return found.group().lower() if found else ""


def replace_synonym(words: list[str], rng: np.random.Generator, wordnet: WordNet) -> list[str]:
    """One word that is no stop word and has synonyms, uniformly among the different ones, becomes one of its synonyms, uniformly, wherever it occurs; unchanged if there is no such word."""
    cores = [_core(word) for word in words]
    candidates = sorted({core for core in cores if core and core not in STOP_WORDS})
    for number in rng.permutation(len(candidates)).tolist():
        if synonyms := wordnet.synonyms(candidates[number]):
            synonym = synonyms[int(rng.integers(len(synonyms)))]
            return [_CORE.sub(synonym, word, count=1) if core == candidates[number] else word for word, core in zip(words, cores, strict=True)]
    return words


def swap_words(words: list[str], rng: np.random.Generator) -> list[str]:
    """Two words at different places, uniformly among all pairs, change places; unchanged if there are fewer than two."""
    if len(words) < 2:
        return words
    one, other = rng.choice(len(words), size=2, replace=False).tolist()
    words = list(words)
    words[one], words[other] = words[other], words[one]
    return words


def delete_words(words: list[str], rng: np.random.Generator) -> list[str]:
    """Each word goes with probability 0.1; a single one stays, and if all would go, one of them stays, uniformly."""
    if len(words) < 2:
        return words
    kept = [word for word, draw in zip(words, rng.random(len(words)), strict=True) if draw >= DELETED_SHARE]
    return kept or [words[int(rng.integers(len(words)))]]


class EasyDataAugmentation:
    """One of the three edits, uniformly. Words are what white space separates, and one space separates them in the result; a blank text comes back as it is.

    Holds WordNet, so making one raises UserError where it is not installed; about 25 microseconds a caption.
    """

    def __init__(self):
        self.wordnet = open_wordnet()
        self.edits = (functools.partial(replace_synonym, wordnet=self.wordnet), swap_words, delete_words)

    def __call__(self, text: str, rng: np.random.Generator) -> str:
        words = text.split()
        if not words:
            return text
        return " ".join(self.edits[int(rng.integers(len(self.edits)))](words, rng))


def unchanged(text: str, rng: np.random.Generator) -> str:
    """The text; draws nothing."""
    return text


TEXT_AUGMENTATIONS: dict[str, Callable[[], TextAugmentation]] = {"none": lambda: unchanged, "eda": EasyDataAugmentation}


@functools.cache
def text_augmentation(name: str) -> TextAugmentation:
    """What ``data.text_augmentation`` names: a function (text, generator) -> text, the same object at every call.

    It pickles (eda: 5 MB, 45 ms to read), so loader processes need not parse WordNet again. Raises UserError: eda without WordNet, with what to install.
    """
    return TEXT_AUGMENTATIONS[name]()
