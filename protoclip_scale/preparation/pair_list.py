"""The list as it is gathered: an Arrow file whose batch k holds the rows of shard k, and the steps that make it from a published list.

Every step reads a file and writes a file, so memory does not hold the rows of a list, only hashes of them.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv

from protoclip_scale.errors import UserError
from protoclip_scale.files import sync
from protoclip_scale.preparation.lists import LAYOUTS, ListOptions, Row, describe_options, open_list, read_rows
from protoclip_scale.preparation.queries import balance, read_queries

FACTS = b"facts"


class KnownList(NamedTuple):
    """A published list as others have it. ``sha256`` of the decompressed content, None where no source states one."""

    name: str
    rows: int
    sha256: str | None
    source: str  # of the figures


KNOWN_LISTS = {
    "conceptual_captions": KnownList("Conceptual Captions, Train_GCC-training.tsv", 3_318_333, None, "the data set's page"),
    "yfcc15m_declip": KnownList(
        "DeCLIP's YFCC15M, yfcc15m_clean_open_data.json",
        15_388_848,
        "c6afef7c136cfda401f50fc8b6437d12a9748de838751841f5f503050a46c826",
        "rows: issue 28 of Sense-GVT/DeCLIP; sha256: Git LFS record of the copy in the Hub data set yxchng/cc15m_yfcc15m",
    ),
    "yfcc15m_openai": KnownList("OpenAI's YFCC15M, yfcc100m_subset_data.tsv", 14_829_396, None, "data/yfcc100m.md of openai/CLIP"),
}


@dataclass(frozen=True)
class ListSettings:
    """What to gather. ``rows_per_shard``: R, shard k is rows [kR, (k+1)R). Without ``queries`` nothing is balanced."""

    path: Path
    layout: str
    options: ListOptions = ListOptions()
    rows_per_shard: int = 10_000
    queries: Path | None = None
    max_per_query: int = 20_000
    keep_unmatched: bool = False


class PairList:
    """Rows in a file, by shard. ``facts``: what made it."""

    def __init__(self, path: Path):
        self._file = pa.ipc.open_file(pa.OSFile(str(path)))
        self.num_shards = self._file.num_record_batches
        self.facts: dict[str, Any] = json.loads(self._file.schema.metadata[FACTS])
        self.extra = tuple(self._file.schema.names[2:])

    def shard(self, number: int) -> list[Row]:
        """Rows of shard ``number``."""
        url, captions, *extra = (column.to_pylist() for column in self._file.get_batch(number).columns)
        others = list(zip(*extra, strict=True)) if extra else [()] * len(url)
        return [Row(one, tuple(texts), more) for one, texts, more in zip(url, captions, others, strict=True)]

    def num_rows(self, shard: int) -> int:
        """All shards but the last have the same."""
        return self._file.get_batch(0 if shard < self.num_shards - 1 else shard).num_rows

    def rows(self) -> Iterator[Row]:
        for number in range(self.num_shards):
            yield from self.shard(number)


def write_pairs(path: Path, rows: Iterable[Row], extra: tuple[str, ...], rows_per_shard: int, facts: dict[str, Any]) -> int:
    """Write a pair list; the number of its rows. ``path`` appears when it is whole."""
    schema = pa.schema([("url", pa.string()), ("captions", pa.list_(pa.string())), *((name, pa.string()) for name in extra)])
    schema = schema.with_metadata({FACTS: json.dumps(facts).encode()})
    writing = path.with_name(path.name + ".writing")
    count = 0
    with pa.ipc.new_file(str(writing), schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as file:
        batch: list[Row] = []
        for row in rows:
            batch.append(row)
            if len(batch) == rows_per_shard:
                file.write_batch(_record_batch(batch, schema))
                count += len(batch)
                batch = []
        if batch:
            file.write_batch(_record_batch(batch, schema))
            count += len(batch)
    sync(writing)
    writing.replace(path)
    return count


def list_facts(settings: ListSettings) -> dict[str, Any]:
    """What a list is and how it is used: plain values that the shards carry. Reads the list once, for its hash."""
    if not settings.path.is_file():
        raise UserError(f"{settings.path} is not a file; give the path of the list")
    facts = {
        "list": settings.path.name,
        "list_sha256": _sha256(settings.path),
        "layout": settings.layout,
        **describe_options(settings.layout, settings.options),
    }
    facts["rows_per_shard"] = settings.rows_per_shard
    if settings.queries is not None:
        read_queries(settings.queries)
        facts |= {
            "queries_sha256": _sha256(settings.queries),
            "max_per_query": settings.max_per_query,
            "keep_unmatched": settings.keep_unmatched,
        }
    return facts


def prepare_list(settings: ListSettings, facts: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write the pair list ``out``, and beside it query_counts.csv if there are queries; what was left out, for the report.

    Rows of one URL become one, with all their captions: a URL is fetched once. With queries 40 microseconds and 100 bytes a row.
    """
    extra = LAYOUTS[settings.layout].extra_columns(settings.options)
    dropped: Counter[str] = Counter()
    hashes = array("Q")
    staged = out.with_name("staged.arrow")

    def write(path: Path, rows: Iterable[Row]) -> int:
        return write_pairs(path, rows, extra, settings.rows_per_shard, facts)

    def hashed(rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            hashes.append(int.from_bytes(hashlib.blake2b(row.url.encode("utf-8", "replace"), digest_size=8).digest(), "big"))
            yield row

    count = write(staged, hashed(read_rows(settings.path, settings.layout, settings.options, dropped)))
    summary: dict[str, Any] = {"rows": count, "lines_left_out": {reason: number for reason, number in dropped.items() if number}}
    if not count:
        raise UserError(f"{settings.path}: no line reads as a row of --list {settings.layout} ({dict(dropped) or 'the file is empty'})")
    merged = write(out, _merged(PairList(staged), np.frombuffer(hashes, dtype=np.uint64)))
    hashes = array("Q")
    summary["repeated_urls"] = count - merged
    if settings.queries is not None:
        summary["queries"], keep = _balance(settings, PairList(out), out.parent)
        out.replace(staged)
        merged = write(out, compress(PairList(staged).rows(), keep))
        if not merged:
            raise UserError(f"--queries {settings.queries}: no caption of {settings.path} contains any of its lines; is it the right file?")
    staged.unlink()
    return summary | {"pairs": merged}


def known_list_note(settings: ListSettings, facts: dict[str, Any], rows: int) -> str:
    """One line that compares the list with the published one of that layout; '' if none is known."""
    known = KNOWN_LISTS.get(settings.layout)
    if known is None:
        return ""
    if known.sha256 == facts["list_sha256"]:
        return f"the list is {known.name}: its sha256 is the known one"
    counts = f"{rows:,} rows read, the published list has {known.rows:,}"
    return f"{known.name}: {counts}" if known.sha256 is None else f"the list's sha256 is not the known one of {known.name}; {counts}"


def _merged(pairs: PairList, hashes: np.ndarray) -> Iterator[Row]:
    """The rows, those of a repeated URL in the place of the first. Memory grows with the rows that repeat."""
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        yield from pairs.rows()
        return
    suspects = repeated[np.minimum(np.searchsorted(repeated, hashes), len(repeated) - 1)] == hashes
    captions: dict[str, dict[str, None]] = {}
    for row in compress(pairs.rows(), suspects):
        captions.setdefault(row.url, {}).update(dict.fromkeys(row.captions))
    for row, suspect in zip(pairs.rows(), suspects, strict=True):
        if not suspect:
            yield row
        elif row.url in captions:
            yield row._replace(captions=tuple(captions.pop(row.url)))


def _balance(settings: ListSettings, pairs: PairList, folder: Path) -> tuple[dict[str, int], np.ndarray]:
    """Figures for the report and the mask of the rows that stay; writes query_counts.csv."""
    index = read_queries(settings.queries)
    found = balance(pairs.rows(), index, settings.max_per_query, settings.keep_unmatched, folder)
    counts = pa.table({"query": index.names, "pairs": found.matched, "kept": found.kept})
    pa.csv.write_csv(counts.sort_by([("pairs", "descending"), ("query", "ascending")]), folder / "query_counts.csv")
    figures = {
        "queries": len(index),
        "queries_found": int(np.count_nonzero(found.matched)),
        "queries_over_the_maximum": int(np.count_nonzero(found.matched > settings.max_per_query)),
        "pairs_without_query": found.unmatched,
        "pairs_kept": int(found.keep.sum()),
    }
    return figures, found.keep


def _record_batch(rows: list[Row], schema: pa.Schema) -> pa.RecordBatch:
    urls, captions, extra = zip(*rows, strict=True)
    columns = [urls, map(list, captions), *zip(*extra, strict=True)]
    return pa.record_batch([pa.array(list(column), field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)


def _sha256(path: Path) -> str:
    with open_list(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()
