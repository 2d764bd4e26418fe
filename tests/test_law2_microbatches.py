"""Law 2: a step in micro-batches is the step of the whole batch, for every objective and every parameter, logit scales included; under every strategy, too.

Batches are real, and the towers have no batch norm; heads that have some see all rows at once, so they are no exception (tests/test_models_microbatches.py has dropout, batch norm, and breaks that must fail).
"""

import pytest
import torch

from protoclip_scale import collectives
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.optimizer import parameter_groups
from protoclip_scale.prototypes.recording import COLUMNS
from tests.strategies import (
    FURTHER,
    OBJECTIVES,
    batches_of,
    drawn_prototypes,
    environment,
    fill_spool,
    largest_difference,
    recipe_with,
    trainer_of,
)
from tests.support import spawn

EPISODE = 1
TOWERS = ("model.image.name=test_convnext", "model.image.grad_checkpointing=true", "model.text.grad_checkpointing=true", "optim.max_norm=null", "optim.precision=fp32")
RECORDED = frozenset(COLUMNS.values())


def gradients(rank: int, world: int, spool_folder: str, dtype_name: str, microbatch: int | None, objectives: tuple[str, ...] = OBJECTIVES) -> dict[str, dict[str, torch.Tensor]]:
    """Loss, gradients and recorded features of the second of two steps, the first of which changes nothing: what a strategy keeps from one step to the next must not matter."""
    torch.set_num_threads(1)
    accelerator, dtype = strategies.start(timeout_minutes=2), getattr(torch, dtype_name)
    found = {}
    for objective in objectives:
        recipe = recipe_with(objective, *TOWERS, f"optim.microbatch={microbatch or 'null'}")
        trainer = trainer_of(recipe, accelerator)
        trainer.build(EPISODE)
        strategy, model = trainer.strategy, trainer.model
        if dtype != torch.float32:
            strategy.prepare(model.to(dtype), parameter_groups(model, recipe.optim), recipe.optim)
        model.train()
        batches = batches_of(recipe, spool_folder, EPISODE)
        prototypes = drawn_prototypes(recipe, dtype, EPISODE) if recipe.prototypes else None
        if objective == "prototype":  # labelled by the features of the batch
            del prototypes.labels["image"], prototypes.labels["text"]
        records = RECORDED if prototypes else frozenset()
        strategy.backward(trainer.loss(batches[0], EPISODE, prototypes, records).total)
        strategy.set_learning_rates({"visual": 0.0, "other": 0.0})
        assert strategy.update().taken
        loss = trainer.loss(batches[1], EPISODE, prototypes, records)
        strategy.backward(loss.total)
        features = {f"features/{name}": collectives.all_gather(loss.features[name].detach()) for name in sorted(records)}
        found[objective] = {"loss": collectives.all_reduce(loss.total) / world, **features, **dict(strategy.gradients())}
        strategy.release()
    return found


@pytest.fixture(scope="module")
def spool_folder(tmp_path_factory) -> str:
    return fill_spool(tmp_path_factory.mktemp("spool"), recipe_with("clip"), EPISODE)


@pytest.fixture(scope="module")
def whole(spool_folder) -> dict:
    return spawn(gradients, 1, spool_folder, "float32", None)[0]


@pytest.fixture(scope="module")
def whole_of_further(spool_folder) -> dict:
    return spawn(gradients, 1, spool_folder, "float32", None, FURTHER)[0]


def assert_law(expected: dict, ranks: list[dict], tolerance: float, objectives: tuple[str, ...] = OBJECTIVES) -> None:
    for found in ranks:
        assert found.keys() == expected.keys() == set(objectives)
        for objective, tensors in expected.items():
            assert any("logit_scale" in name for name in tensors)
            assert largest_difference(tensors, found[objective]) <= tolerance, objective


def test_on_one_rank_in_fp64(spool_folder):
    expected, found = (spawn(gradients, 1, spool_folder, "float64", microbatch)[0] for microbatch in (None, 24))
    assert_law(expected, [found], 1e-9)


def test_on_two_ranks_under_ddp(whole, spool_folder):
    assert_law(whole, spawn(gradients, 2, spool_folder, "float32", 12), 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_further_objectives_on_one_rank_in_fp64(spool_folder):
    expected, found = (spawn(gradients, 1, spool_folder, "float64", microbatch, FURTHER)[0] for microbatch in (None, 24))
    assert_law(expected, [found], 1e-9, FURTHER)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp2"])
def test_on_two_ranks_under_sharding(whole, spool_folder, strategy):
    assert_law(whole, spawn(gradients, 2, spool_folder, "float32", 12, env=environment(strategy, 2)), 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_further_objectives_on_two_ranks(whole_of_further, spool_folder, strategy):
    assert_law(whole_of_further, spawn(gradients, 2, spool_folder, "float32", 12, FURTHER, env=environment(strategy, 2)), 1e-5, FURTHER)
