"""A loss or a gradient that is not finite on one rank alone: all ranks skip the step, and say so in metrics.jsonl; too many in a row end the run on all."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from protoclip_scale.data.rows import pack_row_ids
from protoclip_scale.engine import command
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.nonfinite import NonFiniteSteps
from protoclip_scale.engine.trainer import Loss, Trainer
from protoclip_scale.errors import UserError
from tests.support import RECIPES, TINY, final_tensors, metrics, overrides, spawn

VALUES = (*TINY, "optim.nonfinite_skips=2", "schedule.total=2 episodes")  # 8 steps


def spoiled(loss: Loss, what: str) -> Loss:
    if what == "gradient":
        loss.total.register_hook(lambda gradient: gradient * float("inf"))
        return loss
    return dataclasses.replace(loss, total=loss.total * float("nan") if what == "loss" else loss.total + float("inf"))  # gradients are finite then


def trained(rank: int, world: int, folder: str, what: str, first: int, last: int, *more: str) -> int:
    """The exit code of a run whose steps ``first`` to ``last`` are spoiled on the last rank."""
    original, calls = Trainer.loss, []

    def loss(self, *arguments):
        calls.append(None)
        found = original(self, *arguments)
        return spoiled(found, what) if rank == world - 1 and first <= len(calls) <= last else found

    Trainer.loss = loss
    return command.main(["--recipe", str(RECIPES / "demo_clip.yaml"), "--run-dir", folder, *overrides((*VALUES, *more))])


@pytest.mark.parametrize("what", ["loss", pytest.param("gradient", marks=pytest.mark.slow), pytest.param("constant", marks=pytest.mark.slow)])
def test_all_ranks_skip_what_one_of_them_cannot_take(tmp_path, what):
    run = tmp_path / "run"
    assert spawn(trained, 2, str(run), what, 3, 4) == [0, 0]
    lines = metrics(run, "train")
    assert [line.get("skipped_steps") for line in lines] == [None, None, 1, 2, 2, 2, 2, 2]
    tensors = final_tensors(run)
    assert all(tensor.isfinite().all() for name, tensor in tensors.items() if tensor.is_floating_point()), "a step was taken"
    steps = {float(tensor) for name, tensor in tensors.items() if name.endswith("/step")}
    assert steps == {6.0}


@pytest.mark.slow
def test_too_many_end_the_run_on_all_ranks(tmp_path):
    run = tmp_path / "run"
    assert spawn(trained, 2, str(run), "loss", 3, 8) == [1, 1]
    status = json.loads((run / "status.json").read_text())
    assert "not finite in 3 steps in a row, the last of them step 4" in status["message"] and "source/block/row" in status["message"]
    assert Path(run / "checkpoints").is_dir() and len(metrics(run, "train")) == 4


def told(rank: int, world: int, spoiled_ranks: tuple[int, ...]) -> str:
    strategies.start(timeout_minutes=1)
    batch = SimpleNamespace(row_ids=pack_row_ids([rank] * 5, [1] * 5, range(5)))
    with pytest.raises(UserError) as error:
        NonFiniteSteps(0, scales_loss=False).skipped(batch, 7, torch.tensor(float("nan") if rank in spoiled_ranks else 1.0))
    return str(error.value)


@pytest.mark.parametrize(("spoiled_ranks", "named"), [((1,), "1/1/0, 1/1/1, 1/1/2, 1/1/3, 1/1/4, ..."), ((), "0/1/0, 1/1/0, 0/1/1, 1/1/1, 0/1/2, 1/1/2, 0/1/3, 1/1/3, ...")])
def test_the_line_names_rows_of_the_ranks_whose_loss_it_was(spoiled_ranks, named):
    assert all(line.endswith(f"(source/block/row): {named}") for line in spawn(told, 2, spoiled_ranks))


def test_skipped_steps_count_on_after_a_stop(tmp_path):
    run = str(tmp_path / "run")
    assert spawn(trained, 1, run, "loss", 3, 4, "run.checkpoint_steps=1", env={"PROTOCLIP_STOP_AT": "train.step:5"}) == [75]
    assert spawn(trained, 1, run, "loss", 0, 0, "run.checkpoint_steps=1") == [0]
    assert [line.get("skipped_steps") for line in metrics(Path(run), "train")] == [None, None, 1, 2, 2, 2, 2, 2]
