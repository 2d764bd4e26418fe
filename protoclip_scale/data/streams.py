"""Endless streams of rows: what the plan cuts its episodes from. FROZEN with it (see ``data/plan.py``).

A stream visits all its blocks in a random order, then all of them in another order, and so on; the rows of a block one after the other, in a random
order, so that a block cut by the end of an episode is cut at random. A subset is drawn by row: the rows with the smallest of seeded keys.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from protoclip_scale.data.index import Index
from protoclip_scale.data.randomness import permutation, raw_keys
from protoclip_scale.data.rows import pack_row_ids
from protoclip_scale.errors import UserError


class Piece(NamedTuple):
    """A part of a block as it stands in a stream: places first..last of the block's order in a pass."""

    pass_number: int
    block: int  # in the index
    first: int
    last: int


class Subset:
    """The rows of an index that count: all, or of each source those whose key is at most a threshold."""

    def __init__(self, index: Index, seed: int):
        self._index = index
        self._seed = seed
        self._thresholds: dict[int, np.uint64] = {}  # by source
        self.block_rows = index.block_rows.copy()  # int64 [blocks], those that count

    def draw(self, sources: list[int], num_rows: int) -> None:
        """Keep ``num_rows`` of the rows of ``sources`` together, uniformly. One pass over them, in memory of the order of the square root of their number."""
        blocks = np.flatnonzero(np.isin(self._index.block_source, sources))
        available = int(self._index.block_rows[blocks].sum())
        if num_rows >= available:
            return
        share = 2.0**64 / available
        margin = 10 * math.sqrt(num_rows) + 100  # ten deviations: the threshold lies between low and high
        low = np.uint64(max(0.0, num_rows - margin) * share)
        high = np.uint64(min(int((num_rows + margin) * share), 2**64 - 1))
        certain = np.zeros(len(blocks), dtype=np.int64)
        undecided, undecided_block = [], []
        for number, block in enumerate(blocks):
            keys = self._keys(int(block))
            certain[number] = np.count_nonzero(keys < low)
            near = keys[(keys >= low) & (keys <= high)]
            undecided.append(near)
            undecided_block.append(np.full(len(near), number))
        near, near_block = np.concatenate(undecided), np.concatenate(undecided_block)
        missing = num_rows - int(certain.sum())
        assert 0 < missing <= len(near)
        threshold = np.partition(near, missing - 1)[missing - 1]
        self.block_rows[blocks] = certain + np.bincount(near_block[near <= threshold], minlength=len(blocks))
        self._thresholds |= dict.fromkeys(sources, threshold)

    def row_ids(self, piece: Piece) -> np.ndarray:
        """int64 [last - first], the row ids of a piece in stream order."""
        source, number = int(self._index.block_source[piece.block]), int(self._index.block_number[piece.block])
        order = permutation(int(self.block_rows[piece.block]), self._seed, "rows", piece.pass_number, source, number)
        rows = order[piece.first : piece.last]
        if source in self._thresholds:
            rows = np.flatnonzero(self._keys(piece.block) <= self._thresholds[source])[rows]
        return pack_row_ids(source, number, rows)

    def _keys(self, block: int) -> np.ndarray:
        source, number = int(self._index.block_source[block]), int(self._index.block_number[block])
        return raw_keys(int(self._index.block_rows[block]), self._seed, "subset", source, number)


class Stream:
    """Passes over a set of blocks without end. ``purpose``: what tells its orders from those of other streams."""

    def __init__(self, subset: Subset, blocks: np.ndarray, seed: int, *purpose: int):
        self._blocks = blocks
        self._block_rows = subset.block_rows[blocks]
        self._seed = seed
        self._purpose = purpose
        self.num_rows = int(self._block_rows.sum())
        self._pass: tuple[int, np.ndarray, np.ndarray] | None = None

    def _order(self, pass_number: int) -> tuple[np.ndarray, np.ndarray]:
        """(blocks of a pass in stream order, number of rows up to the end of each); the last pass asked for is kept."""
        if self._pass is None or self._pass[0] != pass_number:
            order = permutation(len(self._blocks), self._seed, "blocks", pass_number, *self._purpose)
            self._pass = pass_number, order, np.cumsum(self._block_rows[order])
        return self._pass[1:]

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The parts of blocks that fill places [start, stop)."""
        place = start
        while place < stop:
            pass_number, offset = divmod(place, self.num_rows)
            order, ends = self._order(pass_number)
            at = int(np.searchsorted(ends, offset, side="right"))
            rows = int(self._block_rows[order[at]])
            first = offset - (int(ends[at]) - rows)
            last = min(rows, first + stop - place)
            yield Piece(pass_number, int(self._blocks[order[at]]), first, last)
            place += last - first


class Mixture:
    """Sources with weights, each an endless stream of its own; an episode takes a fixed share of every one.

    The first k episodes hold round-down(k S (w_1 + ... + w_s)) rows of the sources up to s, so shares are exact in the long run and off by less
    than two rows in any episode. Inside an episode the pieces of the sources are interleaved in proportion.
    """

    def __init__(self, subset: Subset, index: Index, seed: int, episode_size: int):
        total = sum(Fraction(weight) for weight in index.weights)
        self.shares = [Fraction(weight) / total for weight in index.weights]
        self.streams = [
            Stream(subset, np.flatnonzero(index.block_source == source), seed, source) for source in range(len(index.source_names))
        ]
        self._episode_size = episode_size
        for name, share, stream in zip(index.source_names, self.shares, self.streams, strict=True):
            wanted = float(share * episode_size)
            if wanted < 2:
                raise UserError(f"data.sources {name}: its weight gives it {wanted:.2g} rows of an episode of {episode_size}; raise its weight or data.plan.episode_size")
            if wanted + 2 > stream.num_rows:
                raise UserError(
                    f"data.sources {name}: its weight gives it {math.ceil(wanted)} rows of each episode of {episode_size}, but it has {stream.num_rows}, "
                    "and a row may stand in an episode once only; lower its weight or data.plan.episode_size"
                )

    def _before(self, source: int, episode: int) -> int:
        """Rows of a source in the episodes before ``episode``."""
        places = episode * self._episode_size
        return math.floor(places * sum(self.shares[: source + 1])) - math.floor(places * sum(self.shares[:source]))

    def pieces(self, episode: int) -> list[Piece]:
        """The pieces of an episode: each source's own, in order, spread evenly over the episode."""
        spread: list[tuple[Fraction, int, Piece]] = []
        for source, stream in enumerate(self.streams):
            start, stop = self._before(source, episode), self._before(source, episode + 1)
            done = 0
            for piece in stream.pieces(start, stop):
                rows = piece.last - piece.first
                spread.append((Fraction(2 * done + rows, 2 * (stop - start)), source, piece))
                done += rows
        return [piece for _, _, piece in sorted(spread, key=lambda item: item[:2])]
