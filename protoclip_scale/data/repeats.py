"""An episode across an epoch's end may hold a row twice; here the two are put into different batches. FROZEN with ``data/plan.py``."""

import numpy as np


def separate_repeats(row_ids: np.ndarray, companions: tuple[np.ndarray, ...], per_lane: int, bits: np.random.BitGenerator) -> None:
    """Swaps slots inside lanes, in place, until no step holds a row twice. An episode across an epoch's end may hold a row twice.

    A place whose row stands in the same step twice changes places with a random slot of its lane in another step, if possible one that makes no
    new repeat. A solution exists from two steps on: take the two places of a row as an edge between their lanes; every graph can be oriented so
    that in- and out-degree of each vertex differ by at most one.
    """
    lane_rows = row_ids.shape[1]
    flat = [array.reshape(-1) for array in (row_ids, *companions)]
    order = np.argsort(flat[0], kind="stable")
    twice = np.flatnonzero(flat[0][order[1:]] == flat[0][order[:-1]])
    partner = np.full(row_ids.size, -1, dtype=np.int64)
    partner[order[twice]], partner[order[twice + 1]] = order[twice + 1], order[twice]
    every = np.arange(row_ids.size)
    step = every % lane_rows // per_lane

    def swap(one: int, other: int) -> None:
        for array in flat:
            array[one], array[other] = array[other], array[one]
        first, second = int(partner[one]), int(partner[other])
        partner[one], partner[other] = second, first
        if second >= 0:
            partner[second] = one
        if first >= 0:
            partner[first] = other

    def repeated(place: int) -> bool:
        return partner[place] >= 0 and step[place] == step[partner[place]]

    waiting = [int(place) for place in every[(partner > every) & (step == step[partner])]]
    for _ in range(1000 * (len(waiting) + len(twice) + 1)):
        while waiting and not repeated(waiting[-1]):
            waiting.pop()
        if not waiting:
            return
        place = waiting[-1]
        if int(bits.random_raw()) & 1:
            place = int(partner[place])
        lane_start = place // lane_rows * lane_rows
        for guess in bits.random_raw(32):
            other = lane_start + int(guess) % lane_rows
            elsewhere = step[other] != step[place]
            if elsewhere and not (partner[other] >= 0 and step[partner[other]] == step[place]):
                swap(place, other)
                break
        else:
            other = lane_start + int(bits.random_raw()) % lane_rows
            if step[other] != step[place]:
                swap(place, other)
                waiting.append(place)
    raise AssertionError("repeated rows could not be separated")
