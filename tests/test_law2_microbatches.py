"""Law 2: a step in micro-batches is the step of the whole batch, for every objective, alone and all at once, and every parameter, logit scales included, and for what objectives remember;
under every strategy, too.

Batches are real, and the towers have no batch norm; heads that have some see all rows at once, so they are no exception (tests/test_models_microbatches.py has dropout, batch norm, and breaks that must fail).
"""

import functools

import pytest
import torch

from protoclip_scale import collectives
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.optimizer import parameter_groups
from protoclip_scale.prototypes.recording import COLUMNS
from tests.strategies import (
    FURTHER,
    OBJECTIVES,
    TOGETHER,
    assert_rows_were_pushed,
    batches_of,
    drawn_prototypes,
    environment,
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
QUICK = ("clip", TOGETHER)
TOWERS = ("model.image.grad_checkpointing=true", "model.text.grad_checkpointing=true", "optim.max_norm=null", "optim.precision=fp32")
RECORDED = frozenset(COLUMNS.values())


def gradients(rank: int, world: int, spool_folder: str, dtype_name: str, microbatch: int | None, objectives: tuple[str, ...] = OBJECTIVES) -> dict[str, dict[str, torch.Tensor]]:
    """Loss, gradients, recorded features and what is remembered of the second of two steps, the first of which changes no weight: what a strategy keeps from one step to the next must not matter."""
    torch.set_num_threads(1)
    accelerator, dtype = strategies.start(timeout_minutes=2), getattr(torch, dtype_name)
    found = {}
    for objective in objectives:
        recipe = recipe_with(objective, without_kinks(objective), *TOWERS, f"optim.microbatch={microbatch or 'null'}")
        trainer = trainer_of(recipe, accelerator)
        trainer.build(EPISODE)
        strategy, model = trainer.strategy, trainer.model
        if objective == TOGETHER:
            smooth(model)
        if dtype != torch.float32:
            strategy.prepare(model.to(dtype), parameter_groups(model, recipe.optim), recipe.optim)
        model.train()
        batches = batches_of(recipe, spool_folder, EPISODE)
        prototypes = drawn_prototypes(recipe, dtype, EPISODE) if recipe.prototypes else None
        if objective in ("prototype", TOGETHER):  # labelled by the features of the batch
            del prototypes.labels["image"], prototypes.labels["text"]
        records = RECORDED if prototypes else frozenset()
        loss = trainer.loss(batches[0], EPISODE, prototypes, records)
        strategy.backward(loss.total)
        strategy.set_learning_rates({"visual": 0.0, "other": 0.0})
        assert strategy.update().taken
        remembered(trainer, loss)
        loss = trainer.loss(batches[1], EPISODE, prototypes, records)
        strategy.backward(loss.total)
        features = {f"features/{name}": collectives.all_gather(loss.features[name].detach()) for name in sorted(records)}
        found[objective] = {"loss": collectives.all_reduce(loss.total) / world, **features, **dict(strategy.gradients()), **remembered(trainer, loss)}
        strategy.release()
    return found


@pytest.fixture(scope="module")
def spool_folder(tmp_path_factory) -> str:
    return fill_spool(tmp_path_factory.mktemp("spool"), recipe_with("clip"), EPISODE)


@pytest.fixture(scope="module")
def whole(spool_folder):
    """By objectives and precision; made when it is first asked for."""
    return functools.cache(lambda objectives, dtype_name: spawn(gradients, 1, spool_folder, dtype_name, None, objectives)[0])


def assert_law(expected: dict, ranks: list[dict], tolerance: float, objectives: tuple[str, ...]) -> None:
    for found in ranks:
        assert found.keys() == expected.keys() == set(objectives)
        for objective, tensors in expected.items():
            assert any("logit_scale" in name for name in tensors)
            assert_rows_were_pushed(objective, tensors, steps=2)
            assert largest_difference(tensors, found[objective]) <= tolerance, objective


def test_on_one_rank_in_fp64(whole, spool_folder):
    assert_law(whole((TOGETHER,), "float64"), spawn(gradients, 1, spool_folder, "float64", 24, (TOGETHER,)), 1e-9, (TOGETHER,))


def test_on_two_ranks_under_ddp(whole, spool_folder):
    assert_law(whole(QUICK, "float32"), spawn(gradients, 2, spool_folder, "float32", 12, QUICK), 1e-5, QUICK)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("objectives", [OBJECTIVES, FURTHER], ids=["objectives", "further"])
def test_alone_on_one_rank_in_fp64(whole, spool_folder, objectives):
    assert_law(whole(objectives, "float64"), spawn(gradients, 1, spool_folder, "float64", 24, objectives), 1e-9, objectives)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_alone_on_two_ranks(whole, spool_folder, strategy):
    assert_law(whole(OBJECTIVES, "float32"), spawn(gradients, 2, spool_folder, "float32", 12, env=environment(strategy, 2)), 1e-5, OBJECTIVES)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_further_objectives_on_two_ranks(whole, spool_folder, strategy):
    assert_law(whole(FURTHER, "float32"), spawn(gradients, 2, spool_folder, "float32", 12, FURTHER, env=environment(strategy, 2)), 1e-5, FURTHER)
