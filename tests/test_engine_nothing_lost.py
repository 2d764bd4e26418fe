"""What may befall a run in two processes between its attempts and while it saves, under DDP and ZeRO-2: damaged checkpoints, a rank's missing file, another
recipe, a disk that is full or read-only. One line, exit code 1, and nothing lost: once the cause is gone the run ends as if it had never been."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from protoclip_scale.engine import checkpoint
from protoclip_scale.engine.machine import EpisodeMachine
from tests.runs import check_equal
from tests.strategies import environment
from tests.support import TINY, errors, mount_small_disk, needs_small_disk, output, pretrain, remount, spawn
from tests.test_engine_bad_disks import fill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SETTINGS = (*TINY, "data.plan.episode_size=512", "schedule.total=1 episodes", "run.checkpoint_steps=2", "run.keep_checkpoints=0")
SHARD = "shard-00002-of-00002-part-0001.safetensors"  # of the second rank
OF_AN_ATTEMPT = ("attempts", "log.txt", "status.json")  # what every start writes, a refused one too


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": (truncate, f"{SHARD} has "),
    "bit-flipped": (flip, f"{SHARD} was changed or damaged (sha256 differs)"),
    "missing rank file": (Path.unlink, f"{SHARD} is missing"),
}


def attempt(run_dir: Path, strategy: str, *arguments: str, values: tuple[str, ...] = (), **env: str) -> list[int]:
    for log in run_dir.parent.glob(f"{run_dir.name}-rank*.log"):
        log.unlink()
    return pretrain(run_dir, "demo_clip.yaml", (*SETTINGS, *values), *arguments, ranks=2, env=environment(strategy, 2) | env, patience=240)


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files but those that every start writes."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name.parts[0] not in OF_AN_ATTEMPT}


def refused(run_dir: Path, strategy: str, *arguments: str, values: tuple[str, ...] = ()) -> str:
    """The line of an attempt that must change nothing."""
    before = contents(run_dir)
    assert attempt(run_dir, strategy, *arguments, values=values) == [1, 1], output(run_dir)
    assert contents(run_dir) == before
    return the_line(run_dir)


def the_line(run_dir: Path) -> str:
    said = output(run_dir) + output(run_dir, 1)
    assert "Traceback" not in said and errors(run_dir, 1) == [], said
    (line,) = errors(run_dir)
    return line


def ends_as_if_never_disturbed(run_dir: Path, strategy: str, whole: Path) -> None:
    assert attempt(run_dir, strategy) == [0, 0], output(run_dir)
    check_equal(run_dir, whole)


@pytest.fixture(scope="module", params=["ddp", "zero2"])
def runs(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """(strategy, a whole run of 8 steps, one that was killed after 7)."""
    folder, strategy = tmp_path_factory.mktemp(request.param), request.param
    whole, stopped = folder / "whole", folder / "stopped"
    assert attempt(whole, strategy) == [0, 0], output(whole)
    assert attempt(stopped, strategy, PROTOCLIP_KILL_AT="train.step:7@1") == [1, -9], output(stopped)
    assert [path.name for path in checkpoint.list_checkpoints(stopped)] == ["step-00000002", "step-00000004", "step-00000006"]
    return strategy, whole, stopped


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(tmp_path, runs, damage):
    (strategy, whole, stopped), run_dir, (harm, said) = runs, tmp_path / "run", DAMAGES[damage]
    shutil.copytree(stopped, run_dir)
    harm(run_dir / "checkpoints/step-00000006" / SHARD)
    line = refused(run_dir, strategy, "--resume", "6")
    assert "step-00000006" in line and said in line
    for step in (2, 4):
        harm(checkpoint.folder_of(run_dir, step) / SHARD)
    line = refused(run_dir, strategy)
    assert "step-0000000" in line and said in line
    for step in (2, 4):
        shutil.copy(checkpoint.folder_of(stopped, step) / SHARD, checkpoint.folder_of(run_dir, step))
    ends_as_if_never_disturbed(run_dir, strategy, whole)  # from the newest sound one
    (warning,) = [line for line in (run_dir / "log.txt").read_text().splitlines() if "warning: checkpoint" in line]
    assert "step-00000006" in warning and said in warning
    assert checkpoint.find(run_dir, "6")[2] == [], "a sound one has taken its place"


def test_another_recipe_and_another_run_directory(tmp_path, runs):
    (strategy, whole, stopped), run_dir = runs, tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    line = refused(run_dir, strategy, values=("optim.lr=0.5",))
    assert "was trained with another recipe" in line and "optim.lr" in line and "0.5" in line
    assert "--resume is never" in refused(run_dir, strategy, "--resume", "never")
    ends_as_if_never_disturbed(run_dir, strategy, whole)


def on_a_disk_of_its_own(rank: int, world: int, folder: str, *about: str) -> list[str]:
    """The killed run on a disk that is read-only, then gets full while the next checkpoint is saved, then has room: the lines."""
    run_dir, strategy, whole, stopped = Path(folder), about[0], Path(about[1]), Path(about[2])
    mount_small_disk(run_dir, 256 << 20)
    shutil.copytree(stopped, run_dir, dirs_exist_ok=True)
    remount(run_dir, read_only=True)
    lines = [refused(run_dir, strategy)]
    remount(run_dir, read_only=False)
    publish, saved = EpisodeMachine._publish, contents(run_dir / "checkpoints")
    EpisodeMachine._publish = when_full(publish, run_dir / "ballast")
    assert attempt(run_dir, strategy) == [1, 1], output(run_dir)
    lines.append(the_line(run_dir))
    (run_dir / "ballast").unlink()
    assert contents(run_dir / "checkpoints") == saved, "the half-written one is gone, the others are whole"
    EpisodeMachine._publish = publish
    ends_as_if_never_disturbed(run_dir, strategy, whole)
    return lines


def when_full(publish: Callable, ballast: Path) -> Callable:
    """``publish`` with the disk full."""

    def full(machine: EpisodeMachine, *arguments, **more):
        if machine.run.log.is_main:
            fill(ballast)
        return publish(machine, *arguments, **more)

    return full


@needs_small_disk
def test_a_disk_that_is_read_only_or_full(tmp_path, runs):
    strategy, whole, stopped = runs
    [(read_only, full)] = spawn(on_a_disk_of_its_own, 1, str(tmp_path / "run"), strategy, str(whole), str(stopped))
    assert read_only.startswith(f"error: read-only file system: {tmp_path}/run") and "start the same command again" in read_only
    assert full.startswith("error: checkpoint step-00000008: rank ") and "disk full" in full and "make room" in full
