"""The weighted sums of DeCLIP and DeFILIP: D7, G1 and G2 of the method specification, with the losses' own values, and the passes that a step takes."""

import pytest
import torch

from protoclip_scale.engine import model_cost, state
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.objectives import build_objectives
from protoclip_scale.objectives.filip import filip_loss
from protoclip_scale.objectives.multiview import multiview_loss
from protoclip_scale.objectives.neighbour import neighbour_loss
from protoclip_scale.objectives.shared.feature_queue import nearest
from protoclip_scale.objectives.simsiam import simsiam_loss
from protoclip_scale.recipe import load_recipe
from tests.strategies import batches_of, fill_spool, recipe_with, trainer_of, weights
from tests.support import RECIPES, TINY, spawn
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


SMALL = (*TINY, "model.text.mask_token=true", "optim.precision=fp32", "objectives.simsiam.dim=32", "objectives.simsiam.predictor_dim=16", "objectives.neighbour.size=100")
STEPS = 3


def trained(rank: int, world: int, spool_folder: str, recipes: dict[str, tuple[str, ...]]) -> dict[str, dict[str, torch.Tensor]]:
    """By name: losses of some steps, and the weights and the queue they leave."""
    accelerator, found = strategies.start(timeout_minutes=2), {}
    for name, (file, *settings) in recipes.items():
        recipe = load_recipe(RECIPES / file, [*SMALL, *settings])
        trainer, batches = trainer_of(recipe, accelerator), batches_of(recipe, spool_folder, 0)
        trainer.build(0)
        trainer.model.train()
        losses = []
        for step in range(STEPS):
            loss = trainer.loss(batches[step], 0, None)
            losses.append(torch.stack([loss.total.detach(), *loss.terms.values()]))
            assert trainer.step(loss, step).taken
        found[name] = {"losses": torch.stack(losses)} | weights(trainer) | state.of_objectives(trainer.objectives)
    return found


def test_g1_defilip_without_its_term_trains_declip_bit_by_bit(tmp_path):
    recipes = {"declip": ("demo_declip.yaml",), "without": ("demo_defilip.yaml", "objectives.filip.weight=0"), "defilip": ("demo_defilip.yaml",)}
    [found] = spawn(trained, 1, fill_spool(tmp_path, recipe_with("clip"), 0), recipes)
    declip, without, defilip = (found[name] for name in recipes)
    assert declip["losses"].shape == (STEPS, 1 + 4) and declip["objective/neighbour/pushed"] == STEPS * 2 * 64
    assert declip.keys() == without.keys() and all(torch.equal(tensor, without[name]) for name, tensor in declip.items())
    assert defilip["losses"].shape == (STEPS, 1 + 5) and not torch.equal(defilip["image_projection.weight"], declip["image_projection.weight"])


@pytest.mark.parametrize(("masked_text", "text_passes"), [(True, 2), (False, 3)])
def test_passes_of_a_step(masked_text, text_passes):
    """As published two of images and two of texts, since the masked caption stands for the main one; without that its clean text is a third."""
    recipe = load_recipe(RECIPES / "demo_declip.yaml", [*SMALL, *(f"objectives.{name}.masked_text={masked_text}" for name in ("multiview", "neighbour"))])
    cost = model_cost.measure(recipe, build_objectives(recipe))
    assert (cost.passes("image_tower", cost.wants), cost.passes("text_tower", cost.wants)) == (2, text_passes)
