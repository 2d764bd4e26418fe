"""SigLIP's loss against its slow twin, law 1, and its start."""

import math

import pytest
import torch
from torch.nn import functional as F

from protoclip_scale.models.heads import Widths
from protoclip_scale.objectives import build_objectives
from protoclip_scale.objectives.base import Targets
from protoclip_scale.objectives.shared import tiled
from protoclip_scale.objectives.siglip import siglip_loss
from protoclip_scale.recipe import load_recipe
from tests.losses import assert_law_1, difference, gradients, number, unit_rows
from tests.support import RECIPES
from tests.test_prototypes_loss import Largest


def plain_loss(image, text, scale, bias):
    """The slow twin, as in the paper's listing."""
    labels = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(labels * (image @ text.T * scale + bias)).sum() / len(image)


def whole(image, text, scale, bias):
    return siglip_loss(image, text, scale, bias, torch.arange(len(image)))


@pytest.mark.parametrize("fewest", [256, 4, 1], ids=["one tile", "last tile shorter", "single rows"])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -30.0), (1.0, 2.0)])
def test_equals_the_slow_twin_forward_and_backward(monkeypatch, fewest, scale, bias):
    monkeypatch.setattr(tiled, "FEWEST_ROWS", fewest)
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", {"cpu": 1 << 20 if fewest == 256 else 1})
    tensors = unit_rows(9, 5), unit_rows(9, 5, seed=1), number(scale), number(bias)
    assert difference(gradients(whole, tensors), gradients(plain_loss, tensors)) <= 1e-12


def test_law_1():
    def of_rank(columns_B, local, gathered, scales):
        return siglip_loss(local[0], gathered[1], *scales, columns_B)

    assert_law_1(of_rank, [unit_rows(8, 5), unit_rows(8, 5, seed=1), number(9.0), number(-3.0)])


def test_value_by_hand():
    """Two orthogonal pairs, s = 1, b = 0: each row ln(1 + 1/e) for its own text and ln 2 for the other."""
    rows = torch.eye(2, dtype=torch.float64)
    assert whole(rows, rows, number(1.0), number(0.0)).item() == pytest.approx(math.log(1 + math.exp(-1)) + math.log(2), rel=1e-12)


def test_it_is_symmetric_and_needs_no_gradient():
    image, text, scale, bias = unit_rows(9, 5), unit_rows(9, 5, seed=1), number(10.0), number(-10.0)
    assert whole(image, text, scale, bias).item() == pytest.approx(whole(text, image, scale, bias).item(), rel=1e-12)
    with torch.no_grad():
        assert not whole(image.requires_grad_(), text, scale, bias).requires_grad


def test_no_matrix_of_rows_by_columns_exists(monkeypatch):
    monkeypatch.setattr(tiled, "FEWEST_ROWS", 16)
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", {"cpu": 1 << 14})
    with Largest() as found:
        whole(unit_rows(1024, 8).requires_grad_(), unit_rows(1024, 8, seed=1).requires_grad_(), number(10.0), number(-10.0)).backward()
    assert found.elements == 16 * 1024


def test_module_starts_as_published():
    """Temperature 10 and bias -10: at first a batch costs about softplus(-10) for each negative and up to 10 + 10 for each pair."""
    objective = build_objectives(load_recipe(RECIPES / "demo_clip.yaml", ["objectives={siglip: {}}"]))["siglip"]
    widths, heads = Widths(*[8] * len(Widths._fields)), objective.heads()
    scale, bias = (heads[kind].build(widths, objective.recipe.model)() for kind in ("siglip_scale", "siglip_bias"))
    assert (scale.item(), bias.item()) == (pytest.approx(10), -10) and not any(head.decays for head in heads.values())
    image, text = unit_rows(8, 5), unit_rows(8, 5, seed=1)
    features = {"image": image, "text": text, "siglip_scale": scale.double(), "siglip_bias": bias.double()}
    assert objective.needs == features.keys() and objective.gathers == ("text",)
    loss = objective.coupled(features, {"text": text}, Targets(torch.arange(8)))
    assert loss.item() == pytest.approx(plain_loss(image, text, scale.double(), bias.double()).item(), rel=1e-12)
    loss.backward()
