"""A full disk, on a real small file system: one line that says where, nothing half-written, and the same command goes on when there is room."""

import json
from pathlib import Path

from protoclip_scale.data.index import index_of, open_readers
from protoclip_scale.data.plan import Plan
from protoclip_scale.data.spool import Spool
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema
from tests.support import CORPUS, TINY, metrics, mount_small_disk, needs_small_disk, output, pretrain, spawn

LANES = 4


def fill_until_full(rank: int, world: int, folder: str) -> list[str]:
    """What a fill says when something else takes the disk's last bytes meanwhile, then the files it left, then whether a second one goes through."""
    disk = Path(folder)
    mount_small_disk(disk, 3 << 20)
    data = schema.Data(root=str(CORPUS), sources=[{"files": "train-*.parquet"}], plan={"episode_size": 1024, "lanes": LANES, "global_batch": 64})
    readers = open_readers(data)
    episode = Plan(index_of(readers), data.plan).episode(0)
    spool, ballast = Spool(disk, "run"), disk / "ballast"

    def take_the_rest(done: int, total: int) -> None:
        if done == total // 2:
            with ballast.open("wb") as file:
                try:
                    while True:
                        file.write(bytes(4096))
                        file.flush()
                except OSError:
                    pass

    said = []
    try:
        spool.fill(episode, 0, range(LANES), readers, take_the_rest)
    except UserError as error:
        said.append(str(error))
    said += sorted(path.name for path in (disk / "episode-000000").iterdir())
    ballast.unlink()
    spool.fill(episode, 0, range(LANES), readers)
    return [*said, str(all(spool.is_complete(episode, lane) for lane in range(LANES)))]


@needs_small_disk
def test_a_disk_that_gets_full_while_writing(tmp_path):
    [(message, *files, complete)] = spawn(fill_until_full, 1, str(tmp_path / "disk"))
    assert message.startswith("disk full while writing the spool at ") and "run.scratch_dir" in message and "\n" not in message
    assert 1 <= len(files) < LANES and all(name.endswith(".arrow") for name in files)
    assert complete == "True"


@needs_small_disk
def test_a_run_ends_with_one_line_and_goes_on_when_there_is_room(tmp_path):
    """Room for one episode of 256 rows, not for the second that is fetched while the first trains."""
    values, disk = (*TINY, f"run.scratch_dir={tmp_path}/disk/scratch"), tmp_path / "disk"
    assert pretrain(tmp_path / "whole", "demo_clip.yaml", TINY) == [0]
    assert pretrain(tmp_path / "run", "demo_clip.yaml", values, small_disk=(disk, 500 << 10)) == [1]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["resumable"] and status["message"].startswith("disk full: the spool needs")
    lines = [line for line in output(tmp_path / "run").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and str(disk) in lines[0] and "Traceback" not in output(tmp_path / "run")
    assert pretrain(tmp_path / "run", "demo_clip.yaml", values) == [0]
    losses = [[line["loss"] for line in metrics(tmp_path / run, "train")] for run in ("whole", "run")]
    assert losses[0] == losses[1] and len(losses[0]) == 12
