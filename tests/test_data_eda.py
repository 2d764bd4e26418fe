"""EDA against its definition, with the WordNet that the extra installs."""

import pickle
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from protoclip_scale.data import wordnet as wordnet_module
from protoclip_scale.data.randomness import generator
from protoclip_scale.data.text_augmentation import STOP_WORDS, delete_words, replace_synonym, swap_words, text_augmentation
from protoclip_scale.data.wordnet import WordNet, find_wordnet, open_wordnet
from protoclip_scale.errors import UserError
from tests.support import CORPUS, spawn

SEED = 5


@pytest.fixture(scope="module")
def eda():
    return text_augmentation("eda")


@pytest.fixture(scope="module")
def captions():
    table = pq.read_table(CORPUS / "train-00000-of-00010.parquet", columns=["caption"])
    return [captions[0] for captions in table["caption"].to_pylist()]


def draws(count, *numbers):
    return [generator(SEED, "text augmentation", *numbers, number) for number in range(count)]


def close(count, expected, total):
    """Within four standard deviations of a binomial count."""
    share = expected / total
    return abs(count - expected) < 4 * np.sqrt(total * share * (1 - share))


def test_synonyms_are_those_of_every_synset_of_every_base_form():
    """What NLTK's reader of the same files gives, with textaugment's spelling; a hash pins the whole of WordNet 3.0."""
    wordnet = open_wordnet()
    assert wordnet.synonyms("photo") == ("exposure", "photograph", "pic", "picture")
    assert wordnet.synonyms("happier") == ("felicitous", "glad", "happy", "well chosen")
    assert wordnet.synonyms("women") == ("adult female", "char", "charwoman", "cleaning lady", "cleaning woman", "fair sex", "woman", "womanhood")
    assert {"sit", "baby sit", "saturday", "ride"} <= set(wordnet.synonyms("sat"))  # irregular, and a name of its own
    assert {"child", "kid", "youngster"} <= set(wordnet.synonyms("Children"))
    assert wordnet.synonyms("hundred") == ("c", "century", "one c", "one hundred")  # not '', which textaugment makes of '100'
    assert wordnet.synonyms("new")[:2] == ("fresh", "freshly")  # the marker of 'newfangled(a)' is no part of it
    assert wordnet.synonyms("qwerty") == wordnet.synonyms("the") == wordnet.synonyms("") == ()
    assert wordnet.digest == "c378cba1e0c208312f8c398e67f6014b53b9b66c5587d13c0577717d3f8585ec"


def test_princetons_own_files_give_the_same(tmp_path):
    """Their lines end in \\n alone, those of the package in \\r\\n."""
    for file in find_wordnet().glob("*.*"):
        if file.stem in ("data", "index") or file.suffix == ".exc":
            (tmp_path / file.name).write_bytes(file.read_bytes().replace(b"\r\n", b"\n"))
    assert b"\r" not in (tmp_path / "data.noun").read_bytes()
    assert WordNet(tmp_path).digest == open_wordnet().digest


def test_each_of_the_three_edits_is_as_likely(eda):
    """A caption on which they can be told apart: no repeated word, and all words have synonyms."""
    text = "big dog near small house with old tree and tall fence"
    words, counts, total = text.split(), Counter(), 6000
    for rng in draws(total):
        changed = eda(text, rng).split()
        if sorted(changed) == sorted(words):
            counts["swap" if changed != words else "delete none"] += 1
        elif set(changed) < set(words):
            counts["delete"] += 1
        else:
            counts["synonym"] += 1
    unchanged = 0.9 ** len(words)
    for edit, share in (("swap", 1), ("synonym", 1), ("delete", 1 - unchanged), ("delete none", unchanged)):
        assert close(counts[edit], share * total / 3, total), counts


def test_one_word_becomes_one_of_its_synonyms_uniformly():
    wordnet = open_wordnet()
    words = ["The", "photo", "of", "a", "hundred", "qwerty,", "Photo!"]
    counts = Counter(" ".join(replace_synonym(words, rng, wordnet)) for rng in draws(4000))
    expected = {f"The {each} of a hundred qwerty, {each}!": 1 / 8 for each in wordnet.synonyms("photo")}
    expected |= {f"The photo of a {each} qwerty, Photo!": 1 / 8 for each in wordnet.synonyms("hundred")}
    assert len(expected) == 8 and counts.keys() == expected.keys()
    assert all(close(counts[text], 500, 4000) for text in expected), counts


def test_stop_words_and_unknown_words_are_never_replaced():
    wordnet = open_wordnet()
    assert {"a", "in", "have", "don't", "won"} <= STOP_WORDS and wordnet.synonyms("a") and wordnet.synonyms("in") and wordnet.synonyms("have")
    for words in (["A", "in", "have", "qwerty"], ["!!", "--"], ["猫"]):
        assert all(replace_synonym(words, rng, wordnet) == words for rng in draws(20))
    assert all(replace_synonym(["in", "\"dog\"", "a"], rng, wordnet)[::2] == ["in", "a"] for rng in draws(20))


def test_swapped_pairs_are_uniform():
    counts = Counter(tuple(swap_words(list("abcd"), rng)) for rng in draws(6000))
    assert len(counts) == 6 and tuple("abcd") not in counts
    assert all(sum(one != other for one, other in zip(words, "abcd", strict=True)) == 2 for words in counts)
    assert all(close(count, 1000, 6000) for count in counts.values()), counts


def test_each_word_is_deleted_with_one_tenth():
    words = [str(number) for number in range(40)]
    kept = Counter(word for rng in draws(2000) for word in delete_words(words, rng))
    assert all(close(kept[word], 1800, 2000) for word in words)
    lengths = [len(delete_words(words, rng)) for rng in draws(2000)]
    assert abs(np.std(lengths) - np.sqrt(40 * 0.09)) < 0.15  # independently of each other
    assert all(left == sorted(left, key=int) for left in (delete_words(words, rng) for rng in draws(50)))


def test_if_all_words_would_go_one_stays():
    class AllGo:
        """Draws below 0.1 for every word."""

        def __init__(self, number):
            self.rng = generator(SEED, "stays", number)

        def random(self, size):
            return np.zeros(size)

        def integers(self, high):
            return self.rng.integers(high)

    counts = Counter(word for number in range(3000) for word in delete_words(list("abc"), AllGo(number)))
    assert sum(counts.values()) == 3000 and all(close(counts[word], 1000, 3000) for word in "abc"), counts


def test_single_words_and_blank_texts_survive(eda):
    for text in ("", "  ", "\n\t"):
        assert all(eda(text, rng) == text for rng in draws(30))
    assert all(eda("qwerty", rng) == "qwerty" for rng in draws(30))
    photo = Counter(eda("photo", rng) for rng in draws(3000))
    assert close(photo["photo"], 2000, 3000) and set(photo) == {"photo", "exposure", "photograph", "pic", "picture"}
    assert all("  " not in eda("many   spaces between \n the words", rng) for rng in draws(30))


def _augment(rank: int, world: int, eda, captions: list[str]) -> dict:
    rows = list(range(len(captions)))[:: 1 if rank else -1]
    return {row: eda(captions[row], generator(SEED, "text augmentation", 2, row, 1)) for row in rows}


def test_a_text_is_a_function_of_seed_epoch_row_and_view_alone(eda, captions):
    """Whatever the process and the order; and no other's random state moves."""
    import random

    before, global_state = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    def texts(seed, epoch, view):
        return [eda(caption, generator(seed, "text augmentation", epoch, row, view)) for row, caption in enumerate(captions)]

    here = texts(SEED, 2, 1)
    assert random.getstate() == before and np.random.get_state()[1].tolist() == global_state  # noqa: NPY002
    for there in spawn(_augment, 2, eda, captions):
        assert [there[row] for row in range(len(captions))] == here
    for other in (texts(SEED + 1, 2, 1), texts(SEED, 3, 1), texts(SEED, 2, 0)):
        assert 0.2 < np.mean([one != another for one, another in zip(here, other, strict=True)]) < 0.95


def test_it_goes_to_loader_processes_small_and_ready(eda, monkeypatch):
    pickled = pickle.dumps(eda)
    assert len(pickled) < 6_000_000
    monkeypatch.setattr(wordnet_module, "_places", lambda: iter(()))  # a loader process need not find the files
    text = "a big dog"
    assert [pickle.loads(pickled)(text, rng) for rng in draws(10)] == [eda(text, rng) for rng in draws(10)]


def test_none_changes_nothing_and_draws_nothing():
    assert text_augmentation("none")("a  text", None) == "a  text"


def test_without_wordnet_there_is_one_line_that_says_what_to_install(monkeypatch, tmp_path):
    text_augmentation.cache_clear()
    real = find_wordnet()
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    with pytest.raises(UserError, match=r"data.text_augmentation eda: no WordNet in .*pip install 'protoclip-scale\[wordnet\]'") as caught:
        text_augmentation("eda")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    for name in ("data.noun", "index.noun"):
        (tmp_path / name).write_text("1 this is something else\n")
    with pytest.raises(UserError, match="not one release of WordNet"):
        text_augmentation("eda")
    (tmp_path / "index.noun").unlink()
    (tmp_path / "data.noun").write_bytes((real / "data.noun").read_bytes())
    with pytest.raises(UserError, match="index.noun: cannot be read"):
        text_augmentation("eda")
