"""A first-in first-out queue of features and the search in it (methods 3.2.4)."""

import torch

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # similarities of a tile


def push(entries_GSD: torch.Tensor, pushed: torch.Tensor, rows_GND: torch.Tensor) -> None:
    """Write rows behind the newest entries of their group's ring, over the oldest ones, around its end. In place.

    ``pushed`` int64 (1,), on the CPU: rows ever pushed into each group; the ring's next place is ``pushed % S``, its filled part the first ``min(pushed, S)``.
    Of more rows than the ring is long the last ones stay.
    """
    size, count = entries_GSD.shape[1], rows_GND.shape[1]
    kept = min(size, count)
    rows, start = rows_GND[:, count - kept :].to(entries_GSD), (int(pushed) + count - kept) % size
    before_end = min(kept, size - start)
    entries_GSD[:, start : start + before_end] = rows[:, :before_end]
    entries_GSD[:, : kept - before_end] = rows[:, before_end:]
    pushed += count


def nearest(entries_SD: torch.Tensor, queries_BD: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [B, count]: the places of the entries with the largest products with each query, best first; of equal ones the first where ``count`` is 1.

    Costs 2 B S D operations, in tiles of rows.
    """
    size = max(1, TILE_ELEMENTS.get(queries_BD.device.type, TILE_ELEMENTS["cpu"]) // len(entries_SD))
    tiles = (queries @ entries_SD.T for queries in queries_BD.to(entries_SD).split(size))
    if count == 1:
        return torch.cat([similarities.argmax(1, keepdim=True) for similarities in tiles])
    return torch.cat([similarities.topk(count, dim=1).indices for similarities in tiles])
