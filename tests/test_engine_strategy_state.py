"""One named state for every strategy: training goes on from a checkpoint under another number of ranks and another strategy as if nothing had happened."""

from pathlib import Path

import pytest
import torch

from protoclip_scale import collectives
from protoclip_scale.engine import checkpoint
from protoclip_scale.engine import strategy as strategies
from tests.strategies import batches_of, drawn_prototypes, environment, fill_spool, recipe_with, saved, trainer_of, weights
from tests.support import spawn

EPISODE = 1
SETTINGS = ("model.image.name=test_convnext", "optim.precision=fp32", "optim.eps=1e-3", "optim.max_norm=1.0", "optim.weight_decay=0.5")


def leg(rank: int, world: int, spool_folder: str, folder: str, first: int, last: int) -> dict:
    """Steps [first, last) of the prototype objective, from ``step-FIRST`` (0: from nothing) to ``step-LAST`` in ``folder``; losses, and the end's weights."""
    torch.set_num_threads(1)
    accelerator = strategies.start(timeout_minutes=2)
    recipe = recipe_with("prototype", *SETTINGS)
    trainer = trainer_of(recipe, accelerator)
    begin = Path(folder) / f"step-{first}"
    reader = checkpoint.Reader(begin, checkpoint.facts(begin)) if first else None
    trainer.build(EPISODE, reader)
    if reader:
        again = saved(trainer, Path(folder) / f"again-{first}-{world}")
        assert sorted(again.names()) == sorted(reader.names())
        assert all(torch.equal(again.tensor(name), reader.tensor(name)) for name in reader.names())
    trainer.model.train()
    losses, batches = [], batches_of(recipe, spool_folder, EPISODE)
    for step in range(first, last):
        loss = trainer.loss(batches[step % len(batches)], EPISODE, drawn_prototypes(recipe, torch.float32, EPISODE))
        losses.append((collectives.all_reduce(loss.total) / world).item())
        assert trainer.step(loss, step).taken
    reader = saved(trainer, Path(folder) / f"step-{last}")
    counted = {reader.tensor(name).item() for name in reader.names("optimizer/") if name.endswith("/step")}
    assert counted == {float(last)}
    assert sum(name.endswith("/exp_avg") for name in reader.names()) == sum(name.endswith("/step") for name in reader.names()) == len(trainer.trained)
    return {"losses": losses, "weights": weights(trainer)}


def walk(spool_folder: str, folder: Path, *legs: tuple[str, int, int]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """All losses and the last weights of (strategy, ranks, steps) after one another."""
    folder.mkdir()
    losses, step = [], 0
    for strategy, ranks, steps in legs:
        found = spawn(leg, ranks, spool_folder, str(folder), step, step + steps, env=environment(strategy, ranks))[0]
        losses += found["losses"]
        step += steps
    return losses, found["weights"]


@pytest.fixture(scope="module")
def spool_folder(tmp_path_factory) -> str:
    return fill_spool(tmp_path_factory.mktemp("spool"), recipe_with("clip"), EPISODE)


@pytest.fixture(scope="module")
def one_process(spool_folder, tmp_path_factory):
    return walk(spool_folder, tmp_path_factory.mktemp("one") / "run", ("ddp", 1, 4))


def assert_same(one_process, found) -> None:
    assert found[0] == pytest.approx(one_process[0], rel=2e-5)
    for name, tensor in one_process[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_zero2_then_one_process_then_ddp(one_process, spool_folder, tmp_path):
    assert_same(one_process, walk(spool_folder, tmp_path / "run", ("zero2", 2, 2), ("ddp", 1, 1), ("ddp", 4, 1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "legs",
    [
        [("zero2", 2, 2), ("ddp", 1, 1), ("zero3", 4, 1)],
        [("zero3", 2, 2), ("zero3", 1, 1), ("zero3", 4, 1)],
        [("zero1", 4, 1), ("zero2", 1, 2), ("zero1", 2, 1)],
        [("ddp", 2, 1), ("zero3", 2, 1), ("zero2", 4, 2)],
        [("fsdp2", 2, 1), ("zero2", 1, 1), ("fsdp2", 4, 2)],
    ],
    ids=lambda legs: ", ".join(f"{strategy} on {ranks}" for strategy, ranks, _ in legs),
)
def test_any_strategy_on_any_number_of_ranks(one_process, spool_folder, tmp_path, legs):
    assert_same(one_process, walk(spool_folder, tmp_path / "run", *legs))
