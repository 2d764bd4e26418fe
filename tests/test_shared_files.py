"""Network file systems that show a folder late: nobody but rank 0 looks for what rank 0 makes, and what it has made is waited for."""

import contextlib
import io
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from protoclip_scale import collectives, shared_files
from protoclip_scale.engine import checkpoint, command, shared_folder
from protoclip_scale.engine.checkpoint.pieces import replicated_pieces
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes import recording
from tests.support import RECIPES, TINY_PROTOTYPES, overrides, spawn


def look_for_what_is_not_there_yet(rank: int, world: int, folder: str) -> list[str]:
    """A run with recorded features; what a rank looked for in vain in the run directory, although it is there in the end."""
    run, missed = Path(folder), set()
    for name in ("is_dir", "is_file", "exists", "glob"):
        look = getattr(Path, name)

        def watched(path: Path, *arguments, look=look, **options):
            found = look(path, *arguments, **options)
            if path.is_relative_to(run) and not path.stat_or_none():
                missed.add(path)
            return found

        setattr(Path, name, watched)
    Path.stat_or_none = _stat_or_none
    values = (*TINY_PROTOTYPES, "prototypes.refresh=recorded", "schedule.total=2 episodes", "run.trace_rows=false", "data.plan.episode_size=128")
    with contextlib.redirect_stdout(io.StringIO()):
        assert command.main(["--recipe", str(RECIPES / "demo_protoclip.yaml"), "--run-dir", folder, *overrides(values)]) == 0
    there = [path.relative_to(run) for path in missed - {run} if path.stat_or_none()]
    return sorted(str(path) for path in there if path.parts[0] not in ("scratch", "quarantine") and path.suffix != ".npy")  # those are the rank's own


def _stat_or_none(path: Path):
    try:
        return path.stat()
    except OSError:
        return None


def test_only_rank_0_looks_for_what_is_not_there_yet(tmp_path):
    """A client of NFS that looks remembers for up to a minute that there was nothing, and could not open it afterwards."""
    first, second = spawn(look_for_what_is_not_there_yet, 2, str(tmp_path / "run"))
    assert "checkpoints/step-00000002" in first
    assert second == []


def save_where_folders_come_late(rank: int, world: int, folder: str) -> list[float]:
    """Rank 1 sees the run directory two seconds after rank 0 has made what it writes to, or reads from."""
    dist.init_process_group("gloo")
    run = view = Path(folder) / "run"
    shared_files.LOOK_SECONDS = 0.05
    if rank == 1:
        view = Path(folder) / "view"
        sleep, looks = time.sleep, []

        def sees_it_after_some_looks(seconds: float) -> None:
            sleep(seconds)
            looks.append(seconds)
            if len(looks) % 10 == 0:
                view.symlink_to(run)

        shared_files.time.sleep = sees_it_after_some_looks
    tensors = {"model/a": torch.arange(200_000.0)}
    target = checkpoint.folder_of(view, 1)
    checkpoint.save(target, replicated_pieces(tensors), checkpoint.describe(checkpoint.Cursor(0, "train", 1, 1), samples=0, attempt=1), lambda: None)
    manifest = collectives.from_rank_zero(lambda: checkpoint.read_manifest(target))
    about = (1, 4, 2, 8, {})
    collectives.from_rank_zero(lambda: recording.create(run, *about) and None)
    if rank == 1:
        view.unlink()
    found = checkpoint.Reader(target, manifest).tensor("model/a")
    if rank == 1:
        view.unlink()
    recording.wait_until_created(view, 1)
    recording.create(view, *about)
    return found[-3:].tolist()


def test_what_rank_0_has_made_is_waited_for(tmp_path):
    assert spawn(save_where_folders_come_late, 2, str(tmp_path)) == [[199_997.0, 199_998.0, 199_999.0]] * 2


def test_rank_0_waits_for_nothing_and_others_not_for_ever(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(shared_files.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(shared_files.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with pytest.raises(FileNotFoundError):
        shared_files.wait_for(tmp_path / "nothing")
    assert now == [0.0]
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    with pytest.raises(FileNotFoundError):
        shared_files.wait_for(tmp_path / "nothing")
    assert now[0] > 60
    with pytest.raises(NotADirectoryError):  # not what lateness looks like
        (tmp_path / "file").touch()
        shared_files.wait_for(tmp_path / "file" / "inside")
    assert now[0] < 120


@pytest.mark.parametrize("shown_after", [45.0, None])
def test_a_run_directory_is_looked_for_longer_than_a_network_file_system_remembers(tmp_path, monkeypatch, shown_after):
    """As another host sees it: the attempt that rank 0 has begun appears late, or never."""
    now, claim = [0.0], tmp_path / "attempts" / "0001"

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] == shown_after:
            claim.parent.mkdir()
            claim.write_text("one")

    monkeypatch.setattr(shared_folder.time, "sleep", sleep)
    monkeypatch.setattr(collectives, "from_rank_zero", lambda work: "one")
    if shown_after:
        shared_folder.check_shared(tmp_path, 1)
        assert now[0] == shown_after
        return
    with pytest.raises(UserError, match="is another folder on .* than on rank 0's host: .*acdirmax=60 or less") as error:
        shared_folder.check_shared(tmp_path, 1)
    assert now[0] > 60 and "\n" not in str(error.value)
