"""Features of an external model, one row per row of a source, looked up by row id (methods 6.2, step 5, and 6.6).

A teacher's store has one part per source, in the order of that source's blocks, and names each source by its fingerprint: rows
belong together because the data is the same, not because two files happen to be of one length.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from protoclip_scale.data.index import Index
from protoclip_scale.data.rows import unpack_row_ids
from protoclip_scale.data.sources import BlockReader
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.store import FeatureStore

COLUMN = "teacher"
KIND = "teacher features"
NOT_COLUMNS = ("name", "fingerprint")  # of what describe_source says


def describe_source(reader: BlockReader, columns: dict[str, str]) -> dict[str, str]:
    """What a teacher's store says about one part; ``columns``: those it was made from."""
    return {"name": reader.name, "fingerprint": reader.fingerprint, **columns}


class TeacherFeatures:
    """``dim``: width of a row; ``info``: the model, pooling and captions they were made from. Use ``open_teacher``."""

    def __init__(self, store: FeatureStore, part_of_source: np.ndarray, first_rows: list[np.ndarray]):
        self._store = store
        self._part_of_source = part_of_source
        self._first_rows = first_rows  # of each source: the number of each block's first row in the part
        self.dim = store.columns[COLUMN]
        self.info: dict[str, Any] = store.info

    @property
    def identity(self) -> str:
        """Changes when the teacher, its data or its width does."""
        return hashlib.sha256(json.dumps(self._store.layout, sort_keys=True).encode()).hexdigest()

    def of_source(self, source: int) -> np.ndarray:
        """[rows, dim] of all rows of the index's source with this number, block by block, memory-mapped in the store's dtype."""
        return self._store.read(COLUMN, int(self._part_of_source[source]))

    def rows(self, row_ids: np.ndarray) -> np.ndarray:
        """float32 [n, dim] of row ids [n]. Raises UserError if a stored row is not finite."""
        sources, blocks, rows_in_block = unpack_row_ids(np.asarray(row_ids))
        features = np.empty((len(sources), self.dim), dtype=np.float32)
        for source in np.unique(sources):
            of_source = np.flatnonzero(sources == source)
            first_rows = self._first_rows[source]
            rows = first_rows[blocks[of_source]] + rows_in_block[of_source]
            assert (rows < first_rows[blocks[of_source] + 1]).all(), "a row id names a row that its block does not have"
            features[of_source] = self._store.rows(COLUMN, int(self._part_of_source[source]), rows)
        return features


def open_teacher(folder: str | Path, index: Index) -> TeacherFeatures:
    """The teacher's features of an index's sources, found by fingerprint; the store may hold more sources, in any order. Of several
    parts made from the same data and columns, that with the source's own number is taken.

    Raises UserError if the store is missing or unfinished, is no teacher's, was made from other data (naming both), has another
    number of rows than a source, or has several parts for it that may differ.
    """
    store = FeatureStore.open(folder)
    if store.info.get("kind") != KIND or COLUMN not in store.columns:
        raise UserError(
            f"teacher features {folder}: this feature store was not made by tools/extract_teacher.py; "
            "set objectives.teacher.features to one that was"
        )
    parts, first_rows = [], []
    for number, (name, fingerprint) in enumerate(zip(index.source_names, index.fingerprints, strict=True)):
        part = _part_of(store, number, name, fingerprint)
        if part is None:
            known = ", ".join(f"{source['name']} ({source['fingerprint'][:16]})" for source in store.info["sources"])
            raise UserError(
                f"teacher features {folder} were made from other data: source {name} has fingerprint {fingerprint[:16]}, "
                f"they are of {known}; run tools/extract_teacher.py on this recipe, or correct objectives.teacher.features"
            )
        block_rows = index.block_rows[index.block_source == number]
        if block_rows.sum() != store.part_rows[part]:
            raise UserError(
                f"teacher features {folder} have {store.part_rows[part]} rows for source {name}, which has {block_rows.sum()}; "
                "run tools/extract_teacher.py again"
            )
        parts.append(part)
        first_rows.append(np.concatenate([[0], np.cumsum(block_rows)]))
    return TeacherFeatures(store, np.array(parts), first_rows)


def _part_of(store: FeatureStore, number: int, name: str, fingerprint: str) -> int | None:
    """The part for the source with this number; None if no part was made from its data."""
    sources = store.info["sources"]
    parts = [part for part, source in enumerate(sources) if source["fingerprint"] == fingerprint]
    if len(parts) < 2:
        return parts[0] if parts else None
    columns = [{key: value for key, value in sources[part].items() if key not in NOT_COLUMNS} for part in parts]
    if all(each == columns[0] for each in columns):
        if number in parts:
            return number
        if columns[0]:  # an encoder's: the same data through the same columns has the same features
            return parts[0]
    raise UserError(
        f"teacher features {store.folder} have {len(parts)} parts for source {name}, which may differ: parts {', '.join(map(str, parts))}, none of them sure to be "
        f"that of source {number}; run tools/extract_teacher.py on this recipe"
    )
