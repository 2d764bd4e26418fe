"""A loss or a gradient that is not finite on one rank alone: all ranks skip the step, and say so in metrics.jsonl; too many in a row end the run on all."""

import dataclasses
import json
from pathlib import Path

import pytest

from protoclip_scale.engine import command
from protoclip_scale.engine.trainer import Loss, Trainer
from tests.support import RECIPES, TINY, final_tensors, metrics, overrides, spawn

VALUES = (*TINY, "optim.nonfinite_skips=2", "schedule.total=2 episodes")  # 8 steps


def spoiled(loss: Loss, what: str) -> Loss:
    if what == "gradient":
        loss.total.register_hook(lambda gradient: gradient * float("inf"))
        return loss
    return dataclasses.replace(loss, total=loss.total * float("nan") if what == "loss" else loss.total + float("inf"))  # gradients are finite then


def trained(rank: int, world: int, folder: str, what: str, first: int, last: int) -> int:
    """The exit code of a run whose steps ``first`` to ``last`` are spoiled on rank 1."""
    original, calls = Trainer.loss, []

    def loss(self, *arguments):
        calls.append(None)
        found = original(self, *arguments)
        return spoiled(found, what) if rank == 1 and first <= len(calls) <= last else found

    Trainer.loss = loss
    return command.main(["--recipe", str(RECIPES / "demo_clip.yaml"), "--run-dir", folder, *overrides(VALUES)])


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
