"""SimSiam's loss: D1 of the method specification, its heads, and what reaches whom."""

import pytest
import torch

from protoclip_scale.models.batch_norm import GroupBatchNorm
from protoclip_scale.objectives import build_objectives
from protoclip_scale.objectives.simsiam import Predictor, Projector, simsiam_loss
from protoclip_scale.recipe import load_recipe
from tests.losses import difference, gradients, over_ranks, unit_rows
from tests.support import RECIPES

P1, Z1 = torch.tensor([[1.0, 0], [3, 4]]).double(), torch.tensor([[0.0, 2], [1, 1]]).double()
P2, Z2 = torch.tensor([[1.0, 1], [0, 5]]).double(), torch.tensor([[2.0, 0], [4, 3]]).double()


def test_d1_value_and_stopped_gradient():
    loss, *slopes = gradients(simsiam_loss, (P1, P2, Z1, Z2))
    assert loss.item() == pytest.approx(-0.8435534, abs=1e-7)
    assert torch.cosine_similarity(P1, Z2).tolist() == pytest.approx([1, 0.96]) and torch.cosine_similarity(P2, Z1).tolist() == pytest.approx([0.5**0.5] * 2)
    assert all(slope.abs().max() > 0 for slope in slopes[:2])
    assert all(not slope.any() for slope in slopes[2:]), "no gradient reaches the projections"


def test_d1_equal_views_reach_the_minimum():
    assert simsiam_loss(P1, P2, P2, P1).item() == pytest.approx(-1)


def test_lengths_do_not_matter():
    assert simsiam_loss(3 * P1, P2, Z1, 0.1 * Z2).item() == pytest.approx(simsiam_loss(P1, P2, Z1, Z2).item(), rel=1e-12)


def test_law_1_rows_are_on_their_own():
    """Nothing is gathered, so no gather can be wrong: the mean of ranks is the mean of rows."""
    views = [unit_rows(8, 6, seed=seed) for seed in range(4)]

    def of_rank(columns_B, local, gathered, scales):
        return simsiam_loss(*local)

    assert difference(gradients(over_ranks(of_rank, 4), views), gradients(over_ranks(of_rank, 1), views)) <= 1e-9


def test_arithmetic_is_fp32_at_least():
    loss = simsiam_loss(*(each.bfloat16() for each in (P1, P2, Z1, Z2)))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(-0.8435534, abs=1e-3)


def test_heads_have_the_published_layers():
    """methods 3.2.2: three linear maps with batch norm after each, ReLU between; a predictor with a narrower layer."""
    projector, predictor = Projector(512, 1024, groups=4), Predictor(1024, 512, groups=4)
    assert [type(layer).__name__ for layer in projector] == ["Linear", "GroupBatchNorm", "ReLU"] * 2 + ["Linear", "GroupBatchNorm"]
    assert [type(layer).__name__ for layer in predictor] == ["Linear", "GroupBatchNorm", "ReLU", "Linear"]
    assert [(layer.in_features, layer.out_features) for layer in (*projector, *predictor) if isinstance(layer, torch.nn.Linear)] == [
        (512, 1024), (1024, 1024), (1024, 1024), (1024, 512), (512, 1024),
    ]  # fmt: skip
    assert {layer.groups for layer in (*projector, *predictor) if isinstance(layer, GroupBatchNorm)} == {4}


def test_module_asks_for_both_views_and_reads_them_in_order():
    recipe = load_recipe(RECIPES / "demo_clip.yaml", ["objectives.simsiam={weight: 0.2}", "data.augmentation=declip"])
    objective = build_objectives(recipe)["simsiam"]
    assert objective.views.images == {"second": "declip"} and not objective.gathers
    features = dict(zip(("simsiam_prediction", "simsiam_prediction@second", "simsiam_projection", "simsiam_projection@second"), (P1, P2, Z1, Z2), strict=True))
    assert objective.needs == features.keys()
    assert objective.coupled(features, {}, None).item() == pytest.approx(-0.8435534, abs=1e-7)
