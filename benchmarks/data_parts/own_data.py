"""A user's own data: how fast its blocks are read, and what a core makes of their rows."""

import math
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from protoclip_scale.data.captions import choose_caption
from protoclip_scale.data.decode import BadImage, Limits, decode_image
from protoclip_scale.data.index import open_readers
from protoclip_scale.data.randomness import generator, permutation
from protoclip_scale.data.sources import BlockReader
from protoclip_scale.data.text_augmentation import text_augmentation
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.data.transforms import augment
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import load_recipe, schema

BATCH = 64
MAX_ROWS = 512  # of one source, through decoding and augmentation
WORK = ("decoding", "augmentation", "captions and tokens")


def measure(path: Path, overrides: list[str], num_blocks: int, feed: list[float], console: Console) -> dict:
    """Reads ``num_blocks`` random blocks of each source, makes batches of their rows, prints what that takes and returns the figures.

    Reading is per second of the clock, by one process as a node fetches its episodes, and from the system's cache if the files were read shortly
    before; the rest is per second of processor time, in one thread. Sources count as often as rows of an episode come from them. Raises UserError as the recipe and its sources do.
    """
    recipe = load_recipe(path, overrides)
    started = time.perf_counter()
    readers = open_readers(recipe.data)
    listing = time.perf_counter() - started
    shares = _shares(readers)
    sources = [_measure_source(recipe, reader, num_blocks) for reader in readers]
    seconds = {part: sum(share * source["seconds_per_row"][part] for share, source in zip(shares, sources, strict=True)) for part in ("reading", *WORK)}
    per_core = 1 / sum(seconds[part] for part in WORK)
    workers = max(1, recipe.data.workers)
    rates = {"reading": 1 / seconds["reading"], "one core": per_core, "workers": workers * per_core}
    slowest = max(WORK, key=seconds.get)
    limit = "reading" if rates["reading"] < rates["workers"] else slowest
    figures = {
        "recipe": recipe.name,
        "listing_seconds": listing,
        "sources": {reader.name: {"share": share, **source} for reader, share, source in zip(readers, shares, sources, strict=True)},
        "rows_per_second": {"reading, one process": rates["reading"], **{f"{part}, one core": 1 / seconds[part] for part in WORK}, "all work, one core": per_core},
        "data.workers": recipe.data.workers,
        "rows_per_second_per_rank": min(rates["reading"], rates["workers"]),
        "limit": limit,
        "workers_to_feed": {f"{rate:g}": math.ceil(rate / per_core) for rate in feed},
        "reading_feeds": {f"{rate:g}": rates["reading"] >= rate for rate in feed},
    }
    _print(figures, console)
    return figures


def _shares(readers: list[BlockReader]) -> list[float]:
    """The part of an episode's rows that comes from each source."""
    parts = [reader.source.weight or min(int(reader.block_rows.sum()), reader.source.rows or 1 << 62) for reader in readers]
    return [part / sum(parts) for part in parts]


def _measure_source(recipe: schema.Recipe, reader: BlockReader, num_blocks: int) -> dict:
    """Seconds a row of each part of the work, and MB a second read, of some blocks of one source."""
    order = permutation(len(reader.block_rows), 0, "benchmark").tolist()
    order = [block for block in order if reader.block_rows[block]]
    started = time.perf_counter()
    reader.read(order[-1])  # opens the source, and imports what reads it
    opening = time.perf_counter() - started
    blocks = order[:num_blocks]
    rows, num_read, num_bytes, reading = [], 0, 0, 0.0
    for block in blocks:
        started = time.perf_counter()
        table = reader.read(block)
        reading += time.perf_counter() - started
        num_read += table.num_rows
        num_bytes += table.nbytes
        rows += table.slice(0, -(-MAX_ROWS // len(blocks))).select(["image", "captions"]).to_pylist()
    seconds, bad = _work(recipe, rows)
    good = len(rows) - bad
    if not good:
        raise UserError(f"source {reader.name}: none of the {len(rows)} rows that were read has an image that can be used; look at it with tools/inspect_data.py, or read more with --blocks")
    return {
        "opening_seconds": opening,
        "blocks_read": len(blocks),
        "rows_read": num_read,
        "MB_per_second": num_bytes / reading / 1e6,
        "kB_per_row": num_bytes / num_read / 1e3,
        "rows_worked_on": len(rows),
        "bad_rows": bad,
        "seconds_per_row": {"reading": reading / num_read, **{part: value / good for part, value in seconds.items()}},
    }


def _work(recipe: schema.Recipe, rows: list[dict]) -> tuple[dict[str, float], int]:
    """Processor seconds of each part for these rows, after a few rows to warm up, and how many cannot be used."""
    data, size = recipe.data, recipe.model.image.size
    limits, drawn, change_text = Limits(data.max_pixels, data.max_bytes), augment(data.augmentation), text_augmentation(data.text_augmentation)
    tokenizer = tokenizer_for(recipe.model.text)
    seconds = dict.fromkeys(WORK, 0.0)
    bad = 0
    for warm_up, some in ((True, rows[:8]), (False, rows)):
        texts: list[str] = []
        for number, row in enumerate(some):
            moments = [time.process_time()]
            try:
                image = decode_image(row["image"] or b"", limits)
                moments.append(time.process_time())
                drawn(image, size, generator(0, "augmentation", 0, number, 0))
                moments.append(time.process_time())
            except BadImage:
                bad += not warm_up
                continue
            rng = generator(0, "caption", 0, number, 0)
            texts.append(change_text(choose_caption([text for text in row["captions"] or [] if text], data.caption, rng), rng))
            moments.append(time.process_time())
            for part, spent in zip(WORK, np.diff(moments), strict=True):
                seconds[part] += 0 if warm_up else float(spent)
    for last in (False, True):  # tokenizers remember words: their first use is not what a long run pays
        started = time.process_time()
        for first in range(0, len(texts), BATCH):
            tokenizer(texts[first : first + BATCH])
        seconds["captions and tokens"] += time.process_time() - started if last else 0
    return seconds, bad


def _print(figures: dict, console: Console) -> None:
    table = Table("source", "share", "blocks", "MB/s read", "kB a row", "rows/s read", *(f"{part}, ms a row" for part in WORK), "bad rows")
    for name, source in figures["sources"].items():
        seconds = source["seconds_per_row"]
        table.add_row(
            name,
            f"{source['share']:.1%}",
            str(source["blocks_read"]),
            f"{source['MB_per_second']:,.1f}",
            f"{source['kB_per_row']:,.1f}",
            f"{1 / seconds['reading']:,.0f}",
            *(f"{1000 * seconds[part]:.3f}" for part in WORK),
            f"{source['bad_rows']} of {source['rows_worked_on']}",
        )
    console.print(table)
    rates = figures["rows_per_second"]
    console.print("rows a second: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
    console.print(
        f"with data.workers {figures['data.workers']}, one rank on a node gets {figures['rows_per_second_per_rank']:,.0f} rows a second; "
        f"{figures['limit']} limits it (all ranks of a node share what its one reading process fetches)"
    )
    for rate, workers in figures["workers_to_feed"].items():
        reads = "" if figures["reading_feeds"][rate] else f"; reading at {rates['reading, one process']:,.0f} rows a second does not sustain it"
        console.print(f"  {rate} samples a second and rank: {workers} loader workers, a core each{reads}")
