"""Different rows in a keyed order, over all ranks: the starts of k-means and what refills its empty clusters.

Captions repeat, and with them text features. Two equal centroids are a tie that rounding decides, for thousands of rows
at once; so no row is taken that lies on one already taken.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from protoclip_scale.prototypes.assign import assign
from protoclip_scale.prototypes.fixed_point import gather_array, reduce_array
from protoclip_scale.prototypes.store import let_pages_go

SUB_BATCH = 1024
NO_KEY = np.iinfo(np.int64).max


def position_keys(seed: Sequence[int], purpose: str, first_position: int, num_rows: int) -> np.ndarray:
    """int64 [num_rows] pseudo-random keys, each a function of (seed, purpose, position) alone: splitmix64, offset by a hash."""
    offset = hashlib.sha256(repr((purpose, [int(number) for number in seed])).encode()).digest()[:8]
    with np.errstate(over="ignore"):
        mixed = np.arange(first_position + 1, first_position + 1 + num_rows, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        ) + np.frombuffer(offset, np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def draw_distinct(
    parts: Sequence[np.ndarray],
    first_positions: Sequence[int],
    keys: Sequence[np.ndarray],
    wanted: int,
    tolerance: float,
    beside: np.ndarray,
    engine: str,
) -> np.ndarray:
    """float32 [up to wanted, d]: rows by (key, position), without those closer than ``tolerance`` to one taken or in ``beside`` [m, d].

    ``parts`` are the rank's own lanes, ``first_positions`` the episode position of each one's first row, ``keys`` int64 [n_l] of its
    rows. A collective; the same on all ranks and for any number of them. Fewer rows than wanted come back only if there are no more.
    Costs about one search of ``wanted`` rows among as many, and a sort of the own keys.
    """
    own_keys = np.concatenate(keys)
    own_positions = np.concatenate([np.arange(first, first + len(part)) for first, part in zip(first_positions, parts, strict=True)])
    own_places = np.concatenate([np.stack([np.full(len(part), lane), np.arange(len(part))], axis=1) for lane, part in enumerate(parts)])
    order = np.lexsort((own_positions, own_keys))
    taken, cursor = np.array(beside, dtype=np.float32), 0
    while len(taken) < wanted + len(beside):
        chunk = max(SUB_BATCH, wanted + len(beside) - len(taken))
        offered = order[cursor : cursor + chunk]
        offer = np.full((chunk, 2), NO_KEY, dtype=np.int64)
        offer[: len(offered)] = np.stack([own_keys[offered], own_positions[offered]], axis=1)
        offers = gather_array(offer)
        chosen = offers[np.lexsort((offers[:, 1], offers[:, 0]))][:chunk]
        chosen = chosen[chosen[:, 1] != NO_KEY]
        if not len(chosen):
            break
        places = {int(position): row for row, position in enumerate(chosen[:, 1])}
        candidates = np.zeros((len(chosen), parts[0].shape[1]), dtype=np.float32)
        for index in offered:
            row = places.get(int(own_positions[index]))
            if row is None:
                break
            lane, row_in_lane = own_places[index]
            candidates[row] = parts[lane][row_in_lane]
            cursor += 1
        for part in parts:
            let_pages_go(part)
        candidates = reduce_array(candidates)  # every row comes from one rank, so this sum is exact
        for start in range(0, len(candidates), SUB_BATCH):
            taken = np.concatenate([taken, _new_ones(candidates[start : start + SUB_BATCH], taken, tolerance, engine)])
    return taken[len(beside) : len(beside) + wanted]


def _new_ones(candidates: np.ndarray, taken: np.ndarray, tolerance: float, engine: str) -> np.ndarray:
    """Candidates that lie neither on a taken row nor on an earlier candidate."""
    if len(taken):
        candidates = candidates[assign(candidates, taken, engine)[1] > tolerance**2]
    exact = candidates.astype(np.float64)
    squares = np.einsum("nd,nd->n", exact, exact)
    distances = squares[:, None] + squares[None, :] - 2 * exact @ exact.T
    return candidates[~np.tril(distances <= tolerance**2, -1).any(axis=1)]
