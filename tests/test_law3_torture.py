"""Laws 3 and 4 as torture: one demo training, killed with SIGKILL two dozen times in every phase, under DDP and ZeRO-2, on either rank, and at 2, 1, 2, ... ranks.

Each kill is of the run that went on from the one before, at a named event, in a declared phase; an event that does not come, a rank that does not say whom it
lost, or a place that is not the declared one fails the test. It prints the kills with what became of them.
"""

import contextlib
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from protoclip_scale.engine import checkpoint
from tests.runs import check_epochs, check_equal, check_tensors, history, once, rows_of_final_weights, save_again, tensors_of
from tests.strategies import environment, largest_difference
from tests.support import CORPUS, ROOT, TINY_PROTOTYPES, errors, final_tensors, output, pretrain

PATIENCE = 240  # seconds for the other rank to end by itself
EPISODES, STEPS = 10, 8  # each of 512 rows: 5,120, where an epoch has 4,949
SETTINGS = (
    *TINY_PROTOTYPES,
    # Rounding differs with the number of ranks, and must not grow: no kinks in the tower, no steps in the direction of a gradient that is nothing but rounding.
    "model.image.name=test_convnext",
    "optim.eps=1e-3",
    "optim.ema={decay: 0.9}",
    f"schedule.total={EPISODES} episodes",
    f"data.plan.episode_size={64 * STEPS}",
    f"run.checkpoint_steps={STEPS // 2}",
    "run.keep_checkpoints=0",
    f"evaluation={{every_episodes: 3, sets: [{{name: val, files: {CORPUS}/val-*.parquet, classify: [coarse]}}]}}",
)
STRATEGIES = ("ddp", "zero2")
CHANGING = (2, 1, 1, 2)  # ranks of one attempt after the other, again and again: kills at two ranks alternate between them


@dataclass(frozen=True)
class Kill:
    """``rank`` dies as ``event`` happens for the ``count``-th time in its attempt, while the run is in ``phase``. ``new_disk``: the attempt finds scratch
    empty, as on another machine."""

    phase: str
    event: str
    count: int
    rank: int
    new_disk: bool = False

    @property
    def place(self) -> str:
        return f"{self.event}:{self.count}"


KILLS = (
    Kill("fetch", "fetch.block", 2, 0),
    Kill("train", "train.step", 3, 1),  # nothing was saved yet
    Kill("fetch", "fetch.block", 3, 0, new_disk=True),
    Kill("train", "train.forward", 6, 1),  # inside a step, after the first checkpoint
    Kill("checkpoint", "checkpoint.shard", 1, 0),
    Kill("checkpoint", "checkpoint.written", 1, 1),  # rank 0 publishes all the same
    Kill("extract", "extract.block", 3, 0),
    Kill("cluster", "cluster.iteration", 5, 1),
    Kill("cluster", "cluster.translate", 2, 0),
    Kill("cluster", "cluster.labels", 1, 1),  # found, not yet published
    Kill("train", "train.step", 5, 0),
    Kill("checkpoint", "checkpoint.published", 1, 1),
    Kill("extract", "cluster.iteration", 2, 0),  # the teacher's, beside the extraction
    Kill("extract", "extract.block", 2, 1, new_disk=True),
    Kill("evaluate", "evaluate.start", 1, 0),
    Kill("evaluate", "evaluate.start", 1, 1),
    Kill("train", "fetch.block", 15, 0, new_disk=True),  # after the 12 of this episode: the next one, ahead of time
    Kill("train", "train.forward", 2, 1),
    Kill("checkpoint", "checkpoint.written", 1, 0),  # all files are there, none is published
    Kill("checkpoint", "checkpoint.shard", 1, 1),
    Kill("checkpoint", "checkpoint.published", 1, 0),  # renamed, not yet pointed to
    Kill("cluster", "cluster.labels", 1, 1),
    Kill("checkpoint", "checkpoint.written", 1, 0),  # of the prototypes beside a checkpoint
    Kill("evaluate", "evaluate.start", 2, 1),
)
PHASES = ("fetch", "train", "extract", "cluster", "checkpoint", "evaluate")
# Named events that this training does not come by, and the tests that kill there.
ELSEWHERE = {"checkpoint.copied": "test_engine_checkpoint_runs.py", "records.sealed": "test_law3_refresh.py"}


def test_the_kills_are_those_that_the_law_asks_for():
    assert len(KILLS) >= 20
    assert [kill.rank for kill in KILLS] == [number % 2 for number in range(len(KILLS))]
    phases, places = Counter(kill.phase for kill in KILLS), Counter((kill.event, kill.rank) for kill in KILLS)
    assert phases.keys() == set(PHASES) and min(phases.values()) >= 2
    assert places["checkpoint.written", 0] >= 2, "between the last file and the rename, on the rank that renames"
    assert {CHANGING[number % len(CHANGING)] for number in range(len(KILLS))} == {1, 2}
    two = [kill.rank for number, kill in enumerate(KILLS) if CHANGING[number % len(CHANGING)] == 2]
    assert two == [number % 2 for number in range(len(two))]


def test_the_engine_names_no_other_events():
    named = {name for path in (ROOT / "protoclip_scale/engine").rglob("*.py") for name in re.findall(r'\bevent\("([a-z.]+)"\)', path.read_text())}
    assert named == {kill.event for kill in KILLS} | ELSEWHERE.keys()
    assert all(f'"{name}:' in (ROOT / "tests" / file).read_text() for name, file in ELSEWHERE.items())


def run_once(run_dir: Path, strategy: str, ranks: int, kill_at: str = "") -> list[int]:
    for log in run_dir.parent.glob(f"{run_dir.name}-rank*.log"):
        log.unlink()  # of the attempt before
    return pretrain(run_dir, "demo.yaml", SETTINGS, ranks=ranks, env=environment(strategy, ranks) | {"PROTOCLIP_KILL_AT": kill_at}, patience=PATIENCE)


def die(run_dir: Path, kill: Kill, strategy: str, ranks: int) -> tuple[str, ...]:
    """Run to a kill; its line of the table."""
    if kill.new_disk:
        shutil.rmtree(run_dir / "scratch")
    log = run_dir / "log.txt"
    before = len(log.read_text()) if log.exists() else 0
    rank = kill.rank % ranks
    codes = run_once(run_dir, strategy, ranks, f"{kill.place}@{rank}")
    assert codes[rank] == -9, f"{kill.place} never happened: {codes} {output(run_dir, rank)[-3000:]}"
    told = "-"
    if ranks > 1:
        other = 1 - rank
        lines = errors(run_dir, other)
        assert codes[other] == 1 and len(lines) == 1 and "Traceback" not in output(run_dir, other), output(run_dir, other)[-3000:]
        assert re.match(rf"error: rank {other}: lost rank {rank} on \S+ \(pid \d+\)", lines[0]), lines
        told = re.search(r"lost rank \d", lines[0])[0]
    said = log.read_text()[before:]
    check_place(run_dir, kill, rank, ranks, said)
    resumed = re.search(r"resuming from\s+\S*(step-\d+)", re.sub(r"\s*│\n[^│]*│\s+", "", said))  # lines of a panel put together
    return kill.phase, kill.place, str(ranks), str(rank), " ".join(map(str, codes)), told, resumed[1] if resumed else "the beginning"


def check_place(run_dir: Path, kill: Kill, rank: int, ranks: int, said: str) -> None:
    """The kill was where it was meant to be: by the log, and for checkpoints by what lies there."""
    if kill.phase != "checkpoint":
        begun = re.findall(r"episode \d+/\d+ (\w+) begins", said)
        assert begun and begun[-1] == kill.phase, (kill, begun)
        return
    folder = run_dir / "checkpoints"
    writing = list(folder.glob(".writing-*"))
    newest = checkpoint.list_checkpoints(run_dir)[-1:]
    if kill.event == "checkpoint.published":
        assert newest and not writing
        assert rank or (folder / "latest").read_text().strip() != newest[0].name
    elif not (kill.event == "checkpoint.written" and rank):
        (left,) = writing
        shards = {path.name[:20] for path in left.glob("shard-*")}
        assert f"shard-{rank + 1:05d}-of-{ranks:05d}" in shards and not (left / "manifest.json").exists()
        assert len(shards) == ranks or kill.event == "checkpoint.shard"
        assert not (folder / left.name.partition("-")[2].partition("-")[2]).exists()


def tortured(run_dir: Path, strategy: str, worlds: tuple[int, ...], capsys) -> None:
    """All kills, then to the end."""
    lines = []
    try:
        for number, each in enumerate(KILLS):
            lines.append((str(number + 1), *die(run_dir, each, strategy, worlds[number % len(worlds)])))
    finally:
        with capsys.disabled():
            print(f"\n{strategy}: {len(lines)} kills")
            heads = ("", "phase", "event", "ranks", "killed", "exit codes", "other rank", "had resumed from")
            widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
            for line in (heads, *lines):
                print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    codes = run_once(run_dir, strategy, 2)
    assert codes == [0, 0], output(run_dir)[-3000:]
    assert check_epochs(run_dir).num_rows == 4949
    assert not list((run_dir / "checkpoints").glob(".*")) and not (run_dir / "scratch").exists()


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """The whole run of a strategy at two ranks."""
    found = {}

    def of(strategy: str) -> Path:
        if strategy not in found:
            run_dir = tmp_path_factory.mktemp(strategy) / "run"
            assert run_once(run_dir, strategy, 2) == [0, 0], output(run_dir)[-3000:]
            found[strategy] = run_dir
        return found[strategy]

    return of


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_dozen_kills_leave_no_trace(tmp_path, never_killed, capsys, strategy):
    killed, whole = tmp_path / "run", never_killed(strategy)
    tortured(killed, strategy, (2,), capsys)
    check_equal(killed, whole)
    for kind in ("eval", "episode", "kmeans"):
        assert once(killed, kind) == once(whole, kind) and once(whole, kind), kind
    saved = checkpoint.list_checkpoints(whole)
    assert [path.name for path in checkpoint.list_checkpoints(killed)] == [path.name for path in saved] and len(saved) == 2 * EPISODES
    for folder in (*saved, *(beside for path in saved if (beside := checkpoint.prototypes_folder(path)).exists())):
        check_tensors(tensors_of(killed / "checkpoints" / folder.name), tensors_of(folder))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_dozen_kills_and_other_numbers_of_ranks_leave_rounding(tmp_path, never_killed, capsys, strategy):
    killed, whole = tmp_path / "run", never_killed(strategy)
    tortured(killed, strategy, CHANGING, capsys)
    assert rows_of_final_weights(killed) == rows_of_final_weights(whole)
    check_close(killed, whole)


def check_close(run_dir: Path, expected: Path, step: int | None = None) -> None:
    """Equal to rounding: figures of the steps, final weights, moments and labels; with ``step`` up to its checkpoint."""
    found, wanted = history(run_dir), {number: each for number, each in history(expected).items() if step is None or number <= step}
    assert found.keys() == wanted.keys()
    assert all(found[number]["loss"] == pytest.approx(each["loss"], rel=1e-6) for number, each in wanted.items())
    name = "latest" if step is None else str(step)
    first, second = final_tensors(expected, name), final_tensors(run_dir, name)
    assert first.keys() == second.keys()
    for kind in ("model/.*", "ema/.*", ".*/exp_avg", ".*/exp_avg_sq"):
        one, other = ({name: tensor for name, tensor in each.items() if re.fullmatch(kind, name) and tensor.is_floating_point()} for each in (first, second))
        assert largest_difference(one, other) <= 1e-4, kind
    assert all(torch.equal(first[name], second[name]) for name in first if name.startswith("prototypes/labels/") or name.endswith("/step"))


BREAKS = {
    "none": {},
    "moments that are forgotten": {"change": lambda name, tensor: tensor * 0 if "/exp_avg" in name else tensor},
    "a plan that is one step late": {"step_in_episode": STEPS // 2 - 1},
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumption_that_loses_something_fails_the_laws(tmp_path, never_killed, strategy, broken):
    run_dir, whole = tmp_path / "run", never_killed(strategy)
    assert run_once(run_dir, strategy, 2, f"train.step:{STEPS // 2 + 1}@0")[0] == -9
    save_again(run_dir, **BREAKS[broken])
    assert run_once(run_dir, strategy, 2, "checkpoint.published:1@0")[0] == -9
    for check in (check_equal, check_close):
        with contextlib.nullcontext() if broken == "none" else pytest.raises(AssertionError):
            check(run_dir, whole, STEPS)
