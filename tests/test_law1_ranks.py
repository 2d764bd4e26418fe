"""Law 1: W ranks give the loss and every gradient of one rank on the same global batch, for every objective."""

import pytest
import torch

from protoclip_scale import collectives
from protoclip_scale.data.batches import EpisodeBatches
from protoclip_scale.data.index import build_index, open_readers
from protoclip_scale.data.plan import Plan, lanes_of
from protoclip_scale.data.spool import Spool
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.schedules import Schedule
from protoclip_scale.engine.trainer import Trainer
from protoclip_scale.objectives import build_objectives
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.recipe import load_recipe
from tests.support import RECIPES, TINY, TINY_PROTOTYPES, spawn

OBJECTIVES = ("clip", "prototype", "teacher")
EPISODE = 1


# In fp32 a tower without kinks: which side of a ReLU a value near zero falls on is decided by rounding, on one rank as on two.
CASES = {
    "fp64": (torch.float64, ("model.image.name=test_resnet",), 1e-9),
    "fp64, batch norm in 2 groups": (torch.float64, ("model.image.name=test_resnet", "model.norm_groups=2"), 1e-9),
    "fp32": (torch.float32, ("model.image.name=test_convnext", "optim.precision=fp32"), 1e-5),
}


def recipe_with(objective: str, *more: str):
    """The demo recipe with one objective alone."""
    if objective == "clip":
        return load_recipe(RECIPES / "demo_clip.yaml", [*TINY, *more])
    weights = [f"objectives.{name}.weight={float(name == objective)}" for name in OBJECTIVES]
    return load_recipe(RECIPES / "demo.yaml", [*TINY_PROTOTYPES, "episodes.warmup=0", *weights, *more])


def drawn_prototypes(recipe, dtype: torch.dtype) -> EpisodePrototypes:
    """Prototypes as an episode would hand them over, from a seed: the law is about what is done with them."""
    generator = torch.Generator().manual_seed(3)
    clusters, dim = recipe.prototypes.clusters, recipe.model.prototype_heads.dim
    names = ("image_centroids", "text_centroids", "image_from_text", "text_from_image", "image_from_teacher", "text_from_teacher")
    centroids = {name: (torch.randn(clusters, dim, generator=generator, dtype=torch.float64) * 0.3).to(dtype) for name in names}
    rows = recipe.data.plan.episode_size
    labels = {name: torch.randint(clusters, (rows,), generator=generator, dtype=torch.int32) for name in ("image", "text", "teacher")}
    return EpisodePrototypes(EPISODE, centroids, labels)


def gradients(rank: int, world: int, spool_folder: str, broken: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Loss and gradients for each objective and precision, as DDP leaves them on this rank."""
    torch.set_num_threads(1)
    accelerator = strategies.start(timeout_minutes=2)
    if broken:  # a gather that forgets the gradient: SLIP's mistake (methods table 0.2, row 2)
        collectives.all_gather_with_grad = collectives.all_gather
    found = {}
    for objective in OBJECTIVES:
        for case, (dtype, more, _) in CASES.items():
            recipe = recipe_with(objective, *more)
            plan = Plan(build_index(recipe.data), recipe.data.plan)
            lanes = lanes_of(rank, world, recipe.data.plan.lanes)
            batches = EpisodeBatches(
                recipe.data, recipe.model.image.size, tokenizer_for(recipe.model.text), plan.episode(EPISODE), Spool(spool_folder, "law1"), lanes, "train", 0
            )
            strategy = strategies.Strategy(accelerator, strategies.Precision("fp32", accelerator.device))
            trainer = Trainer(recipe, strategy, build_objectives(recipe), Schedule(recipe, plan.steps_per_episode, plan.num_rows))
            trainer.build(frozen=False)
            strategy.prepare(strategy.bare_model.to(dtype), strategy.optimizer)
            strategy.model.train()
            prototypes = drawn_prototypes(recipe, dtype) if recipe.prototypes else None
            loss = trainer.loss(batches[1], EPISODE, prototypes)
            strategy.backward(loss.total)
            mean = collectives.all_reduce(loss.total) / world
            tensors = {name: parameter.grad for name, parameter in strategy.bare_model.named_parameters()}
            found[f"{objective}, {case}"] = {"loss": mean, **tensors}
    return found


@pytest.fixture(scope="module")
def spool_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("spool")
    recipe = recipe_with("clip")
    plan = Plan(build_index(recipe.data), recipe.data.plan)
    Spool(folder, "law1").fill(plan.episode(EPISODE), EPISODE, range(recipe.data.plan.lanes), open_readers(recipe.data))
    return str(folder)


@pytest.fixture(scope="module")
def one_rank(spool_folder) -> dict:
    return spawn(gradients, 1, spool_folder, False)[0]


def worst(expected: dict, found: dict) -> float:
    """The largest difference of any tensor, relative to that tensor's largest value.

    Gradients that are zero but for rounding (a bias in front of batch norm, a key's bias in attention) must be so in both.
    """
    largest = {name: 0.0 if tensor is None else tensor.abs().max().item() for name, tensor in expected.items()}
    nothing = 1e-6 * max(value for name, value in largest.items() if name != "loss")
    used = [name for name, value in largest.items() if value > nothing]
    assert len(used) > 20 and "loss" in used
    assert all(found[name] is None or found[name].abs().max() <= nothing for name in largest if name not in used)
    return max(((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in used)


def test_two_ranks_equal_one(one_rank, spool_folder):
    for found in spawn(gradients, 2, spool_folder, False):
        assert found.keys() == one_rank.keys() and len(found) == len(OBJECTIVES) * len(CASES)
        for name, tensors in one_rank.items():
            assert worst(tensors, found[name]) <= CASES[name.split(", ", 1)[1]][2], name


def test_a_gather_without_gradient_fails_the_law(one_rank, spool_folder):
    found = spawn(gradients, 2, spool_folder, True)[0]
    assert worst(one_rank["clip, fp64"], found["clip, fp64"]) > 1e-3
