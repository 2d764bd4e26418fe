"""A list of URLs and captions to parquet shards: prepared once, then shard by shard, each written whole or not at all.

OUT/shard-00000.parquet ...        the pairs
OUT/report.json, failures.csv      what became of the list
OUT/gather/                        the prepared list (pass-0.arrow), rows tried again (pass-1.arrow ...), a small report of each shard
"""

import asyncio
import contextlib
import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from protoclip_scale.data.decode import Limits
from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_json
from protoclip_scale.preparation.download import Downloader, DownloadSettings, Failure
from protoclip_scale.preparation.encode_pool import EncodePool
from protoclip_scale.preparation.images import ImageSettings
from protoclip_scale.preparation.lists import Row
from protoclip_scale.preparation.pair_list import ListSettings, PairList, known_list_note, list_facts, prepare_list, write_pairs
from protoclip_scale.preparation.progress import ProgressBar
from protoclip_scale.preparation.shards import Pair, ShardWriter, remove_unfinished
from protoclip_scale.report.plain import count

WAITING_ROOM = 8  # rows in work per connection: enough that one slow host does not hold up the others
METADATA_KEY = "protoclip_scale.gather"


@dataclass(frozen=True)
class GatherSettings:
    """``workers``: processes that decode and encode; 0 does it in this one. ``retry_failures``: when every shard is there, try the failed
    rows again."""

    out: Path
    list: ListSettings
    download: DownloadSettings = DownloadSettings()
    image: ImageSettings = ImageSettings()
    limits: Limits = Limits()
    workers: int = 2
    row_group_rows: int = 500
    shards_at_once: int = 2
    retry_failures: bool = False


class Pass(NamedTuple):
    """One go through rows that were not tried yet (0) or that failed in the pass before. Its shards are numbered from ``first_shard``."""

    number: int
    pairs: PairList
    first_shard: int

    @property
    def shards(self) -> range:
        return range(self.first_shard, self.first_shard + self.pairs.num_shards)


@dataclass(frozen=True)
class Gathered:
    """All that lies in an output folder. ``listed``: facts and summary of the prepared list."""

    passes: list[Pass]
    writer: ShardWriter
    listed: dict[str, Any]

    def failures(self) -> Iterator[tuple[Row, dict[str, str]]]:
        """Rows of the last pass without an image, in its order, each with the entry of its shard's report: kind and reason."""
        last = self.passes[-1]
        for shard in last.shards:
            dropped = {entry["key"]: entry for entry in self.writer.report(shard)["dropped"]}
            if dropped:
                yield from ((row, dropped[row.url]) for row in last.pairs.shard(shard - last.first_shard) if row.url in dropped)


def gather(settings: GatherSettings, say: Callable[[str], None] = print) -> Gathered:
    """Gather what is missing of ``settings.out``, with a progress bar.

    UserError: another list or other settings than those that ``out`` was begun with. Disk: the shards, and about the list's own size.
    """
    work = settings.out / "gather"
    with _locked(work):
        remove_unfinished(settings.out)
        facts = json.loads(json.dumps(_facts(settings)))  # as list.json will give them back
        listed = _prepare(settings, facts, work, say)
        passes = _passes(work)
        writer = ShardWriter(
            settings.out,
            rows_per_shard=settings.list.rows_per_shard,
            row_group_rows=settings.row_group_rows,
            extra=pa.schema([(name, pa.string()) for name in passes[0].pairs.extra]),
            metadata={METADATA_KEY: json.dumps(facts)},
            reports=work,
        )
        missing = _missing(passes, writer)
        if settings.retry_failures and missing:
            say("shards are missing: they come first; run the same command once more to try failed rows again")
        elif settings.retry_failures:
            passes = _retry_pass(Gathered(passes, writer, listed), work, say)
            missing = _missing(passes, writer)
        if missing:
            asyncio.run(_Run(settings, writer, passes[-1]).gather(missing))
        return Gathered(passes, writer, listed)


def _facts(settings: GatherSettings) -> dict[str, Any]:
    """All that bears on the bytes of the shards, beside what the servers say."""
    return list_facts(settings.list) | {
        "image": settings.image._asdict(),
        "max_bytes": settings.download.max_bytes,
        "max_pixels": settings.limits.max_pixels,
        "row_group_rows": settings.row_group_rows,
    }


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    try:
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"--out {work.parent} cannot be written: {error.strerror}; name a folder that can") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{work.parent} is being gathered into by another process; wait for it or choose another --out") from None
    finally:
        os.close(descriptor)


def _prepare(settings: GatherSettings, facts: dict[str, Any], work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The prepared list, made or found; list.json is written last and says that it is whole. What list.json holds."""
    path = work / "list.json"
    if not path.exists():
        if next(settings.out.glob("*.parquet"), None) is not None:
            raise UserError(f"--out {settings.out} holds parquet files of something else; choose an empty folder")
        say(f"preparing {settings.list.path} (sha256 {facts['list_sha256']})")
        summary = prepare_list(settings.list, facts, work / "pass-0.arrow")
        summary["known_list"] = known_list_note(settings.list, facts, summary["rows"])
        publish_json(path, {"facts": facts, "summary": summary})
    found = json.loads(path.read_text(encoding="utf-8"))
    before, summary = found["facts"], found["summary"]
    changed = [name for name in {**before, **facts} if before.get(name) != facts.get(name)]
    if changed:
        name = changed[0]
        then, now = before.get(name), facts.get(name)
        raise UserError(f"--out {settings.out} was begun with {name} {then}, now it is {now}; use the same again or another --out")
    say(f"{summary['pairs']:,} pairs" + (f"; {summary['known_list']}" if summary["known_list"] else ""))
    return found


def _passes(work: Path) -> list[Pass]:
    passes, first = [], 0
    while (path := work / f"pass-{len(passes)}.arrow").exists():
        passes.append(Pass(len(passes), PairList(path), first))
        first += passes[-1].pairs.num_shards
    return passes


def _missing(passes: list[Pass], writer: ShardWriter) -> list[int]:
    """Shards of the last pass that are not there."""
    for earlier in passes[:-1]:
        gone = [shard for shard in earlier.shards if not writer.is_complete(shard)]
        if gone:
            raise UserError(
                f"{writer.path(gone[0])} is gone, and its failed rows were tried again since; put it back, or gather into another --out"
            )
    return [shard for shard in passes[-1].shards if not writer.is_complete(shard)]


def _retry_pass(gathered: Gathered, work: Path, say: Callable[[str], None]) -> list[Pass]:
    """The passes and one more with the rows that failed in the last."""
    last = gathered.passes[-1]
    path = work / f"pass-{last.number + 1}.arrow"
    rows = (row for row, _ in gathered.failures())
    num_rows = write_pairs(path, rows, last.pairs.extra, gathered.writer.rows_per_shard, {"again": last.number})
    if not num_rows:
        path.unlink()
        say("no row has failed; there is nothing to try again")
        return gathered.passes
    say(f"trying {num_rows:,} rows again")
    return _passes(work)


class _Run:
    """The shards of one pass, several at a time, the earlier first."""

    def __init__(self, settings: GatherSettings, writer: ShardWriter, current: Pass):
        self.settings, self.writer, self.current = settings, writer, current
        self._failures: Counter[str] = Counter()

    async def gather(self, shards: list[int]) -> None:
        settings = self.settings
        rows = sum(self.current.pairs.num_rows(shard - self.current.first_shard) for shard in shards)
        connections, backlog = settings.download.connections, settings.download.connections + 4 * max(1, settings.workers)
        self._entrance, self._places = asyncio.Lock(), asyncio.Semaphore(connections * WAITING_ROOM)
        open_shards = asyncio.Semaphore(settings.shards_at_once)
        async with (
            Downloader(settings.download, backlog) as self._download,
            EncodePool(settings.workers, settings.image, settings.limits) as self._encode,
        ):
            with ProgressBar("gathering", rows) as self._bar:
                try:
                    async with asyncio.TaskGroup() as tasks:
                        for shard in shards:
                            await open_shards.acquire()
                            tasks.create_task(self._shard(shard)).add_done_callback(lambda _: open_shards.release())
                except ExceptionGroup as group:
                    raise next(_leaves(group)) from None

    async def _shard(self, shard: int) -> None:
        rows = self.current.pairs.shard(shard - self.current.first_shard)
        results: list[bytes | Failure | None] = [None] * len(rows)
        async with asyncio.TaskGroup() as tasks, self._entrance:  # the next shard begins when all rows of this one are on their way
            for place, row in enumerate(rows):
                await self._places.acquire()
                tasks.create_task(self._row(row.url, results, place)).add_done_callback(lambda _: self._places.release())
        await asyncio.to_thread(self._write, shard, rows, results)

    async def _row(self, url: str, results: list, place: int) -> None:
        async with self._download.fetch(url) as result:
            results[place] = result if isinstance(result, Failure) else await self._encode(result)
        if isinstance(results[place], Failure):
            self._failures[results[place].reason] += 1
            self._bar.note = "without an image: " + ", ".join(
                f"{reason} {count(number)}" for reason, number in self._failures.most_common(3)
            )
        self._bar.advance(1)

    def _write(self, shard: int, rows: list[Row], results: list[bytes | Failure]) -> None:
        with self.writer.shard(shard) as file:
            for row, result in zip(rows, results, strict=True):
                if isinstance(result, Failure):
                    file.drop(row.url, result.reason, f"{result.detail} ({result.tries} tries)" if result.tries > 1 else result.detail)
                else:
                    file.add(Pair(result, list(row.captions), dict(zip(self.current.pairs.extra, row.extra, strict=True)), row.url))


def _leaves(group: ExceptionGroup) -> Iterator[Exception]:
    """The exceptions of a group of groups, those a user can mend first."""
    for wanted in (group.subgroup(UserError), group):
        for error in wanted.exceptions if wanted else ():
            yield from _leaves(error) if isinstance(error, ExceptionGroup) else (error,)
