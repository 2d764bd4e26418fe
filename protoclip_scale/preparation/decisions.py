"""Between the passes: which rows show an evaluation image, repeat an earlier row, or nearly do. Made once from the hashes of all rows."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protoclip_scale.engine.faults import event
from protoclip_scale.preparation.duplicates import first_equal, first_near, first_near_within, nearest_in
from protoclip_scale.preparation.settings import Settings
from protoclip_scale.preparation.shards import publish_arrays

REASONS = ("leaked", "exact duplicate", "near duplicate")  # a row counts under the first that holds
LEAKED, EXACT, NEAR = range(len(REASONS))


class Decisions(NamedTuple):
    """Rows to be dropped, in order. row: their numbers. reason: place in REASONS. of: number of the kept row that each repeats; of the evaluation image where leaked."""

    row: np.ndarray
    reason: np.ndarray
    of: np.ndarray


class EvaluationHashes(NamedTuple):
    """hashes: uint64, number: int64, which evaluation image each belongs to."""

    hashes: np.ndarray
    number: np.ndarray


def decide(hashes: dict[str, np.ndarray], evaluation: EvaluationHashes, settings: Settings) -> Decisions:
    """hashes: arrays row (int64, ascending), pixels, perceptual, captions (uint64) of all rows that were encoded.

    Leaked rows first; the rest are compared with each other, so that a row never goes because of one that is not kept.
    30 bytes a row beside the sorts of ``duplicates``.
    """
    row = hashes["row"]
    reason = np.full(len(row), -1, dtype=np.int8)
    of = np.full(len(row), -1, dtype=np.int64)
    if len(evaluation.hashes):
        found = nearest_in(evaluation.hashes, hashes["perceptual"], settings.radius)
        reason[found >= 0] = LEAKED
        of[found >= 0] = evaluation.number[found[found >= 0]]
    by_pair = settings.deduplicate_by == "pair"
    if settings.deduplicate != "none":
        left = np.flatnonzero(reason < 0)
        keys = [hashes["pixels"][left], *([hashes["captions"][left]] if by_pair else [])]
        _mark(EXACT, left, first_equal(*keys), row, reason, of)
    if settings.deduplicate == "perceptual":
        left = np.flatnonzero(reason < 0)
        near = hashes["perceptual"][left]
        first = first_near_within(hashes["captions"][left], near, settings.radius) if by_pair else first_near(near, settings.radius)
        _mark(NEAR, left, first, row, reason, of)
        _follow(row, reason, of)
    dropped = np.flatnonzero(reason >= 0)
    return Decisions(row[dropped], reason[dropped], of[dropped])


def _mark(kind: int, left: np.ndarray, first: np.ndarray, row: np.ndarray, reason: np.ndarray, of: np.ndarray) -> None:
    repeats = first != np.arange(len(left))
    reason[left[repeats]] = kind
    of[left[repeats]] = row[left[first[repeats]]]


def _follow(row: np.ndarray, reason: np.ndarray, of: np.ndarray) -> None:
    """A row equal to one that went as a near duplicate repeats the row that stayed."""
    exact = np.flatnonzero(reason == EXACT)
    place = np.searchsorted(row, of[exact])
    gone = reason[place] == NEAR
    of[exact[gone]] = of[place[gone]]


def save(decisions: Decisions, path: Path) -> None:
    """Appears whole."""
    publish_arrays(path, decisions._asdict())
    event("prepare.decided")


def load(path: Path) -> Decisions:
    with np.load(path, allow_pickle=False) as saved:
        return Decisions(*(saved[name] for name in Decisions._fields))


def gather(arrays: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of all shards one after another."""
    return {name: np.concatenate([shard[name] for shard in arrays]) for name in arrays[0]}


def entries(decisions: Decisions, kinds: tuple[int, ...], key: Callable[[int], str], key_of: Callable[[int], str]) -> Iterator[dict[str, str]]:
    """What a list of dropped rows says of each: its place, the reason, and the row or image it repeats. key, key_of: number -> text."""
    for row, reason, of in zip(*(array.tolist() for array in decisions), strict=True):
        if reason in kinds:
            yield {"row": key(row), "reason": REASONS[reason], "of": key_of(of)}
