"""A task's rows, from a folder, the web or the Hub, into parquet shards under DATA/TASK; a killed preparation goes on with the first shard that is not there."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from protoclip_scale.data.decode import BadImage, Limits, problem_of
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.labels import Labels, open_source
from protoclip_scale.evaluation.provenance import hash_of
from protoclip_scale.evaluation.tasks import CLASS_COLUMN, task_keys
from protoclip_scale.files import publish_json
from protoclip_scale.preparation.held_out.classes import class_of_label
from protoclip_scale.preparation.held_out.fetch import download, unpack
from protoclip_scale.preparation.held_out.layouts import Row, rows_of
from protoclip_scale.preparation.held_out.pixels import without_border
from protoclip_scale.preparation.held_out.schema import Preparation, preparation_of
from protoclip_scale.preparation.shards import Pair, ShardWriter, remove_unfinished
from protoclip_scale.recipe.schema import EvaluationSet

HUB = "hf:"
PLAN, FETCHED = "plan.json", ".downloads"
ROWS_PER_SHARD, ROW_GROUP_ROWS = 10_000, 250


@dataclass(frozen=True)
class Options:
    """out: the data folder. sources: folder, or hf:ORG/NAME, by task. allow_subset: other numbers of rows than the task's are written."""

    out: Path
    sources: Mapping[str, str]
    allow_subset: bool = False
    limits: Limits = Limits()
    retry_seconds: float = 300.0
    rows_per_shard: int = ROWS_PER_SHARD


class NeedsHands(UserError):
    """What cannot be fetched: the line says where it is to be had."""


def prepare(task: str, options: Options, say: Callable[[str], None]) -> int:
    """Writes DATA/TASK/shard-*.parquet with image, caption and, of a classification task, the column ``class``; the number of its rows.

    Raises NeedsHands where a download must be made by hand, UserError for sources of another form, other classes, or another number of rows or captions.
    """
    preparation, keys = preparation_of(task), task_keys(task)
    given = options.sources.get(task)
    if given and given.startswith(HUB):
        rows = _rows_of_hub(task, given.removeprefix(HUB), preparation, options)
    else:
        root = Path(given).expanduser() if given else _fetch(task, preparation, options, say)
        if not root.is_dir():
            raise UserError(f"--source {task}={root}: there is no such folder")
        rows = rows_of(preparation, root)
    return _write(task, preparation, keys, rows, options)


def _fetch(task: str, preparation: Preparation, options: Options, say: Callable[[str], None]) -> Path:
    """The folder with what was downloaded and unpacked."""
    if not preparation.downloads:
        raise NeedsHands(f"{task}: needs a download by hand: {preparation.manual}. Then: --source {task}=FOLDER")
    folder = options.out / FETCHED / task
    unpacked = folder / "unpacked"
    for wanted in preparation.downloads:
        say(f"{task}: {wanted.url}")
        unpack(download(wanted, folder, options.retry_seconds), unpacked)
    if preparation.also and not (unpacked / str(preparation.list)).exists():
        raise NeedsHands(f"{task}: needs one thing by hand: {preparation.also}, in {unpacked}. Then run again")
    return unpacked


def _rows_of_hub(task: str, place: str, preparation: Preparation, options: Options) -> list[Row]:
    """Rows of a dataset of the Hub, its numbers as names."""
    names = preparation.hub
    settings = EvaluationSet(name=task, hub=place, split=names.split, columns={"image": names.image, "caption": ""}, classify=(names.label,))
    reader = open_source(settings, (names.label,), str(options.out), options.retry_seconds)
    label = Labels(settings, reader, names.label)
    rows = []
    for block in range(len(reader.block_rows)):
        for row, name in enumerate(label(reader.read(block, images=False).column(names.label).to_pylist())):
            rows.append(Row(f"{block}:{row}", _CellReader(reader, block, row), name))
    return rows


class _CellReader:
    """The image of one row; the block that was read last is kept, since rows are read in order."""

    _last: tuple[int, int, pa.ChunkedArray] | None = None

    def __init__(self, reader, block: int, row: int):
        self.reader, self.block, self.row = reader, block, row

    def __call__(self, max_bytes: int) -> bytes | None:
        if _CellReader._last is None or _CellReader._last[:2] != (id(self.reader), self.block):
            _CellReader._last = id(self.reader), self.block, self.reader.read(self.block).column("image")
        return _CellReader._last[2][self.row].as_py()


def _write(task: str, preparation: Preparation, keys: Mapping, rows: list[Row], options: Options) -> int:
    if "classes" in keys:
        classes = class_of_label([row.label for row in rows], keys["classes"], keys.get("class_words", {}), preparation.match, preparation.skip_other_folders, task)
        rows = [row for row in rows if row.label in classes]
    else:
        classes = {}
        without = [row.key for row in rows if not row.captions]
        if without and not options.allow_subset:
            raise UserError(f"{task}: {len(without)} of {len(rows)} images have no caption (first {without[0]}); get the annotations again, or write the others with --allow-subset")
        rows = [row for row in rows if row.captions]
    _check_sizes(task, keys, rows, options)
    writer = ShardWriter(
        options.out / task, rows_per_shard=options.rows_per_shard, row_group_rows=ROW_GROUP_ROWS, extra=pa.schema([(CLASS_COLUMN, pa.string())]) if classes else None
    )
    remove_unfinished(writer.folder)
    _check_plan(task, writer, preparation, rows, classes)
    for shard in range(writer.num_shards(len(rows))):
        if writer.is_complete(shard):
            continue
        with writer.shard(shard) as file:
            for number in writer.rows_of(shard, len(rows)):
                row = rows[number]
                file.add(Pair(_image(task, row, preparation, options.limits), list(row.captions), {CLASS_COLUMN: classes[row.label]} if classes else {}, row.key))
    return len(rows)


def _check_sizes(task: str, keys: Mapping, rows: list[Row], options: Options) -> None:
    if not rows:
        raise UserError(f"{task}: there are no rows; see what its layout must be in its task file, {preparation_of(task).layout}")
    for wanted, found, what in ((keys.get("num_rows"), len(rows), "rows"), (keys.get("num_captions"), sum(len(row.captions) for row in rows), "captions")):
        if wanted is not None and found != wanted and not options.allow_subset:
            raise UserError(f"{task}: {found:,} {what} where there must be {wanted:,}; get the whole set, or write what is there with --allow-subset")


def _check_plan(task: str, writer: ShardWriter, preparation: Preparation, rows: list[Row], classes: Mapping[str, str]) -> None:
    """Shards of an earlier start go on only if they are of these very rows."""
    plan = {
        "task": task,
        "rows": len(rows),
        "rows_per_shard": writer.rows_per_shard,
        "digest": hash_of([[(row.key, row.label, row.captions) for row in rows], classes, preparation.crop_border]),
    }
    path = writer.reports / PLAN
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        before = {}
    if before is None and any(writer.folder.glob("*.parquet")):
        before = {}
    if before is not None and before != plan:
        raise UserError(f"{writer.folder} was prepared from other rows; remove it, or choose another --out")
    publish_json(path, plan)


def _image(task: str, row: Row, preparation: Preparation, limits: Limits) -> bytes:
    encoded = row.read(limits.max_bytes)
    try:
        if encoded is not None and preparation.crop_border:
            encoded = without_border(encoded, preparation.crop_border, limits)
        problem = "it is missing, leads out of its folder, or is too long" if encoded is None else problem_of(encoded, limits)
    except BadImage as error:
        problem = str(error)
    if problem:
        raise UserError(f"{task}: image {row.key} cannot be used ({problem}); get it again")
    return encoded
