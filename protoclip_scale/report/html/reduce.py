"""Curves of any length as few points."""

from typing import NamedTuple

import numpy as np

MAX_POINTS = 240


class Reduced(NamedTuple):
    """Points of a curve: each is the mean of a part of the lines, beside the part's lowest and highest value. All float64 [n]; ``lines``: how many a point
    stands for, at most."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    lines: int


def reduced(x: np.ndarray, y: np.ndarray, max_points: int = MAX_POINTS) -> Reduced:
    """At most ``max_points`` parts of equally many neighbours, the last one perhaps smaller. Non-finite values are left out; up to ``max_points`` values stay as
    they are."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    lines = max(1, -(-len(x) // max_points))
    starts = np.arange(0, len(x), lines)
    if not len(starts):
        return Reduced(x, y, y, y, 1)
    counts = np.diff(np.append(starts, len(x)))
    means = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
    return Reduced(*means, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts), lines)
