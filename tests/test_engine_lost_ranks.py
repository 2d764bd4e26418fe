"""A rank that is killed, fails or hangs: every other rank ends within a bounded time and says which one it was, where it stood, and why."""

import json
import re
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from protoclip_scale import standing
from protoclip_scale.engine import command
from protoclip_scale.engine.fetch import Fetch
from protoclip_scale.engine.watch import heard, watch
from protoclip_scale.engine.watch.heard import Member
from protoclip_scale.report.console import Console
from tests.support import (
    CORPUS,
    ENDED_BY_US,
    RECIPES,
    TINY,
    TINY_PROTOTYPES,
    errors,
    final_tensors,
    metrics,
    output,
    overrides,
    pretrain,
    spawn,
)

EVALUATION = f"evaluation={{every_episodes: 1, sets: [{{name: val, files: {CORPUS}/val-*.parquet, classify: [coarse]}}]}}"

VALUES = (*TINY, "run.checkpoint_steps=2", "run.timeout_minutes=0.2", "run.hang_seconds=3")


def status(run_dir) -> dict:
    return json.loads((run_dir / "status.json").read_text())


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_is_named_by_the_other(tmp_path, rank):
    """Rank 0's death takes the store with it, since these processes have no launcher to keep it."""
    run, other = tmp_path / "run", 1 - rank
    values = (*VALUES, "run.timeout_minutes=5")  # it is not waited for
    codes = pretrain(run, "demo_clip.yaml", values, ranks=2, env={"PROTOCLIP_KILL_AT": f"train.step:3@{rank}"}, patience=120)
    assert codes[rank] == -9 and codes[other] == 1
    (line,) = errors(run, other)
    assert re.search(rf"error: rank {other}: lost rank {rank} on \S+ \(pid \d+\), last heard \d+ s ago in \w+, episode 1, step \d", line), line
    assert "Traceback" not in output(run, other)
    assert (status(run)["state"], status(run)["resumable"]) == ("failed", True) and status(run)["message"] in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "rank"),
    [("fetch.block:1", 0), ("extract.block:2", 0), ("extract.block:2", 1), ("train.forward:2", 0), ("train.forward:2", 1)],  # rank 0 fetches for its machine
)
def test_a_rank_that_fails_ends_the_others_with_its_reason(tmp_path, place, rank):
    run, other = tmp_path / "run", 1 - rank
    values = (*TINY_PROTOTYPES, "run.timeout_minutes=5")
    codes = pretrain(run, "demo_protoclip.yaml", values, ranks=2, env={"PROTOCLIP_RAISE_AT": f"{place}@{rank}"}, patience=120)
    assert codes == [1, 1]
    assert "as PROTOCLIP_RAISE_AT asks for" in output(run, rank) and "Traceback" in output(run, rank)  # a mistake of the program's
    (line,) = errors(run, other)
    assert f"error: rank {other}: rank {rank} on " in line and "failed: RuntimeError: as PROTOCLIP_RAISE_AT asks for" in line
    assert status(run)["message"] == "RuntimeError: as PROTOCLIP_RAISE_AT asks for"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_answer_is_told_of_and_ends_the_job_at_the_timeout(tmp_path, rank):
    run, other = tmp_path / "run", 1 - rank
    codes = pretrain(run, "demo_clip.yaml", VALUES, ranks=2, env={"PROTOCLIP_HANG_AT": f"train.step:3@{rank}"})
    assert codes[rank] == ENDED_BY_US and codes[other] == 1
    (line,) = errors(run, other)
    assert re.search(rf"error: rank {other}: lost rank {rank} on \S+ \(pid \d+\), last heard \d+ s ago", line), line
    told = [line for line in (run / "log.txt").read_text().splitlines() if "no progress for" in line]
    assert told and f"rank {rank} on " in told[-1], told
    assert pretrain(run, "demo_clip.yaml", VALUES, ranks=2) == [0, 0], output(run)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_late_shows_where_it_is(tmp_path, rank):
    """It answers, but its main thread sleeps: it writes its stacks, the other one gives up at the timeout, and the watch ends the late one itself."""
    run, other = tmp_path / "run", 1 - rank
    codes = pretrain(run, "demo_clip.yaml", VALUES, ranks=2, env={"PROTOCLIP_STALL_AT": f"train.step:3@{rank}"}, patience=60)
    assert codes == [1, 1]
    (line,) = errors(run, 0)  # also if it is the late one: what the other one told it
    assert f"other ranks were waited for in vain: rank {rank} on " in line and "is late, working in train, episode 1, step 2 at faults.py:" in line, line
    assert not errors(run, 1)  # one rank of a machine says it for all
    told = [line for line in (run / "log.txt").read_text().splitlines() if "no progress for" in line and "train, episode 1, step 2" in line]
    assert told and f"rank {rank} on " in told[0] and f"rank {other} waits for it at " in told[0]
    assert "train_episode" in (run / f"hangs/rank-{rank:05d}.txt").read_text()


def on_two_machines() -> None:
    """Ranks 2 and 3 seem to be on another machine than ranks 0 and 1, whose processes they do not see."""
    def as_seen(rank: int) -> Member:
        here = heard.this_member(rank)
        return replace(here, host=("h0", "h1")[rank // 2], machine=f"{rank // 2} {here.machine}")

    watch.this_member = as_seen


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_watch_that_ends_a_rank_which_hangs_tells_those_on_other_machines(tmp_path):
    """As under NCCL: no collective fails when rank 3 is killed. Only rank 2 sees that its process is gone; the others would wait for lost_seconds."""
    run, stalled = tmp_path / "run", ",".join(f"train.step:2@{rank}" for rank in range(3))
    values = (*VALUES, "run.timeout_minutes=10", "run.lost_seconds=500")
    codes = pretrain(run, "demo_clip.yaml", values, ranks=4, env={"PROTOCLIP_STALL_AT": stalled, "PROTOCLIP_KILL_AT": "train.step:2@3"}, patience=120, setup=on_two_machines)
    assert codes == [1, 1, 1, -9]
    for rank in (0, 2):
        (line,) = errors(run, rank)
        assert re.search(rf"error: rank {rank}: lost rank 3 on h1 \(pid \d+\), last heard \d+ s ago in (fetch|train), episode 1, step [012]", line), line
    assert status(run)["message"].startswith("lost rank 3 on h1") and status(run)["lost_rank"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_that_says_nothing_is_lost_long_before_a_collective_would_fail(tmp_path):
    run, values = tmp_path / "run", (*VALUES, "run.timeout_minutes=10", "run.lost_seconds=10")
    codes = pretrain(run, "demo_clip.yaml", values, ranks=2, env={"PROTOCLIP_HANG_AT": "train.step:3@1"}, patience=1)
    assert codes == [1, ENDED_BY_US]
    (line,) = errors(run, 0)
    assert re.search(r"error: rank 0: lost rank 1 on \S+ \(pid \d+\), last heard 1\d s ago", line), line


def marks_by_phase(rank: int, world: int, folder: str) -> dict[str, int]:
    """How often a run says in each phase that it got on."""
    found: Counter = Counter()
    got_on = standing.got_on

    def counted() -> None:
        found[standing.HERE.phase] += 1
        got_on()

    standing.got_on = counted
    assert command.main(["--recipe", str(RECIPES / "demo.yaml"), "--run-dir", folder, *overrides((*TINY_PROTOTYPES, EVALUATION))]) == 0
    return dict(found)


def test_every_part_of_a_long_phase_is_progress(tmp_path):
    """12 steps in three episodes, two of which are clustered; a phase that says nothing would be taken for a hang."""
    [marks] = spawn(marks_by_phase, 1, str(tmp_path / "run"))
    iterations = len(metrics(tmp_path / "run", "kmeans"))
    assert marks["train"] >= 2 * 12 and marks["extract"] >= 2 * 4
    assert marks["cluster"] >= iterations > 4 and marks["checkpoint"] >= 2 * 4 and marks["evaluate"] >= 4 * 3


def test_every_block_that_is_waited_for_is_progress():
    marks = []

    def fill(plan, episode, lanes, readers, on_block) -> None:
        for block in range(4):
            before = standing.HERE.marks
            on_block(block + 1, 4)
            while block < 3 and standing.HERE.marks == before:  # the last one ends the wait
                time.sleep(0.001)
            marks.append(standing.HERE.marks)

    run = SimpleNamespace(
        plan=SimpleNamespace(episode=lambda number: SimpleNamespace(number=number)), spool=SimpleNamespace(fill=fill), lanes_of_node=range(4), readers=[],
        stop=SimpleNamespace(agree=lambda: None), console=Console(),
    )  # fmt: skip
    Fetch(run, 0).wait()
    assert len(set(marks[:3])) == 3 and standing.HERE.waits is None


# One signal in each phase, on either rank, and a second one while the first one's checkpoint is saved: launchers send two.
STOPS = (
    "fetch.block:1@0",
    "extract.block:1@1",
    "cluster.iteration:2@0",
    "cluster.translate:1@1",
    "cluster.labels:1@0",
    "train.forward:1@1",
    "train.step:1@0,checkpoint.written:1@0,checkpoint.written:1@1",
    "checkpoint.written:1@1",
    "evaluate.start:1@0,checkpoint.published:1@1",
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_stopped_in_every_phase_equals_one_never_stopped(tmp_path):
    values = (*TINY_PROTOTYPES, "schedule.total=4 episodes", "run.trace_rows=false", EVALUATION)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert pretrain(whole, "demo_protoclip.yaml", values, ranks=2) == [0, 0], output(whole)
    for places in STOPS:
        codes = pretrain(stopped, "demo_protoclip.yaml", values, ranks=2, env={"PROTOCLIP_STOP_AT": places})
        assert codes == [75, 75], f"{places}: {codes} {output(stopped)[-2000:]}"
        assert (status(stopped)["state"], status(stopped)["code"]) == ("stopped", 75)
    assert pretrain(stopped, "demo_protoclip.yaml", values, ranks=2) == [0, 0], output(stopped)
    expected, found = final_tensors(whole), final_tensors(stopped)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.equal(found[name]), name
