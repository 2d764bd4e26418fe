"""What the tests of remote data share: a short run over some shards of the demo corpus, and what it must equal wherever they lie."""

import json
from pathlib import Path

import torch

from protoclip_scale.recipe import schema
from tests.runs import history, rows_of_final_weights
from tests.support import CORPUS, TINY, final_tensors, output, pretrain

PATTERN = "train-0000[01]-*.parquet"
RECIPE = "demo_clip.yaml"
SETTINGS = (*TINY, f"data.sources=[{{name: demo, files: '{PATTERN}'}}]", "schedule.total=3 episodes")


def settings(root: str | Path, retry_seconds: float = 60) -> tuple[str, ...]:
    return (*SETTINGS, f"data.root={root}", f"data.retry_seconds={retry_seconds}")


def data(root: str | Path, files: str = PATTERN, retry_seconds: float = 60) -> schema.Data:
    """The data section of such a run."""
    plan = {"episode_size": 256, "lanes": 4, "global_batch": 64}
    return schema.Data(root=str(root), sources=[{"files": files}], plan=plan, retry_seconds=retry_seconds)


def local_run(folder: Path) -> Path:
    """A run over the files themselves."""
    assert pretrain(folder / "local", RECIPE, settings(CORPUS)) == [0], output(folder / "local")
    return folder / "local"


def check_equal(run_dir: Path, expected: Path) -> None:
    """The same rows in every step, the same losses, bit-equal weights."""
    rows = rows_of_final_weights(run_dir)
    assert rows == rows_of_final_weights(expected) and len(rows) == 12
    assert history(run_dir) == history(expected)
    found, wanted = final_tensors(run_dir), final_tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name


def check_told(run_dir: Path, *words: str) -> None:
    """The run has failed with one line that holds the words, and says that it can be resumed."""
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["code"], status["resumable"]) == ("failed", 1, True)
    last = output(run_dir).splitlines()[-1]
    assert last == f"error: {status['message']}"
    for word in words:
        assert word in last, last
    assert "Traceback" not in output(run_dir)
