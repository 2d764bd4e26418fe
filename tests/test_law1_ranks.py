"""Law 1: W ranks give the loss, every gradient and what objectives remember of one rank on the same global batch, for every objective, alone and all at once."""

import pytest
import torch

from protoclip_scale import collectives
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.optimizer import parameter_groups
from tests.strategies import (
    FURTHER,
    OBJECTIVES,
    TOGETHER,
    assert_rows_were_pushed,
    batches_of,
    drawn_prototypes,
    fill_spool,
    largest_difference,
    recipe_with,
    remembered,
    smooth,
    trainer_of,
    without_kinks,
)
from tests.support import spawn

EPISODE = 1
CASES = ("fp64", "fp64, batch norm in 2 groups", "fp32")
BOUNDS = {"fp64": 1e-9, "fp64, batch norm in 2 groups": 1e-9, "fp32": 1e-5}
QUICK = ("clip", TOGETHER)
ALONE = tuple(name for name in (*OBJECTIVES, *FURTHER) if name not in QUICK)


def settings_of(objective: str, case: str) -> tuple[str, ...]:
    """Batch norm in the tower, too, but in fp32. All objectives together have it in their heads and, in the second case, in the tower."""
    no_kinks = case == "fp32" or (objective == TOGETHER and case == "fp64")
    tower = without_kinks(objective) if no_kinks else "model.image.name=test_resnet"
    return (tower, "optim.precision=fp32", *(["model.norm_groups=2"] if "2 groups" in case else []))


def gradients(
    rank: int, world: int, spool_folder: str, broken: bool, objectives: tuple[str, ...] = OBJECTIVES, cases: tuple[str, ...] = CASES
) -> dict[str, dict[str, torch.Tensor]]:
    """Loss, gradients and what is remembered for each objective and precision, as DDP leaves them on this rank."""
    torch.set_num_threads(1)
    accelerator = strategies.start(timeout_minutes=2)
    if broken:  # a gather that forgets the gradient: SLIP's mistake (methods table 0.2, row 2)
        collectives.all_gather_with_grad = collectives.all_gather
    found = {}
    for objective in objectives:
        batch = None
        for case in cases:
            recipe, dtype = recipe_with(objective, *settings_of(objective, case)), torch.float32 if case == "fp32" else torch.float64
            trainer = trainer_of(recipe, accelerator)
            trainer.build(EPISODE)
            model = trainer.model.to(dtype)
            trainer.strategy.prepare(model, parameter_groups(model, recipe.optim), recipe.optim)
            model.train()
            if (objective, case) == (TOGETHER, "fp32"):
                smooth(model)
            with torch.no_grad():  # a residual branch that ends in a weight of zero has no gradient
                for parameter in model.image_tower.parameters():
                    parameter += 0.1 * (~parameter.any())
            prototypes = drawn_prototypes(recipe, dtype, EPISODE, trainer.strategy.device) if recipe.prototypes else None
            batch = batch or batches_of(recipe, spool_folder, EPISODE)[1]
            loss = trainer.loss(batch, EPISODE, prototypes)
            trainer.strategy.backward(loss.total)
            found[f"{objective}, {case}"] = {"loss": collectives.all_reduce(loss.total) / world, **dict(trainer.strategy.gradients()), **remembered(trainer, loss)}
    return found


@pytest.fixture(scope="module")
def spool_folder(tmp_path_factory) -> str:
    return fill_spool(tmp_path_factory.mktemp("spool"), recipe_with("clip"), EPISODE)


@pytest.fixture(scope="module")
def one_rank(spool_folder) -> dict:
    return spawn(gradients, 1, spool_folder, False, QUICK)[0]


def assert_law(one_rank: dict, two_ranks: list[dict], objectives: tuple[str, ...]) -> None:
    for found in two_ranks:
        assert found.keys() == one_rank.keys() == {f"{objective}, {case}" for objective in objectives for case in CASES}
        for name, tensors in one_rank.items():
            objective, case = name.split(", ", 1)
            assert_rows_were_pushed(objective, tensors, steps=1)
            assert largest_difference(tensors, found[name]) <= BOUNDS[case], name


def test_two_ranks_equal_one(one_rank, spool_folder):
    assert_law(one_rank, spawn(gradients, 2, spool_folder, False, QUICK), QUICK)


def test_a_gather_without_gradient_fails_the_law(one_rank, spool_folder):
    found = spawn(gradients, 2, spool_folder, True, QUICK, ("fp64",))[0]
    for name, tensors in found.items():
        assert largest_difference(one_rank[name], tensors) > 1e-3, name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_equal_one_for_each_objective_alone(spool_folder):
    """And one that forgets the gradient of what it gathers does not."""
    [one] = spawn(gradients, 1, spool_folder, False, ALONE)
    assert_law(one, spawn(gradients, 2, spool_folder, False, ALONE), ALONE)
    broken = spawn(gradients, 2, spool_folder, True, ("simclr", *FURTHER), ("fp64",))[0]
    for name, tensors in broken.items():
        assert largest_difference(one[name], tensors) > 1e-3, name
