"""Different rows in a keyed order, over all ranks: the starts of k-means and what refills its empty clusters.

Captions repeat, and with them text features. A start that lies on another is an empty cluster, so no row is taken that lies on
one already taken.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from protoclip_scale.prototypes.assign import assign, engine_module
from protoclip_scale.prototypes.fixed_point import gather_array, reduce_array
from protoclip_scale.prototypes.mapped import take_rows

SUB_BATCH = 1024
NO_KEY = np.iinfo(np.int64).max


def position_keys(seed: Sequence[int], purpose: str, positions: np.ndarray) -> np.ndarray:
    """int64 [n] pseudo-random keys, each a function of (seed, purpose, position) alone: splitmix64, offset by a hash."""
    offset = hashlib.sha256(repr((purpose, [int(number) for number in seed])).encode()).digest()[:8]
    with np.errstate(over="ignore"):
        mixed = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(offset, np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def weighted_keys(seed: Sequence[int], purpose: str, positions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """int64 [n] keys whose ascending order draws rows without replacement, with probability proportional to their ``weights`` >= 0;
    f(seed, purpose, position, weight). Rows of weight 0 come last."""
    uniform = (position_keys(seed, purpose, positions) + 1.0) / 2.0**63
    waiting = -np.log(uniform) / np.maximum(weights, np.finfo(np.float32).tiny)
    return waiting.view(np.int64)  # the bits of positive floats are ordered like their values


def draw_distinct(
    parts: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    keys: Sequence[np.ndarray],
    wanted: int,
    tolerance: float,
    beside: np.ndarray,
    engine: str,
) -> np.ndarray:
    """float32 [up to wanted, d]: rows by (key, position), without those closer than ``tolerance`` to one taken or in ``beside`` [m, d].

    ``parts`` are the rank's own lanes, ``positions`` int64 [n_l] a number of each of their rows that no other row of any rank has, ``keys``
    int64 [n_l]. A collective; the same on all ranks and for any number of them. Fewer rows than wanted come back only if there are no more.
    Costs about one search of ``wanted`` rows among as many, and a sort of the own keys.
    """
    own_keys, own_positions = np.concatenate(keys), np.concatenate(positions)
    first_rows = np.cumsum([0, *map(len, parts)])
    order = np.lexsort((own_positions, own_keys))
    taken, cursor = np.array(beside, dtype=np.float32), 0
    while len(taken) < wanted + len(beside):
        chunk = max(SUB_BATCH, wanted + len(beside) - len(taken))
        offered = order[cursor : cursor + chunk]
        offer = np.full((chunk, 2), NO_KEY, dtype=np.int64)
        offer[: len(offered)] = np.stack([own_keys[offered], own_positions[offered]], axis=1)
        offers = gather_array(offer)
        chosen = offers[np.lexsort((offers[:, 1], offers[:, 0]))][:chunk, 1]
        chosen = chosen[chosen != NO_KEY]
        if not len(chosen):
            break
        by_position = np.argsort(chosen)
        own = offered[np.isin(own_positions[offered], chosen)]
        cursor += len(own)
        places = by_position[np.searchsorted(chosen[by_position], own_positions[own])]
        candidates = np.zeros((len(chosen), parts[0].shape[1]), dtype=np.float32)
        for lane, part in enumerate(parts):
            here = (own >= first_rows[lane]) & (own < first_rows[lane + 1])
            candidates[places[here]] = take_rows(part, own[here] - first_rows[lane])
        candidates = reduce_array(candidates)  # every row comes from one rank, so this sum is exact
        for start in range(0, len(candidates), SUB_BATCH):
            taken = np.concatenate([taken, _new_ones(candidates[start : start + SUB_BATCH], taken, tolerance, engine)])
    return taken[len(beside) : len(beside) + wanted]


def _new_ones(candidates: np.ndarray, taken: np.ndarray, tolerance: float, engine: str) -> np.ndarray:
    """Candidates that lie neither on a taken row nor on an earlier candidate."""
    if len(taken):
        candidates = candidates[assign(candidates, taken, engine)[1] > tolerance**2]
    exact = torch.from_numpy(candidates).to(engine_module(engine).device(), torch.float64)
    squares = exact.square().sum(dim=1)
    lies_on = squares[:, None] + squares - 2 * exact @ exact.T <= tolerance**2
    return candidates[~lies_on.tril(-1).any(dim=1).cpu().numpy()]
