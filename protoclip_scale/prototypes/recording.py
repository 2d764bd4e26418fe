"""What training leaves behind for later clusterings: the prototype features of every row, as they were when it was trained on.

One feature store per episode, ``recorded/episode-000012`` in the run directory (the next owner of a row may be another machine): float16, one part per
lane, with the row id of every row, so that a row is found again wherever a later epoch puts it.
"""

import contextlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.shared_files import wait_for

COLUMNS = {"image": "image_prototype", "text": "text_prototype"}
DTYPE = "float16"
KIND = "recorded features"


def folder_of(run_folder: Path, episode: int) -> Path:
    return run_folder / "recorded" / f"episode-{episode:06d}"


def recorded_episodes(run_folder: Path) -> list[int]:
    """Episodes of which anything was recorded, ascending."""
    return sorted(int(path.name.removeprefix("episode-")) for path in (run_folder / "recorded").glob("episode-[0-9]*"))


def bytes_per_row(dim: int) -> int:
    """On disk: both features, the row id and the written-mark."""
    return 2 * dim * np.dtype(DTYPE).itemsize + 9


def create(run_folder: Path, episode: int, dim: int, lanes: int, lane_rows: int, info: dict[str, Any]) -> FeatureStore:
    """The store of an episode, to be written to; the same one when called again, by another rank or after a kill."""
    layout = {"kind": KIND, "episode": episode, **info}
    return FeatureStore.create(folder_of(run_folder, episode), dict.fromkeys(COLUMNS, dim), lanes, lane_rows, dtype=DTYPE, info=layout, row_ids=True)


def wait_until_created(run_folder: Path, episode: int) -> None:
    """Until this machine sees the store that rank 0 has created; for a while."""
    with contextlib.suppress(OSError):
        wait_for(folder_of(run_folder, episode) / "layout.json")


class Recorder:
    """Writes the own lanes of an episode. Opened again after a kill it goes on from ``first_slot`` of each lane: what lies behind it is trained again."""

    def __init__(self, store: FeatureStore, own_lanes: Sequence[int], first_slot: int = 0):
        self.store = store
        self._writers = [self.store.writer(lane) for lane in own_lanes]
        for writer in self._writers:
            writer.forget(slice(first_slot, None))

    def write(self, slots: torch.Tensor, row_ids: torch.Tensor, features: dict[str, torch.Tensor]) -> None:
        """The local rows of a batch, lane after lane: ``slots`` [B] in their lanes, ``features`` [B, dim] by the model's names."""
        arrays = {column: features[name].detach().to("cpu", torch.float16).numpy() for column, name in COLUMNS.items()}
        per_lane = len(slots) // len(self._writers)
        for number, writer in enumerate(self._writers):
            mine = slice(number * per_lane, (number + 1) * per_lane)
            writer.write(slots[mine].numpy(), {column: array[mine] for column, array in arrays.items()}, row_ids[mine].numpy())

    def flush(self) -> None:
        """Puts everything written so far on disk: before a checkpoint that counts on it."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def check(run_folder: Path, episode: int) -> None:
    """UserError if what an episode recorded is gone: the run cannot go on as it would have."""
    folder = folder_of(run_folder, episode)
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: clusterings to come need the features that training recorded there; restore it, or start anew in another --run-dir")


def open_recorded(run_folder: Path, episode: int) -> FeatureStore:
    """What an episode recorded, once rank 0 has sealed it; see ``check``."""
    with contextlib.suppress(OSError):
        wait_for(folder_of(run_folder, episode) / "manifest.json")
    check(run_folder, episode)
    return FeatureStore.open(folder_of(run_folder, episode))


def latest_visits(stores: Iterable[FeatureStore], row_ids: np.ndarray) -> list[tuple[FeatureStore, int, np.ndarray, np.ndarray]]:
    """Where the rows [n] were recorded last: (store, part, indices into ``row_ids``, rows in the part), for those found at all.

    ``stores`` newest first. Costs a search of each store's row ids among the n wanted ones; memory is one part's row ids.
    """
    wanted, of_wanted = np.unique(row_ids, return_inverse=True)
    places = np.full((len(wanted), 2), -1, dtype=np.int64)  # number of (store, part), row in the part
    parts: list[tuple[FeatureStore, int]] = []
    for store in stores:
        if not (places[:, 0] < 0).any():
            break
        unseen = places[:, 0] < 0
        for part in range(store.num_parts):
            ids = np.asarray(store.row_ids(part))
            at = np.minimum(np.searchsorted(wanted, ids), len(wanted) - 1)
            here = np.flatnonzero((wanted[at] == ids) & unseen[at] & store.written(part))
            here = here[here > places[at[here], 1]]  # an episode in which an epoch ends may hold a row twice, in different lanes: slots are in the order of steps
            places[at[here]] = np.stack([np.full(len(here), len(parts)), here], axis=1)
            parts.append((store, part))
    of_rows = places[of_wanted]
    order = np.lexsort((of_rows[:, 1], of_rows[:, 0]))
    order = order[of_rows[order, 0] >= 0]
    pieces = np.split(order, np.flatnonzero(np.diff(of_rows[order, 0])) + 1) if len(order) else []
    return [(*parts[of_rows[piece[0], 0]], piece, of_rows[piece, 1]) for piece in pieces]


def forget(run_folder: Path, episodes: Iterable[int]) -> None:
    for episode in episodes:
        shutil.rmtree(folder_of(run_folder, episode), ignore_errors=True)
