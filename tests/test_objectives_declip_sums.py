"""The weighted sums of DeCLIP and DeFILIP: D7, G1 and G2 of the method specification, with the losses' own values."""

import pytest
import torch

from protoclip_scale.objectives.feature_queue import nearest
from protoclip_scale.objectives.filip import filip_loss
from protoclip_scale.objectives.multiview import multiview_loss
from protoclip_scale.objectives.neighbour import neighbour_loss
from protoclip_scale.objectives.simsiam import simsiam_loss
from protoclip_scale.recipe import load_recipe
from tests.support import RECIPES
from tests.test_objectives_filip import IMAGES, TEXTS
from tests.test_objectives_multiview import T1, T2, views
from tests.test_objectives_neighbour import EDITED, QUEUE, ROWS, SCALE, TEXT, U1, U2
from tests.test_objectives_simsiam import P1, P2, Z1, Z2

MASKED_LANGUAGE_MODELLING = 2.0  # the case takes it as given


@pytest.fixture(scope="module")
def losses() -> dict[str, float]:
    neighbours = [QUEUE[nearest(QUEUE, texts, 1)[:, 0]] for texts in (TEXT, EDITED)]
    return {
        "multiview": multiview_loss(*views(U1, U2, T1, T2), SCALE, ROWS, "reference").item(),
        "simsiam": simsiam_loss(P1, P2, Z1, Z2).item(),
        "mlm": MASKED_LANGUAGE_MODELLING,
        "neighbour": neighbour_loss([U1, U2], neighbours, SCALE, ROWS).item(),
        "filip": filip_loss(IMAGES, TEXTS, IMAGES, TEXTS, SCALE, torch.arange(2)).item(),
    }


@pytest.mark.parametrize(("recipe", "expected"), [("yfcc15m_declip", 0.4679889), ("yfcc15m_defilip", 0.4868938)], ids=["D7", "G2"])
def test_published_weights_give_the_sum(losses, recipe, expected):
    """The recipes' weights: 0.4, 0.2, 0.2, 0.2, and DeFILIP's 0.2 more; they are not scaled to 1."""
    weights = {name: settings.weight for name, settings in load_recipe(RECIPES / f"{recipe}.yaml").objectives.items() if settings.weight}
    assert sum(weight * losses[name] for name, weight in weights.items()) == pytest.approx(expected, abs=1e-7)


def test_g1_defilip_without_its_term_is_declip():
    """Setting the weight to 0 leaves the very recipe of DeCLIP: nothing is built or drawn for a weight of zero."""
    declip, without = load_recipe(RECIPES / "yfcc15m_declip.yaml"), load_recipe(RECIPES / "yfcc15m_defilip.yaml", ["objectives.filip.weight=0"])
    objectives = {name: settings for name, settings in without.objectives.items() if name != "filip"}
    assert without.model_copy(update={"name": declip.name, "notes": declip.notes, "expected": declip.expected, "objectives": objectives}) == declip
