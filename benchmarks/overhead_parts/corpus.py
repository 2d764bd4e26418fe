"""The rows that are trained on and the four held-out sets, made once in the work folder.

Held out of the train corpus are all rows of three sources, whatever their split; the fourth set is the demo corpus's Twemoji. No vendor of a held-out set
drew anything that is trained on, and two of the sets are of another kind than most training pictures, with captions of which 70-77% are never trained on:

    twemoji      1,914 emoji, three in four of a concept that other vendors' emoji are trained with (flags left out, as in fxemoji: they look alike for all)
    fxemoji        593 emoji in another style
    healthicons    742 silhouettes: medicine, people, devices
    temaki         557 map signs
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protoclip_scale.errors import UserError

HELD_OUT_SOURCES = ("fxemoji", "healthicons", "temaki")
COLUMNS = ("image", "caption", "coarse")
SHARD_ROWS, GROUP_ROWS = 8192, 512


@dataclass(frozen=True)
class Corpus:
    """Where the prepared files lie: ``train-*.parquet`` and one file for each held-out set."""

    folder: Path
    sets: tuple[str, ...] = ("twemoji", *HELD_OUT_SOURCES)

    def held_out(self) -> list[dict]:
        """``evaluation.sets`` of a recipe."""
        return [{"name": name, "files": f"{name}.parquet", "exclude": {"coarse": ["flag"]}} for name in self.sets]


def prepare(corpus: Path, demo: Path, folder: Path) -> Corpus:
    """Writes the files unless they are there. UserError for files that are missing or are not these corpora."""
    prepared = Corpus(folder)
    if (folder / "done").exists():
        return prepared
    folder.mkdir(parents=True, exist_ok=True)
    table = _read([corpus], "--corpus", (*COLUMNS, "source", "split"))
    held_out = pc.is_in(table["source"], pa.array(HELD_OUT_SOURCES))
    for source in HELD_OUT_SOURCES:
        _write(table.filter(pc.equal(table["source"], source)), folder / f"{source}.parquet", f"{corpus} has no rows of source {source}")
    train = table.filter(pc.and_(pc.invert(held_out), pc.equal(table["split"], "train")))
    for number, first in enumerate(range(0, len(train), SHARD_ROWS)):
        _write(train.slice(first, SHARD_ROWS), folder / f"train-{number:05d}.parquet", "")
    files = sorted(demo.glob("eval_*.parquet")) if demo.is_dir() else [demo]
    twemoji = _read(files, "--demo", (*COLUMNS, "source"))
    _write(twemoji.filter(pc.equal(twemoji["source"], "twemoji")), folder / "twemoji.parquet", f"{demo} has no rows of source twemoji")
    (folder / "done").touch()
    return prepared


def _read(files: list[Path], argument: str, columns: tuple[str, ...]) -> pa.Table:
    try:
        tables = [pq.read_table(file, columns=list(columns)) for file in files]
        return pa.concat_tables(table.select(columns) for table in tables)
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{argument}: cannot read {', '.join(map(str, files)) or 'any eval_*.parquet'} with columns {', '.join(columns)} ({reason}); name the corpus") from error


def _write(table: pa.Table, path: Path, problem: str) -> None:
    if not len(table):
        raise UserError(f"{problem}; name another file")
    pq.write_table(table.select(COLUMNS), path, row_group_size=GROUP_ROWS)
