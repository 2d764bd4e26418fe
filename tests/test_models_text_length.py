"""Law 7 for texts: trimmed and in length buckets they are what they are padded, features and gradients, for CLIP's tower and for masked encoders."""

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig

from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.models import text
from protoclip_scale.models.text import TextTower, bucket_sizes
from protoclip_scale.recipe import schema

ROWS = 37
CLIP = schema.TextTower(width=64, heads=2, layers=2, context_length=77)


@pytest.fixture(params=["clip", "mean", "first"])
def tower(request, tmp_path) -> TextTower:
    torch.manual_seed(0)
    if request.param == "clip":
        return TextTower(CLIP).double()
    BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=77).save_pretrained(tmp_path)
    encoder = TextTower(schema.TextTower(name=str(tmp_path))).double()
    encoder.pooling = request.param
    return encoder


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Most captions are short, one is as long as can be; what stands in the padding is nothing to go by."""
    draws = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 12, (ROWS,), generator=draws)
    lengths[5], lengths[20] = 77, 40
    return torch.randint(1, 100, (ROWS, 77), generator=draws), lengths


def padded(tower: TextTower, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The slow twin: every caption at the whole context."""
    if tower.causal:
        return tower.encoder(input_ids=ids).last_hidden_state[torch.arange(len(ids)), lengths - 1]
    mask = torch.arange(77) < lengths[:, None]
    states = tower.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return states[:, 0] if tower.pooling == "first" else (states * mask[:, :, None]).sum(1) / lengths[:, None]


def with_gradients(tower: TextTower, pooled: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, pooled.numel(), dtype=pooled.dtype).view_as(pooled)
    return [pooled.detach(), *torch.autograd.grad((pooled * weights).sum(), list(tower.parameters()))]


@pytest.mark.parametrize("bucket_rows", [100, 8, 1], ids=["trimmed", "4 buckets", "rows"])
@pytest.mark.parametrize("width_step", [1, 8])
def test_buckets_equal_padded(tower, tokens, monkeypatch, bucket_rows, width_step):
    monkeypatch.setattr(text, "BUCKET_ROWS", {"cpu": bucket_rows})
    monkeypatch.setattr(text, "WIDTH_STEP", {"cpu": width_step})
    expected, found = (with_gradients(tower, of(tower, *tokens)) for of in (padded, TextTower.pooled))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_features_are_equal_in_fp32(monkeypatch):
    monkeypatch.setattr(text, "BUCKET_ROWS", {"cpu": 2})
    torch.manual_seed(0)
    tower = TextTower(CLIP).eval()
    tokens = tokenizer_for(CLIP)(["a red fox", "two chairs at a table", "a", "elephant " * 60, "snow"])
    with torch.no_grad():
        found, expected = (F.normalize(of(tower, *tokens), dim=1) for of in (TextTower.pooled, padded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_short_captions_do_not_pay_for_long_ones(monkeypatch, tokens):
    monkeypatch.setattr(text, "BUCKET_ROWS", {"cpu": 9})
    torch.manual_seed(0)
    tower, widths = TextTower(CLIP), []
    tower.encoder.encoder.register_forward_pre_hook(lambda _, inputs, named: widths.append(tuple(named["inputs_embeds"].shape[:2])), with_kwargs=True)
    tower.pooled(*tokens)
    assert [rows for rows, _ in widths] == [10, 9, 9, 9] and [width for _, width in widths] == sorted(width for _, width in widths)
    assert widths[2][1] < 12 and widths[3][1] == 77


def test_the_number_of_calls_depends_on_the_rows_alone(monkeypatch):
    """Ranks with equal batches make as many, whatever their captions: some strategies gather weights in each."""
    monkeypatch.setattr(text, "BUCKET_ROWS", {"cpu": 8})
    torch.manual_seed(0)
    tower, calls = TextTower(CLIP), []
    tower.encoder.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = set()
    for lengths in (torch.full((ROWS,), 77), torch.full((ROWS,), 2), torch.arange(ROWS) + 2):
        calls.clear()
        tower.pooled(torch.ones(ROWS, 77, dtype=torch.int64), lengths)
        counts.add(len(calls))
    assert counts == {len(bucket_sizes(ROWS, "cpu"))} == {4}


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100, 4096])
def test_bucket_sizes_add_up_and_are_alike(rows):
    for device in ("cpu", "cuda"):
        sizes = bucket_sizes(rows, device)
        assert sum(sizes) == rows and max(sizes) - min(sizes) <= 1 and min(sizes) >= min(rows, text.BUCKET_ROWS[device])


def test_activation_checkpointing_changes_no_gradient(tokens):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        tower = TextTower(CLIP.model_copy(update={"grad_checkpointing": checkpointing})).double().train()
        calls = []
        tower.encoder.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        found.append([*with_gradients(tower, tower.pooled(*tokens)), torch.tensor(float(len(calls)))])
    *plain, calls = found[0]
    *recomputed, calls_again = found[1]
    assert calls_again == 2 * calls
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
