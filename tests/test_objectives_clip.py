"""CLIP's loss: the numeric cases C1-C6 of the method specification, and its symmetries."""

import math

import pytest
import torch
from torch.nn import functional as F

from protoclip_scale.objectives import build_objectives
from protoclip_scale.objectives.base import Targets
from protoclip_scale.objectives.clip import clip_loss
from protoclip_scale.recipe import load_recipe
from tests.losses import difference, gradients, unit_rows
from tests.support import RECIPES


def angles(*degrees: float) -> torch.Tensor:
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=-1)


def whole(image: torch.Tensor, text: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    return clip_loss(image, text, image, text, torch.as_tensor(scale, dtype=torch.float64), torch.arange(len(image)))


IMAGE, TEXT = angles(0, 60, 120), angles(15, 50, 140)


def test_c1_orthonormal_pairs():
    assert whole(torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), 1.0).item() == pytest.approx(0.3132617, abs=1e-7)


@pytest.mark.parametrize("scale", [1.0, 14.2857, 100.0])
def test_c2_equal_rows_cost_ln_batch(scale):
    rows = torch.full((4, 2), 2**-0.5, dtype=torch.float64)
    assert whole(rows, rows, scale).item() == pytest.approx(math.log(4), abs=1e-7)


def test_c3_value_directions_and_scale_gradient():
    log_scale = torch.tensor(math.log(10.0), dtype=torch.float64, requires_grad=True)
    loss = whole(IMAGE, TEXT, log_scale.exp())
    loss.backward()
    logits = 10 * IMAGE @ TEXT.T
    assert loss.item() == pytest.approx(0.0347696, abs=1e-7)
    assert F.cross_entropy(logits, torch.arange(3)).item() == pytest.approx(0.0339768, abs=1e-7)
    assert F.cross_entropy(logits.T, torch.arange(3)).item() == pytest.approx(0.0355624, abs=1e-7)
    assert log_scale.grad.item() == pytest.approx(-0.1009485, abs=1e-7)


def test_c4_two_ranks_average_to_the_whole_batch():
    image, text, scale = angles(0, 60, 120, 200), angles(15, 50, 140, 190), torch.tensor(10.0, dtype=torch.float64)
    parts = [clip_loss(image[r : r + 2], text[r : r + 2], image, text, scale, torch.arange(2) + r).item() for r in (0, 2)]
    assert parts == [pytest.approx(0.0514016, abs=1e-7), pytest.approx(0.0068001, abs=1e-7)]
    assert sum(parts) / 2 == pytest.approx(0.0291008, abs=1e-7)
    assert whole(image, text, 10.0).item() == pytest.approx(0.0291008, abs=1e-7)


def test_c6_symmetries():
    loss = whole(IMAGE, TEXT, 10.0).item()
    order = torch.tensor([2, 0, 1])
    rotation = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    assert whole(TEXT, IMAGE, 10.0).item() == pytest.approx(loss, rel=1e-12)
    assert whole(IMAGE[order], TEXT[order], 10.0).item() == pytest.approx(loss, rel=1e-12)
    assert whole(IMAGE @ rotation, TEXT @ rotation, 10.0).item() == pytest.approx(loss, rel=1e-12)
    assert whole(IMAGE[order], TEXT, 10.0).item() > loss + 1


def test_the_reference_variant_has_slips_gradient():
    """The loss and the temperature's gradient are exact; rows get none as columns, also where another objective has gathered them with gradient (methods 0.2, 2.3)."""

    def loss(variant):
        objective = build_objectives(load_recipe(RECIPES / "demo_clip.yaml", [f"objectives.clip.variant={variant}"]))["clip"]
        assert (objective.gathers, objective.gathers_constant) == {"paper": (("image", "text"), ()), "reference": ((), ("image", "text"))}[variant]
        assert objective.loss_products(128, {"image": 8, "text": 8}) == 2048

        def loss_of(image, text, scale):
            features = {"image": image, "text": text, "logit_scale": scale}
            return objective.coupled(features, features, Targets(torch.arange(6), num_columns=6))

        return loss_of

    tensors = unit_rows(6, 5), unit_rows(6, 5, seed=1), torch.tensor([10.0], dtype=torch.float64)
    exact, found = gradients(loss("paper"), tensors), gradients(loss("reference"), tensors)
    expected = gradients(lambda image, text, scale: clip_loss(image, text, image.detach(), text.detach(), scale, torch.arange(6)), tensors)
    assert difference(found, expected) <= 1e-12
    assert difference([found[0], found[3]], [exact[0], exact[3]]) <= 1e-12
    assert all(F.cosine_similarity(one.flatten(), other.flatten(), dim=0) < 0.98 for one, other in zip(found[1:3], exact[1:3], strict=True))
