"""Run directories on disks that are full, read-only or not shared, as real mounts: one clear line, exit code 1, and nothing lost."""

import contextlib
import errno
import json
from pathlib import Path

import pytest

from protoclip_scale.engine import command
from protoclip_scale.engine.disk import disk_problem
from protoclip_scale.engine.machine import EpisodeMachine
from protoclip_scale.engine.run_log import RunLog
from tests.support import RECIPES, TINY, metrics, mount_small_disk, needs_small_disk, output, overrides, pretrain, remount, spawn

ONE_LONG_EPISODE = ("data.plan.episode_size=1024", "schedule.total=1 episodes", "run.trace_rows=false", "run.weights=false", "run.keep_checkpoints=1")
# What is called when the disk gets full, which time, and where the run stops then. A line of metrics goes into a page that there is already; several do not.
FULL_AT = {
    "checkpoint": (EpisodeMachine, "_publish", 2, ("run.checkpoint_steps=4",), "step-00000008"),
    "metrics": (RunLog, "metrics", 3, (), "metrics.jsonl"),
}


def fill(ballast: Path) -> None:
    """Take all the room that is left on a disk."""
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def trained(rank: int, world: int, folder: str, full_at: str) -> list[str]:
    """A run on a disk that gets full while it trains, and once more when there is room: exit codes, status of the first, losses."""
    disk = Path(folder)
    mount_small_disk(disk, 128 << 20)
    owner, name, number, settings, _ = FULL_AT[full_at]
    original, calls = getattr(owner, name), []

    def filling(*arguments, **keywords):
        calls.append(name)
        if len(calls) == number:
            fill(disk / "ballast")
        return original(*arguments, **keywords)

    setattr(owner, name, filling)
    values = (*TINY, *ONE_LONG_EPISODE, *settings, f"run.scratch_dir={disk.parent}/scratch")
    arguments = ["--recipe", str(RECIPES / "demo_clip.yaml"), "--run-dir", str(disk / "run"), *overrides(values)]
    codes = [command.main(arguments)]
    status = json.loads((disk / "run/status.json").read_text())
    (disk / "ballast").unlink()
    codes.append(command.main(arguments))
    return [*map(str, codes), status["state"], status["message"], *(str(line["loss"]) for line in metrics(disk / "run", "train"))]


@pytest.mark.slow
@needs_small_disk
@pytest.mark.parametrize("full_at", FULL_AT)
def test_a_disk_that_gets_full_while_training(tmp_path, full_at):
    assert pretrain(tmp_path / "whole", "demo_clip.yaml", (*TINY, *ONE_LONG_EPISODE)) == [0]
    [(first, second, state, message, *losses)] = spawn(trained, 1, str(tmp_path / "disk"), full_at)
    assert (first, second, state) == ("1", "0", "failed")
    assert FULL_AT[full_at][-1] in message and ("disk full" in message or "No space left" in message) and "\n" not in message, message
    assert losses == [str(line["loss"]) for line in metrics(tmp_path / "whole", "train")] and len(losses) == 16


def refused(rank: int, world: int, folder: str) -> list[str]:
    """The exit code and the error stream of a run whose folder cannot be written to."""
    import io
    import sys

    disk = Path(folder)
    mount_small_disk(disk, 1 << 20)
    (disk / "run").mkdir()
    remount(disk, read_only=True)
    sys.stderr = io.StringIO()
    code = command.main(["--recipe", str(RECIPES / "demo_clip.yaml"), "--run-dir", str(disk / "run"), *overrides(TINY)])
    return [str(code), sys.stderr.getvalue()]


@needs_small_disk
def test_a_read_only_run_directory(tmp_path):
    [(code, said)] = spawn(refused, 1, str(tmp_path / "disk"))
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == "1" and len(lines) == 1 and "Traceback" not in said
    assert lines[0].startswith(f"error: read-only file system: {tmp_path}/disk/run")


@pytest.mark.slow
@needs_small_disk
def test_a_run_directory_that_is_another_one_for_each_rank(tmp_path):
    codes = pretrain(tmp_path / "run", "demo_clip.yaml", TINY, ranks=2, small_disk=(tmp_path / "run", 32 << 20), patience=20)
    assert codes == [1, 1]
    (line,) = [line for line in output(tmp_path / "run").splitlines() if line.startswith("error: ")]
    assert f"{tmp_path}/run is another folder on " in line and "--run-dir on a file system that all hosts share" in line
    assert output(tmp_path / "run", 1).count("error: ") == 1  # which sees no status.json that says so
    assert "Traceback" not in output(tmp_path / "run") + output(tmp_path / "run", 1)


def test_only_problems_of_the_run_directorys_disk_are_told_as_such(tmp_path):
    def told(number: int, path: Path) -> str | None:
        return disk_problem(OSError(number, "text", str(path)), tmp_path / "run")

    assert told(errno.ENOSPC, tmp_path / "run/trace/rows").startswith(f"disk full: {tmp_path}/run/trace/rows could not be written")
    assert told(errno.EDQUOT, Path("/elsewhere/scratch")).startswith("disk quota exceeded: /elsewhere/scratch")
    assert told(errno.EROFS, tmp_path).startswith("read-only file system")  # its parent
    assert told(errno.EACCES, Path("/data/shard.tar")) is None and told(errno.ENOENT, tmp_path / "run/x") is None
    assert disk_problem(ValueError("disk full"), tmp_path) is None

    class SafetensorError(Exception):
        pass

    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert disk_problem(error, tmp_path / "run").startswith(f"disk full: {tmp_path}/run could not be written")
