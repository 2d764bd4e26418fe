"""Law 4 (with law 3) in real runs: kills at named events, broken pictures, other numbers of ranks and workers, all together."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.runs import check_epochs
from tests.support import CORPUS, TINY, TINY_PROTOTYPES, output, pretrain

SHARDS = (40, 0, 1, 3, 150, 2, 1, 1, 70, 2, 1)  # rows of the files: fewer with rows to speak of than ranks, an empty one, many tiny
LAW = (
    "data.sources=[{name: uneven, files: '*.parquet'}]",
    "data.plan={seed: 3, episode_size: 96, lanes: 4, global_batch: 32}",
    "data.max_bad_fraction=0.3",
    "schedule.total=6 episodes",  # 576 rows: two epochs of 271 and more
    "run.checkpoint_steps=2",
)


@pytest.fixture(scope="module")
def uneven_corpus(tmp_path_factory) -> tuple[Path, set[int]]:
    """(folder of parquet shards with every 13th picture broken, the numbers of the broken rows): rows of the demo corpus."""
    folder = tmp_path_factory.mktemp("uneven")
    rows = pq.read_table(CORPUS / "train-00000-of-00010.parquet", columns=["image", "caption"]).slice(0, sum(SHARDS))
    images = [image["bytes"] for image in rows["image"].to_pylist()]
    bad = set(range(5, len(images), 13))
    for number in bad:
        images[number] = (b"", None, b"not an image", images[number][:200])[number % 4]
    start = 0
    for number, count in enumerate(SHARDS):
        here = slice(start, start + count)
        table = pa.table({"image": pa.array([{"bytes": image} for image in images[here]], pa.struct([("bytes", pa.binary())])), "caption": rows["caption"][here]})
        pq.write_table(table, folder / f"shard-{number:02d}.parquet", row_group_size=30)
        start += count
    return folder, bad


@dataclass
class Attempt:
    ranks: int
    workers: int
    kill_at: str = ""  # event:count@rank; to the end without


def run_attempts(run_dir: Path, recipe: str, settings: tuple[str, ...], attempts: list[Attempt]) -> None:
    for attempt in attempts:
        values = (*settings, f"data.workers={attempt.workers}")
        codes = pretrain(run_dir, recipe, values, ranks=attempt.ranks, env={"PROTOCLIP_KILL_AT": attempt.kill_at})
        event, _, on_rank = attempt.kill_at.partition("@")
        if event:
            assert codes[int(on_rank or 0)] == -9, f"{event} never fired: {codes} {output(run_dir, int(on_rank or 0))[-2000:]}"
        else:
            assert codes == [0] * attempt.ranks, output(run_dir)


FAST = [Attempt(2, 0, "train.forward:6@1"), Attempt(1, 1, "fetch.block:9"), Attempt(2, 0)]
SLOW = {
    "four, one, two": [Attempt(4, 0, "train.step:5@2"), Attempt(1, 3, "checkpoint.published:2"), Attempt(2, 1, "train.forward:3@1"), Attempt(4, 1)],
    "one all the time": [Attempt(1, 3, "checkpoint.written:2"), Attempt(1, 0, "fetch.block:12"), Attempt(1, 1, "train.step:4"), Attempt(1, 3)],
    "two, four": [Attempt(2, 3, "checkpoint.written:3@1"), Attempt(4, 3, "fetch.block:4"), Attempt(4, 0)],
}


@pytest.mark.parametrize("attempts", [pytest.param(FAST, id="two, one, two"), *(pytest.param(each, id=name, marks=pytest.mark.slow) for name, each in SLOW.items())])
def test_kills_bad_rows_and_other_numbers_of_ranks_together(tmp_path, uneven_corpus, attempts):
    folder, bad = uneven_corpus
    run_attempts(tmp_path / "run", "demo_clip.yaml", (*TINY, *LAW, f"data.root={folder}"), attempts)
    assert check_epochs(tmp_path / "run", bad).num_rows == sum(SHARDS)


@pytest.mark.slow
def test_kills_and_bad_rows_in_extraction_and_clustering(tmp_path, uneven_corpus):
    folder, bad = uneven_corpus
    attempts = [Attempt(2, 1, "extract.block:2@1"), Attempt(4, 1, "cluster.iteration:3@3"), Attempt(1, 3, "train.step:5"), Attempt(2, 3, "extract.block:1"), Attempt(2, 0)]
    run_attempts(tmp_path / "run", "demo_protoclip.yaml", (*TINY_PROTOTYPES, *LAW, f"data.root={folder}"), attempts)
    assert check_epochs(tmp_path / "run", bad).num_rows == sum(SHARDS)
