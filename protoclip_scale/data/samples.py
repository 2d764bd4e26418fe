"""A seeded sample of the rows of sources that reads few blocks, for statistics and for looking."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from protoclip_scale.data.randomness import generator, permutation
from protoclip_scale.data.sources import BlockReader

# Of each source no more than this is read: a sample of 2,000 rows may not read 2,000 row groups of a remote store, nor ten tar shards of a gigabyte.
MAX_BLOCKS = 64
MAX_BYTES = 256_000_000
MIN_BLOCKS = 2  # however large they are


class BlockSample(NamedTuple):
    """Rows (ascending, int64) of one block of one source."""

    source: int
    block: int
    rows: np.ndarray


def draw_sample(readers: Sequence[BlockReader], rows: int, seed: int = 0) -> list[BlockSample]:
    """About ``rows`` rows, shared among the sources as training shares them: by weight, else by rows; at least one of each source. A function of the seed
    and of the number of rows of each block.

    Uniform over the rows of a source that has at most 64 blocks of together 256 MB. Of a larger one so many blocks are drawn, with probability by their rows,
    and each gives equally many rows where it can: still about uniform, but maybe fewer rows.
    """
    sizes = [float(reader.source.weight or reader.block_rows.sum()) for reader in readers]
    drawn = []
    for source, (reader, size) in enumerate(zip(readers, sizes, strict=True)):
        wanted = min(max(1, round(rows * size / sum(sizes))), int(reader.block_rows.sum()))
        for block, chosen in _rows_of_source(reader, wanted, source, seed):
            drawn.append(BlockSample(source, block, np.sort(chosen)))
    return sorted(drawn, key=lambda sample: (sample.source, sample.block))


def _rows_of_source(reader: BlockReader, wanted: int, source: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """(block, rows of it) with at least one row each."""
    block_rows = reader.block_rows
    draws = generator(seed, "sample of blocks", source)
    arrival = draws.exponential(size=len(block_rows)) / np.maximum(block_rows, 1e-9)
    order = np.argsort(arrival, kind="stable")[:MAX_BLOCKS]
    affordable = int(np.searchsorted(np.cumsum(reader.block_bytes[order]), MAX_BYTES, side="right"))
    blocks = order[: max(MIN_BLOCKS, affordable)]
    if len(blocks) == len(block_rows):
        first = np.cumsum(block_rows) - block_rows
        places = draws.choice(int(block_rows.sum()), size=wanted, replace=False)
        block_of = np.searchsorted(first, places, side="right") - 1
        yield from ((block, places[block_of == block] - first[block]) for block in np.unique(block_of).tolist())
        return
    blocks = blocks[:wanted]
    for left, block in zip(range(len(blocks), 0, -1), sorted(blocks.tolist(), key=lambda block: block_rows[block]), strict=True):  # small ones first: the others make up for them
        take = min(int(block_rows[block]), -(-wanted // left))
        wanted -= take
        if take:
            yield block, permutation(int(block_rows[block]), seed, "sample of rows", source, block)[:take]


def read_sample(readers: Sequence[BlockReader], samples: Sequence[BlockSample], images: bool = True) -> Iterator[tuple[BlockSample, pa.Table]]:
    """Each block's sample with its rows as a table, as ``BlockReader.read`` returns them. Reads whole blocks, one at a time."""
    for sample in samples:
        wanted = images and frozenset(sample.rows.tolist())
        yield sample, readers[sample.source].read(sample.block, wanted).take(sample.rows)
