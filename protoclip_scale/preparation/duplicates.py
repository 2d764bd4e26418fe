"""Which rows repeat an earlier one: equal hashes, and perceptual hashes within a Hamming radius, for tens of millions of rows in memory.

A row is dropped when an earlier row that is kept lies within the radius of it. So no two kept rows are that near, every dropped row has a kept one near it, and
chains (a is near b, b near c, a not near c) do not swallow everything in between. The first in input order stays.

Pairs are found without comparing all: the 64 bits are cut into parts, more of them than the radius, so that some number of parts must be equal; for each choice
of so many parts, rows that agree in them lie side by side after one sort (Manku, Jain and Das Sarma 2007). With radius 4 and 15 million rows that is 15 sorts.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np

BITS = 64
MAX_RADIUS = 8  # at 10 of 64 bits even random images begin to match
FEW_ROWS = 1024  # compared all with all
MAX_PAIRS = 30_000_000  # held at once, 16 bytes each; more are worked off in halves


def distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Bits that differ, uint8, of broadcastable uint64 arrays."""
    return np.bitwise_count(first ^ second)


def first_equal(*keys: np.ndarray) -> np.ndarray:
    """For each row the number of the first row that is equal in all keys (its own if there is none before), int64 [N]. keys: [N] each."""
    order = np.lexsort(keys)  # stable: equal rows stay in input order
    changes = np.zeros(len(order), dtype=bool)
    for key in keys:
        changes[1:] |= key[order[1:]] != key[order[:-1]]
    changes[:1] = True
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[np.flatnonzero(changes)][np.cumsum(changes) - 1]
    return first


def first_near(hashes: np.ndarray, radius: int) -> np.ndarray:
    """For each row the number of the first kept row within ``radius`` bits of it (its own if it is kept), int64 [N]. hashes: uint64 [N] in input order.

    Costs some sorts of the different hashes: about 10 s a million rows at radius 4 on one core, more where many images look alike.
    """
    first = first_equal(hashes)
    different = np.flatnonzero(first == np.arange(len(first)))
    kept = different[_first_near(hashes[different], radius)]
    place = np.empty(len(first), dtype=np.int64)
    place[different] = np.arange(len(different))
    return kept[place[first]]


def first_near_within(groups: np.ndarray, hashes: np.ndarray, radius: int) -> np.ndarray:
    """``first_near`` among the rows of each group alone, int64 [N]. groups: uint64 [N], for instance hashes of captions."""
    first = first_equal(groups, hashes)
    different = np.flatnonzero(first == np.arange(len(first)))
    order = different[np.argsort(groups[different], kind="stable")]
    starts = np.flatnonzero(np.diff(groups[order], prepend=groups[order[:1]] ^ np.uint64(1))) if len(order) else np.empty(0, dtype=np.int64)
    ends = np.append(starts[1:], len(order))
    kept = np.arange(len(first))
    for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
        members = order[start:end]
        kept[members] = members[_first_near(hashes[members], radius)]
    return kept[first]


def nearest_in(base: np.ndarray, hashes: np.ndarray, radius: int) -> np.ndarray:
    """For each hash the number of the first in ``base`` within ``radius``, -1 if there is none: int64 [N]. Both uint64."""
    found = np.full(len(hashes), len(base), dtype=np.int64)
    for rows, others in _near_across(hashes, base, radius):
        np.minimum.at(found, rows, others)
    found[found == len(base)] = -1
    return found


def _first_near(hashes: np.ndarray, radius: int) -> np.ndarray:
    """``first_near`` of different hashes."""
    if not radius or len(hashes) < 2:
        return np.arange(len(hashes))
    pairs, num_pairs = [], 0
    for rows, others in _near_among(hashes, radius):
        pairs.append((np.maximum(rows, others), np.minimum(rows, others)))
        num_pairs += len(rows)
        if num_pairs > MAX_PAIRS:
            break
    if num_pairs <= MAX_PAIRS:
        return _greedy(len(hashes), *map(np.concatenate, zip(*pairs, strict=True))) if pairs else np.arange(len(hashes))
    del pairs  # many look alike: the kept ones of the first half thin out the second, and kept ones are few around any row
    half = len(hashes) // 2
    kept = np.arange(len(hashes))
    kept[:half] = _first_near(hashes[:half], radius)
    base = np.flatnonzero(kept[:half] == np.arange(half))
    found = nearest_in(hashes[base], hashes[half:], radius)
    kept[half:][found >= 0] = base[found[found >= 0]]
    rest = half + np.flatnonzero(found < 0)
    kept[rest] = rest[_first_near(hashes[rest], radius)]
    return kept


def _greedy(num_rows: int, later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """Kept rows from all near pairs (later > earlier): rows in order, each dropped if a kept one is near. Rounds of whole arrays instead of a loop over rows."""
    dropped = np.zeros(num_rows, dtype=bool)
    open_later, open_earlier = later, earlier
    while len(open_later):
        waits = np.zeros(num_rows, dtype=bool)
        waits[open_later] = True
        decided = ~waits[open_earlier]  # no open pair has it as the later one: it is kept
        dropped[open_later[decided]] = True
        still = ~dropped[open_later] & ~dropped[open_earlier]
        open_later, open_earlier = open_later[still], open_earlier[still]
    kept = np.arange(num_rows)
    ends = dropped[later] & ~dropped[earlier]
    kept[dropped] = num_rows
    np.minimum.at(kept, later[ends], earlier[ends])
    return kept


def _masks(radius: int, num_rows: int) -> list[np.uint64]:
    """Bits to compare, one mask per choice of parts: two hashes within ``radius`` agree under at least one of them."""
    for num_parts in range(radius + 1, 2 * radius + 3):
        edges = np.linspace(0, BITS, num_parts + 1).round().astype(int)
        parts = [((1 << int(end)) - 1) ^ ((1 << int(start)) - 1) for start, end in zip(edges[:-1], edges[1:], strict=True)]
        masks = [sum(chosen) for chosen in combinations(parts, num_parts - radius)]
        if min(mask.bit_count() for mask in masks) >= np.log2(max(num_rows, 2)) - 3:  # some ten rows a bucket if bits were random
            break
    return [np.uint64(mask) for mask in masks]


def _near_among(hashes: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of rows within ``radius``, each at least once, as (rows, other rows) in pieces."""
    if len(hashes) <= FEW_ROWS:
        rows, others = np.nonzero(np.tril(distance(hashes[:, None], hashes[None, :]) <= radius, -1))
        yield rows, others
        return
    for mask in _masks(radius, len(hashes)):
        keys = hashes & mask
        order = np.argsort(keys)
        keys, values = keys[order], hashes[order]
        places, step = np.arange(len(order) - 1), 1
        while len(places):
            places = places[keys[places] == keys[places + step]]
            near = places[distance(values[places], values[places + step]) <= radius]
            if len(near):
                yield order[near], order[near + step]
            step += 1
            places = places[places + step < len(order)]


def _near_across(hashes: np.ndarray, base: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs (row of ``hashes``, row of ``base``) within ``radius``, each at least once, in pieces."""
    for mask in _masks(radius, len(hashes) + len(base)):
        order, base_order = np.argsort(hashes & mask), np.argsort(base & mask)
        values, base_values = hashes[order], base[base_order]
        base_keys = base_values & mask
        left, right = np.searchsorted(base_keys, values & mask, side="left"), np.searchsorted(base_keys, values & mask, side="right")
        rows, step = np.flatnonzero(right > left), 0
        while len(rows):
            others = left[rows] + step
            near = distance(values[rows], base_values[others]) <= radius
            yield order[rows[near]], base_order[others[near]]
            step += 1
            rows = rows[left[rows] + step < right[rows]]
