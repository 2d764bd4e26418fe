"""Law 1: W ranks give the loss and every gradient of one rank on the same global batch, for every objective."""

import pytest
import torch

from protoclip_scale import collectives
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.optimizer import parameter_groups
from tests.strategies import FURTHER, OBJECTIVES, batches_of, drawn_prototypes, fill_spool, largest_difference, recipe_with, trainer_of
from tests.support import spawn

EPISODE = 1


# In fp32 a tower without kinks: which side of a ReLU a value near zero falls on is decided by rounding, on one rank as on two.
CASES = {
    "fp64": (torch.float64, ("model.image.name=test_resnet", "optim.precision=fp32"), 1e-9),
    "fp64, batch norm in 2 groups": (torch.float64, ("model.image.name=test_resnet", "optim.precision=fp32", "model.norm_groups=2"), 1e-9),
    "fp32": (torch.float32, ("model.image.name=test_convnext", "optim.precision=fp32"), 1e-5),
}


def gradients(rank: int, world: int, spool_folder: str, broken: bool, objectives: tuple[str, ...] = OBJECTIVES) -> dict[str, dict[str, torch.Tensor]]:
    """Loss and gradients for each objective and precision, as DDP leaves them on this rank."""
    torch.set_num_threads(1)
    accelerator = strategies.start(timeout_minutes=2)
    if broken:  # a gather that forgets the gradient: SLIP's mistake (methods table 0.2, row 2)
        collectives.all_gather_with_grad = collectives.all_gather
    found = {}
    for objective in objectives:
        for case, (dtype, more, _) in CASES.items():
            recipe = recipe_with(objective, *more)
            trainer = trainer_of(recipe, accelerator)
            trainer.build(EPISODE)
            model = trainer.model.to(dtype)
            trainer.strategy.prepare(model, parameter_groups(model, recipe.optim), recipe.optim)
            model.train()
            prototypes = drawn_prototypes(recipe, dtype, EPISODE, trainer.strategy.device) if recipe.prototypes else None
            loss = trainer.loss(batches_of(recipe, spool_folder, EPISODE)[1], EPISODE, prototypes)
            trainer.strategy.backward(loss.total)
            found[f"{objective}, {case}"] = {"loss": collectives.all_reduce(loss.total) / world, **dict(trainer.strategy.gradients())}
    return found


@pytest.fixture(scope="module")
def spool_folder(tmp_path_factory) -> str:
    return fill_spool(tmp_path_factory.mktemp("spool"), recipe_with("clip"), EPISODE)


@pytest.fixture(scope="module")
def one_rank(spool_folder) -> dict:
    return spawn(gradients, 1, spool_folder, False)[0]


def assert_law(one_rank: dict, two_ranks: list[dict], objectives: tuple[str, ...]) -> None:
    for found in two_ranks:
        assert found.keys() == one_rank.keys() and len(found) == len(objectives) * len(CASES)
        for name, tensors in one_rank.items():
            assert largest_difference(tensors, found[name]) <= CASES[name.split(", ", 1)[1]][2], name


def test_two_ranks_equal_one(one_rank, spool_folder):
    assert_law(one_rank, spawn(gradients, 2, spool_folder, False), OBJECTIVES)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_equal_one_for_further_objectives(spool_folder):
    """And one that forgets the gradient of what it gathers does not."""
    [one] = spawn(gradients, 1, spool_folder, False, FURTHER)
    assert_law(one, spawn(gradients, 2, spool_folder, False, FURTHER), FURTHER)
    broken = spawn(gradients, 2, spool_folder, True, FURTHER)[0]
    for objective in FURTHER:
        assert largest_difference(one[f"{objective}, fp64"], broken[f"{objective}, fp64"]) > 1e-3, objective


def test_a_gather_without_gradient_fails_the_law(one_rank, spool_folder):
    found = spawn(gradients, 2, spool_folder, True)[0]
    for objective in ("clip", "simclr"):
        assert largest_difference(one_rank[f"{objective}, fp64"], found[f"{objective}, fp64"]) > 1e-3
