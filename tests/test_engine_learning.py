"""The warning that nothing is learnt: at the loss of guessing, once in the life of a run."""

import json
import math

import pytest

from protoclip_scale.engine.learning import LearningWatch
from protoclip_scale.engine.run_log import RunLog
from tests.support import TINY, metrics, pretrain

BATCH = 64


def watched(folder, losses: dict[int, float | dict[str, float]], from_step: int = 10) -> list[str]:
    """What is told of logged steps in one attempt."""
    told: list[str] = []
    watch = LearningWatch(RunLog(folder, 1, is_main=True), told.append, from_step, BATCH)
    for step, loss in losses.items():
        watch.look(step, step * BATCH, loss if isinstance(loss, dict) else {"clip": loss})
    return told


@pytest.mark.parametrize("loss", [0.991 * math.log(BATCH), math.log(BATCH), 40.0])
def test_a_loss_of_guessing_is_told_once_with_its_causes(tmp_path, loss):
    told = watched(tmp_path, {5: loss, 10: loss, 15: loss})
    assert len(told) == 1 and "at step 10" in told[0] and "ln 64 = 4.159" in told[0] and "optim.lr" in told[0] and "captions" in told[0]
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["kind"], line["step"], line["warning"], line["losses"]) == ("warning", 10, "nothing_learnt", {"clip": loss})
    assert watched(tmp_path, {20: loss}) == []  # a run that goes on has said it


def test_nothing_is_told_of_a_run_that_learns_by_one_loss_or_finds_no_partners(tmp_path):
    guessing = math.log(BATCH)
    assert watched(tmp_path, {10: 0.98 * guessing, 20: {}, 30: float("nan"), 40: {"multiview": guessing, "filip": 0.9 * guessing}}) == []
    assert watched(tmp_path, {10: math.log(BATCH)}, from_step=0) == []


@pytest.mark.parametrize("losses", ["{clip: {}}", "{filip: {dim: 8, keep: 1}}"])
def test_a_run_that_cannot_learn_says_so(tmp_path, losses):
    """Its learning rate is next to nothing."""
    values = (*TINY, f"objectives={losses}", "optim.lr=1e-12", "run.learning_watch_steps=5", "schedule.final_lr=0")
    assert pretrain(tmp_path / "run", "demo_clip.yaml", values) == [0]
    assert [line["step"] for line in metrics(tmp_path / "run", "warning")] == [5]
    assert (tmp_path / "run/log.txt").read_text().count("nothing is learnt") == 1
    assert (tmp_path / "run-rank0.log").read_text().count("nothing is learnt") == 1
