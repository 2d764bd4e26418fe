"""A teacher's clusters of a whole corpus, found once: one label for every row of every source, for all episodes.

    <folder>/labels.npy              int32 [rows], source by source, block by block, row by row
    <folder>/centroids.safetensors   centroids float32 [K, dim], counts int64 [K]
    <folder>/manifest.json           what they were made from, figures, sha256 of both files

The folder appears whole, by one rename. Clusters that were made from other features, sources or settings are made again.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from protoclip_scale import collectives
from protoclip_scale.data.index import Index
from protoclip_scale.data.rows import unpack_row_ids
from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_json, sync
from protoclip_scale.prototypes import kmeans
from protoclip_scale.prototypes.mapped import let_pages_go
from protoclip_scale.prototypes.store import read_facts
from protoclip_scale.prototypes.teacher import TeacherFeatures
from protoclip_scale.recipe.schema import Prototypes
from protoclip_scale.shared_files import once_seen

KIND = "teacher clusters"
SCHEMA_VERSION = 1
LABELS, CENTROIDS, MANIFEST = "labels.npy", "centroids.safetensors", "manifest.json"
SETTINGS = ("clusters", "iterations", "restarts", "start", "settled", "spherical", "engine", "distances")  # those that k-means looks at
COPIED_LABELS = 1 << 20


class TeacherClusters:
    """``centroids``: float32 [K, dim]; ``counts``: int64 [K], rows of each cluster; ``figures``: objective, empty clusters and imbalance of the k-means,
    ``history``: a line for each of its iterations. Use ``open_teacher_clusters``."""

    def __init__(self, folder: Path, manifest: dict[str, Any], index: Index):
        self.figures: dict[str, float] = manifest["figures"]
        self.history: list[dict[str, Any]] = manifest["history"]
        arrays = once_seen(folder / CENTROIDS, lambda: safetensors.numpy.load_file(folder / CENTROIDS))
        self.centroids, self.counts = arrays["centroids"], arrays["counts"]
        self._labels = once_seen(folder / LABELS, lambda: np.load(folder / LABELS, mmap_mode="r", allow_pickle=False))
        self._first_rows = np.concatenate([[0], np.cumsum(index.block_rows)])
        self._first_blocks = np.searchsorted(index.block_source, np.arange(len(index.source_names)))

    def labels(self, row_ids: np.ndarray) -> np.ndarray:
        """int32 [n] of row ids [n]; resident memory does not grow with the corpus."""
        source, block, row_in_block = unpack_row_ids(np.asarray(row_ids))
        blocks = self._first_blocks[source] + block
        rows = self._first_rows[blocks] + row_in_block
        assert (rows < self._first_rows[blocks + 1]).all(), "a row id names a row that its block does not have"
        labels = np.array(self._labels[rows])
        let_pages_go(self._labels)
        return labels


def open_teacher_clusters(folder: Path, teacher: TeacherFeatures, index: Index, settings: Prototypes, seed: Sequence[int]) -> TeacherClusters | None:
    """The clusters in ``folder``; None if there are none, or they were made from other features, sources, settings or another seed. A collective: rank 0
    looks for all. Raises UserError if they are damaged. Reads all labels once."""
    manifest = collectives.from_rank_zero(lambda: _checked(folder, _made_from(teacher, index, settings, seed)))
    return TeacherClusters(folder, manifest, index) if manifest else None


def cluster_teacher(
    folder: Path,
    teacher: TeacherFeatures,
    index: Index,
    settings: Prototypes,
    seed: Sequence[int],
    lanes: Iterable[int],
    num_lanes: int,
    on_iteration: Callable[[kmeans.Iteration], None] | None = None,
    event: Callable[[str], None] = lambda name: None,
) -> TeacherClusters:
    """Clusters the teacher's features of all rows of the index's sources, and publishes the labels in ``folder``, which all ranks share; a collective.

    The corpus is cut into ``num_lanes`` pieces of neighbouring rows, of which ``lanes`` are this rank's: so the result does not depend on the number of
    ranks. ``on_iteration`` is that of ``kmeans.fit``, with its errors and costs; ``event`` takes the names of moments at which a test may kill.
    Disk: 8 bytes a row, half of which stay. Nothing is left of clusters that were interrupted.
    """
    pieces = [_lane_pieces(teacher, index, lane, num_lanes) for lane in lanes]
    flat = [piece for lane_pieces in pieces for piece in lane_pieces]
    result = kmeans.fit([features for _, features in flat], [np.arange(first, first + len(features)) for first, features in flat], settings, seed, on_iteration)
    unfinished = folder.with_name(f".{folder.name}.writing")
    collectives.from_rank_zero(lambda: _begin(unfinished))
    labels = iter(result.labels)
    for lane, lane_pieces in zip(lanes, pieces, strict=True):
        _save(unfinished / f"{lane}.npy", np.concatenate([next(labels) for _ in lane_pieces]))
    event("teacher.labels")
    collectives.barrier()
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "made_from": _made_from(teacher, index, settings, seed),
        "rows": index.num_rows,
        "figures": {"objective": result.objective, "empty": result.empties, "imbalance": result.imbalance},
        "history": [vars(line) for line in result.history],
    }
    arrays = {"centroids": np.ascontiguousarray(result.centroids), "counts": np.ascontiguousarray(result.counts, dtype=np.int64)}
    collectives.from_rank_zero(lambda: _publish(unfinished, folder, manifest, arrays, num_lanes, event))
    found = open_teacher_clusters(folder, teacher, index, settings, seed)
    assert found is not None, f"{folder} is not what was just published there"
    return found


def _lane_pieces(teacher: TeacherFeatures, index: Index, lane: int, num_lanes: int) -> list[tuple[int, np.ndarray]]:
    """(number in the corpus of the first row, mapped rows) of a lane, one for each source that it reaches into; at least one, be it empty."""
    first_row, last_row = (index.num_rows * edge // num_lanes for edge in (lane, lane + 1))
    pieces, first_of_source = [], 0
    for source in range(len(index.source_names)):
        rows = index.source_rows(source)
        first, last = max(first_row, first_of_source), min(last_row, first_of_source + rows)
        if first < last:
            pieces.append((first, teacher.of_source(source)[first - first_of_source : last - first_of_source]))
        first_of_source += rows
    return pieces or [(first_row, teacher.of_source(0)[:0])]


def _made_from(teacher: TeacherFeatures, index: Index, settings: Prototypes, seed: Sequence[int]) -> dict[str, Any]:
    return {
        "teacher": teacher.identity,
        "sources": list(index.fingerprints),
        "settings": {name: getattr(settings, name) for name in SETTINGS},
        "seed": [int(number) for number in seed],
    }


def _checked(folder: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, if it is that of these clusters."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_facts(folder / MANIFEST)
    if manifest.get("schema_version") != SCHEMA_VERSION or manifest.get("made_from") != made_from:
        return None
    check_files(folder, manifest)
    return manifest


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """UserError if a file of published clusters is missing or has changed."""
    for name in (LABELS, CENTROIDS):
        try:
            intact = _sha256(folder / name) == manifest["sha256"][name]
        except (OSError, KeyError, TypeError):
            intact = False
        if not intact:
            raise UserError(f"teacher clusters {folder}: {name} is missing or damaged; remove that folder, then they are made again")


def _begin(unfinished: Path) -> None:
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(unfinished, error) from error


def _save(path: Path, labels: np.ndarray) -> None:
    try:
        once_seen(path, lambda: np.save(path, labels.astype(np.int32, copy=False), allow_pickle=False))
    except OSError as error:
        raise _unwritable(path, error) from error


def _publish(
    unfinished: Path, folder: Path, manifest: dict[str, Any], arrays: dict[str, np.ndarray], num_lanes: int, event: Callable[[str], None]
) -> None:
    """Labels of all lanes as one file, and what else belongs to them; then in place of what was there."""
    facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int32)), "fortran_order": False, "shape": (manifest["rows"],)}
    try:
        with open(unfinished / LABELS, "wb") as file:  # written, not mapped: a full disk is then an error and not a signal
            np.lib.format.write_array_header_1_0(file, facts)
            for lane in range(num_lanes):
                path = unfinished / f"{lane}.npy"
                labels = np.load(path, mmap_mode="r", allow_pickle=False)
                for start in range(0, len(labels), COPIED_LABELS):
                    file.write(labels[start : start + COPIED_LABELS].data)
                    let_pages_go(labels)
                path.unlink()
        (unfinished / CENTROIDS).write_bytes(safetensors.numpy.save(arrays))
        publish_json(unfinished / MANIFEST, manifest | {"sha256": {name: _sha256(unfinished / name) for name in (LABELS, CENTROIDS)}})
        for path in (unfinished / LABELS, unfinished / CENTROIDS, unfinished):
            sync(path)
        event("teacher.clusters.written")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        sync(folder.parent)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"teacher clusters {path} cannot be written: {error.strerror}; free space there, or choose another run directory")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
