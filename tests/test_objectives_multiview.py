"""DeCLIP's multi-view contrast: D3 of the method specification, both weightings, law 1."""

import pytest
import torch

from protoclip_scale.objectives import build_objectives
from protoclip_scale.objectives.base import Targets
from protoclip_scale.objectives.clip import clip_loss
from protoclip_scale.objectives.multiview import multiview_loss, multiview_terms
from protoclip_scale.recipe import load_recipe
from tests.losses import angles, assert_law_1, difference, gradients, number, unit_rows
from tests.support import RECIPES

U1, U2, T1, T2 = angles(10, 70), angles(-10, 100), angles(15, 60), angles(25, 50)
FOUR = [0.0229225, 0.1137472, 0.0048101, 0.0700506]
SCALE, ROWS = number(10.0), torch.arange(2)


def views(u1, u2, t1, t2):
    """Arguments for one rank."""
    return [u1, u2], [t1, t2], [u1, u2], [t1, t2]


def test_d3_four_terms_and_their_mean():
    assert [term.item() for term in multiview_terms(*views(U1, U2, T1, T2), SCALE, ROWS)] == [pytest.approx(each, abs=1e-7) for each in FOUR]
    assert multiview_loss(*views(U1, U2, T1, T2), SCALE, ROWS, "reference").item() == pytest.approx(0.0528826, abs=1e-7)


def test_the_papers_weighting_leaves_the_main_pair_to_clip():
    """0.4 L(u1, t) + 0.2 mean of the other three (methods 3.2.1)."""
    further = multiview_loss(*views(U1, U2, T1, T2), SCALE, ROWS, "paper")
    assert further.item() == pytest.approx(sum(FOUR[1:]) / 3, abs=1e-7)
    assert (0.4 * clip_loss(U1, T1, U1, T1, SCALE, ROWS) + 0.2 * further).item() == pytest.approx(0.4 * FOUR[0] + 0.2 * sum(FOUR[1:]) / 3, abs=1e-7)


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_d3_equal_views_are_clip(variant):
    assert multiview_loss(*views(U1, U1, T1, T1), SCALE, ROWS, variant).item() == pytest.approx(clip_loss(U1, T1, U1, T1, SCALE, ROWS).item(), rel=1e-12)


def plain_multiview(u1, u2, t1, t2, scale):
    """The slow twin: all logits of all pairs at once."""
    images, texts = torch.stack([u1, u2]), torch.stack([t1, t2])
    logits = scale * torch.einsum("ind,jmd->ijnm", images, texts)
    own = logits.diagonal(dim1=2, dim2=3)
    return 0.5 * ((logits.logsumexp(3) - own) + (logits.logsumexp(2) - own)).mean()


def test_equals_the_slow_twin_forward_and_backward():
    tensors = [*(unit_rows(9, 5, seed=seed) for seed in range(4)), number(14.0)]
    found = gradients(lambda *four: multiview_loss(*views(*four[:4]), four[4], torch.arange(9), "reference"), tensors)
    assert difference(found, gradients(plain_multiview, tensors)) <= 1e-12


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_law_1(variant):
    def of_rank(columns_B, local, gathered, scales):
        return multiview_loss(local[:2], local[2:], gathered[:2], gathered[2:], *scales, columns_B, variant)

    assert_law_1(of_rank, [*(unit_rows(8, 5, seed=seed) for seed in range(4)), number(9.0)])


@pytest.mark.parametrize(("settings", "text", "masked", "expected"), [
    ("{variant: reference, masked_text: true}", "text@masked", ("masked",), sum(FOUR) / 4),
    ("{variant: reference}", "text", (), sum(FOUR) / 4),
    ("{}", "text", (), sum(FOUR[1:]) / 3),
])  # fmt: skip
def test_module_asks_for_its_views(settings, text, masked, expected):
    recipe = load_recipe(RECIPES / "demo_clip.yaml", [f"objectives.multiview={settings}", "data.augmentation=declip", "model.text.mask_token=true"])
    objective = build_objectives(recipe)["multiview"]
    assert (objective.views.images, objective.views.texts, objective.views.masked) == ({"second": "declip"}, {"eda": "eda"}, masked)
    rows = {"image": U1, "image@second": U2, text: T1, "text@eda": T2}
    assert objective.needs == rows.keys() | {"logit_scale"} and set(objective.gathers) == rows.keys()
    assert objective.coupled(rows | {"logit_scale": SCALE}, rows, Targets(ROWS)).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("variant", "pairs"), [("paper", 3), ("reference", 4)])
def test_products_are_those_of_the_pairs(variant, pairs):
    objective = build_objectives(load_recipe(RECIPES / "demo_clip.yaml", [f"objectives={{clip: {{}}, multiview: {{variant: {variant}}}}}"]))["multiview"]
    assert objective.loss_products(100, {"image": 8, "text": 8}) == pairs * 2 * 100 * 8
