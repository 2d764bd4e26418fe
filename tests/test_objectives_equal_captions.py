"""Rows with equal captions in CLIP's loss: masked, or shared as positives; keys of captions."""

import math

import pytest
import torch
from torch.nn import functional as F

from protoclip_scale.objectives import build_objectives
from protoclip_scale.objectives.base import Targets
from protoclip_scale.objectives.clip import clip_loss
from protoclip_scale.objectives.shared import tiled
from protoclip_scale.objectives.shared.equal import caption_keys
from protoclip_scale.objectives.shared.tiled import Keys
from protoclip_scale.recipe import load_recipe
from tests.losses import assert_law_1, difference, gradients, number, unit_rows
from tests.support import RECIPES
from tests.test_prototypes_loss import Largest

CAPTIONS = torch.tensor([7, 3, 7, 5, 3, 7, 9, 8])
HOW = pytest.mark.parametrize("shared", [False, True], ids=["mask", "share"])


def plain_loss(image, text, scale, keys, shared):
    """The slow twin: a matrix of targets."""
    equal, logits = keys[:, None] == keys, scale * image @ text.T
    positives = equal.double() / equal.sum(1, keepdim=True) if shared else torch.eye(len(keys), dtype=torch.float64)
    if not shared:
        logits = logits.masked_fill(equal & ~torch.eye(len(keys), dtype=torch.bool), -1e9)
    return 0.5 * (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives))


def whole(shared, keys=CAPTIONS):
    return lambda image, text, scale: clip_loss(image, text, image, text, scale, torch.arange(len(image)), Keys(keys, keys, shared))


@HOW
@pytest.mark.parametrize("fewest", [256, 3, 1], ids=["one tile", "tiles", "single rows"])
def test_equals_the_slow_twin_forward_and_backward(monkeypatch, shared, fewest):
    monkeypatch.setattr(tiled, "FEWEST_ROWS", fewest)
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", {"cpu": 1 << 20 if fewest == 256 else 1})
    tensors = unit_rows(8, 5), unit_rows(8, 5, seed=1), number(12.0)
    found = gradients(whole(shared), tensors)
    assert difference(found, gradients(lambda *each: plain_loss(*each, CAPTIONS, shared), tensors)) <= 1e-12
    ignored = gradients(lambda image, text, scale: clip_loss(image, text, image, text, scale, torch.arange(8)), tensors)
    assert difference(found, ignored) > 1e-3, "the option has an effect"


@HOW
def test_distinct_captions_change_nothing(shared):
    tensors = unit_rows(8, 5), unit_rows(8, 5, seed=1), number(12.0)
    plain = gradients(lambda image, text, scale: clip_loss(image, text, image, text, scale, torch.arange(8)), tensors)
    assert difference(gradients(whole(shared, torch.arange(8)), tensors), plain) <= 1e-12


@pytest.mark.parametrize(("shared", "expected"), [(False, 0.0), (True, math.log(4))], ids=["mask", "share"])
def test_one_caption_for_all(shared, expected):
    """Masked, no negative is left; shared, a collapsed batch is the best there is: the entropy of the target."""
    rows = torch.full((4, 2), 2**-0.5, dtype=torch.float64)
    assert whole(shared, torch.zeros(4, dtype=torch.int64))(rows, rows, number(14.0)).item() == pytest.approx(expected, abs=1e-12)


@HOW
def test_law_1(shared):
    def of_rank(columns_B, local, gathered, scales):
        return clip_loss(*local, *gathered, *scales, columns_B, Keys(CAPTIONS[columns_B], CAPTIONS, shared))

    assert_law_1(of_rank, [unit_rows(8, 5), unit_rows(8, 5, seed=1), number(9.0)])


@HOW
def test_no_matrix_of_rows_by_columns_exists(monkeypatch, shared):
    monkeypatch.setattr(tiled, "FEWEST_ROWS", 16)
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", {"cpu": 1 << 14})
    tensors, keys = [unit_rows(1024, 8).requires_grad_(), unit_rows(1024, 8, seed=1).requires_grad_(), number(12.0)], torch.arange(1024) // 2
    with Largest() as found:
        whole(shared, keys)(*tensors).backward()
    assert found.elements == 16 * 1024


def test_keys_are_those_of_the_tokens_before_the_end():
    draws = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (3000,), generator=draws)
    ids = torch.randint(0, 4, (3000, 12), generator=draws)  # few different tokens: many equal captions, and many that begin alike
    captions = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
    by_key: dict[int, set] = {}
    for key, caption in zip(caption_keys(ids, lengths).tolist(), captions, strict=True):
        by_key.setdefault(key, set()).add(caption)
    assert len(by_key) == len(set(captions)) < 3000 and all(len(each) == 1 for each in by_key.values())
    assert torch.equal(caption_keys(ids[:, :12], lengths), caption_keys(F.pad(ids, (0, 5), value=49407), lengths)), "padding does not count"
    orders = torch.tensor([[1, 2, 3], [1, 3, 2], [3, 2, 1]])
    assert len(set(caption_keys(orders, torch.tensor([3, 3, 3])).tolist())) == 3, "order does"


@pytest.mark.parametrize("how", ["mask", "share"])
def test_module_gathers_keys_without_gradient(how):
    objective = build_objectives(load_recipe(RECIPES / "demo_clip.yaml", [f"objectives.clip={{equal_captions: {how}}}"]))["clip"]
    image, text = unit_rows(8, 5), unit_rows(8, 5, seed=1)
    features = {"image": image, "text": text, "logit_scale": number(12.0), "caption_key": CAPTIONS}
    assert objective.needs == features.keys() and objective.gathers_constant == ("caption_key",)
    assert objective.coupled(features, features, Targets(torch.arange(8))).item() == whole(how == "share")(image, text, number(12.0)).item()


def test_ignored_captions_cost_nothing():
    objective = build_objectives(load_recipe(RECIPES / "demo_clip.yaml"))["clip"]
    assert objective.needs == {"image", "text", "logit_scale"} and not objective.gathers_constant
