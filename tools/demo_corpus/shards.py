"""Write the rows of the corpus as parquet shards with small row groups, in an order that depends on the rows alone."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protoclip_scale.errors import UserError

SPLITS = ("train", "val", "eval_seen_concept", "eval_unseen_concept")
NUM_SHARDS = {"train": 10, "val": 1, "eval_seen_concept": 2, "eval_unseen_concept": 1}
ROW_GROUP_ROWS = 64
SHUFFLE_SEED = 0

SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("caption", pa.list_(pa.string())),
        ("label", pa.string()),
        ("source", pa.string()),
        ("coarse", pa.string()),
        ("concept", pa.string()),
        ("style", pa.string()),
        ("license", pa.string()),
    ]
)

TEXT_COLUMNS = ["image.path", "caption.list.element", "label", "source", "coarse", "concept", "style", "license"]


def read_single_file(path: Path) -> dict[str, pa.Table]:
    """The rows of one parquet file by the value of its `split` column; every table has the columns of `SCHEMA`.

    Raises UserError when the file is missing, is not parquet, or lacks a column or a split.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a parquet file with a `split` column, or use --from-packages")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from error
    missing = [name for name in (*SCHEMA.names, "split") if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    by_split = {split: table.filter(pc.equal(table["split"], split)) for split in SPLITS}
    for split, rows in by_split.items():
        if rows.num_rows == 0:
            raise UserError(f"{path}: no rows with split == {split}; the corpus needs all of {', '.join(SPLITS)}")
    return {split: rows.select(SCHEMA.names).cast(SCHEMA) for split, rows in by_split.items()}


def shuffle(table: pa.Table) -> pa.Table:
    """Rows ordered by a keyed hash of `image.path`: the sources are mixed, and the order of the input does not matter.

    Paths identify rows; UserError if two rows share one.
    """
    paths = pc.struct_field(table["image"], "path").to_pylist()
    if len(set(paths)) != len(paths):
        raise UserError("two rows have the same image.path; the paths identify rows and must differ")
    keys = [hashlib.sha256(f"{SHUFFLE_SEED}/{path}".encode()).digest() for path in paths]
    return table.take(sorted(range(len(keys)), key=keys.__getitem__))


def shard_row_counts(num_rows: int, num_shards: int) -> list[int]:
    """Rows per shard: whole row groups dealt as evenly as possible, so that only the very last row group is short."""
    num_groups = -(-num_rows // ROW_GROUP_ROWS)
    if num_groups < num_shards:
        raise UserError(f"{num_rows} rows make {num_groups} row groups of {ROW_GROUP_ROWS}, too few for {num_shards} shards")
    groups = [num_groups // num_shards + (shard < num_groups % num_shards) for shard in range(num_shards)]
    counts = [number * ROW_GROUP_ROWS for number in groups]
    counts[-1] -= num_groups * ROW_GROUP_ROWS - num_rows
    return counts


def write_shards(by_split: dict[str, pa.Table], folder: Path) -> list[Path]:
    """Write `SPLIT-0000i-of-0000n.parquet` for every split into `folder`, replacing all shards that were there.

    The images are compressed already and their minimum and maximum tell nothing: only the text columns get zstd and statistics.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        for stale in folder.glob(f"{split}-*-of-*.parquet"):
            stale.unlink()
    written = []
    for split, table in by_split.items():
        table = shuffle(table).combine_chunks()
        start = 0
        counts = shard_row_counts(table.num_rows, NUM_SHARDS[split])
        for shard, count in enumerate(counts):
            path = folder / f"{split}-{shard:05d}-of-{len(counts):05d}.parquet"
            pq.write_table(
                table.slice(start, count),
                path,
                row_group_size=ROW_GROUP_ROWS,
                compression={"image.bytes": "none"} | dict.fromkeys(TEXT_COLUMNS, "zstd"),
                use_dictionary=["label", "source", "coarse", "style", "license"],
                write_statistics=TEXT_COLUMNS,
            )
            written.append(path)
            start += count
    return written
