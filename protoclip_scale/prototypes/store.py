"""Memory-mapped feature arrays on disk: one file per column and part, one byte per row that says "written".

A store is created, written part by part (each part by one writer, in any order, over any number of interruptions) and
sealed; only a sealed store can be opened. Reading never takes an unwritten or non-finite row for a feature.

    folder/layout.json         columns, dtype, rows of each part, info; written by create
    folder/<column>.<part>.npy rows x dim
    folder/row_ids.<part>.npy  one int64 per row, where the store names its rows
    folder/written.<part>.npy  one uint8 per row
    folder/manifest.json       written last, by seal: the layout and the parts that are complete, or what they lack
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_json
from protoclip_scale.prototypes.mapped import let_pages_go, take_rows
from protoclip_scale.prototypes.store_writer import MARKS, ROW_IDS, Writer

SCHEMA_VERSION = 1
DTYPES = ("float16", "float32")
BLOCK_ROWS = 16384
MARKS_AT_ONCE = 1 << 20


class FeatureStore:
    """Columns of float16 or float32 features in numbered parts (the lanes of an episode, or the sources of a teacher).

    ``complete``: the sealed parts; ``missing``: rows of each of them that were never written, where sealing allowed that; ``named_rows``: whether
    every row has a row id.
    """

    def __init__(self, folder: str | Path, layout: dict[str, Any], complete: Iterable[int], missing: Iterable[int] | None = None):
        self.folder = Path(folder)
        self.layout = layout
        self.columns: dict[str, int] = dict(layout["columns"])
        self.dtype = np.dtype(layout["dtype"])
        self.part_rows: list[int] = list(layout["rows"])
        self.info: dict[str, Any] = dict(layout["info"])
        self.named_rows: bool = layout.get("row_ids", False) is True
        complete = tuple(complete)
        self.complete = frozenset(complete)
        self.missing: dict[int, int] = dict(zip(complete, [0] * len(complete) if missing is None else missing, strict=True))

    # -- making one

    @classmethod
    def create(
        cls,
        folder: str | Path,
        columns: dict[str, int],
        parts: int,
        rows: int | Sequence[int],
        dtype: str = "float32",
        info: dict[str, Any] | None = None,
        row_ids: bool = False,
    ) -> "FeatureStore":
        """A store to write to. ``rows``: of each part, or one number for all; ``row_ids``: every row carries one. A second call with the same arguments
        (another rank, or after an interruption) goes on with what is there; with other arguments it raises UserError and touches nothing."""
        part_rows = [rows] * parts if isinstance(rows, int) else [int(number) for number in rows]
        assert len(part_rows) == parts and dtype in DTYPES
        assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) and name not in (MARKS, ROW_IDS) for name in columns), columns
        layout = {"schema_version": SCHEMA_VERSION, "columns": dict(columns), "dtype": dtype, "rows": part_rows, "info": info or {}}
        layout = json.loads(json.dumps(layout | ({"row_ids": True} if row_ids else {})))
        path = Path(folder) / "layout.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                publish_json(path, layout)
        except OSError as error:
            raise UserError(f"feature store {folder} cannot be written: {error.strerror}; choose another folder") from None
        found = read_facts(path)
        if found != layout:
            different = [key for key in {**layout, **found} if found.get(key) != layout.get(key)]
            raise UserError(
                f"feature store {folder}: it was begun with other {' and '.join(different)} (there {_short(found, different)}, "
                f"now {_short(layout, different)}); remove that folder or choose another"
            )
        return cls(folder, layout, ())

    def writer(self, part: int) -> Writer:
        """The one writer of a part; it goes on where an earlier one was interrupted. UserError while another process has it."""
        return Writer(self, part)

    def unfinished(self) -> list[int]:
        """Parts of which rows are not on disk yet."""
        return [part for part in range(self.num_parts) if not self.begun(part) or self.unwritten(part)[0]]

    def begun(self, part: int) -> bool:
        """Whether a part has had a writer."""
        return (self.folder / f"{MARKS}.{part:05d}.npy").exists()

    def seal(self, parts: Iterable[int] | None = None, allow_missing: bool = False) -> "FeatureStore":
        """Checks every row of ``parts`` (default: all; a node with its own scratch folder passes its lanes) and publishes the manifest.

        For one process, once all writers are closed. Raises UserError for unwritten or non-finite rows; with ``allow_missing`` unwritten rows are
        counted in the manifest instead, and readers ask ``written``. Reads all features once.
        """
        complete = sorted(range(self.num_parts) if parts is None else parts)
        missing = [self.unwritten(part)[0] for part in complete] if allow_missing else None
        reader = FeatureStore(self.folder, self.layout, complete, missing)
        for part in complete:
            reader._check_part(part)
            for column in self.columns:
                for _ in reader.blocks(column, part):
                    pass
            (self.folder / f".lock.{part:05d}").unlink(missing_ok=True)
        publish_json(self.folder / "manifest.json", {**self.layout, "complete": complete} | ({"missing": missing} if allow_missing else {}))
        return FeatureStore.open(self.folder)

    # -- reading one

    @classmethod
    def open(cls, folder: str | Path) -> "FeatureStore":
        """A sealed store, read-only. Raises UserError if it is missing or unfinished, or a file is missing or of another length."""
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            state = (
                "it was never finished: run what writes it again" if (folder / "layout.json").exists() else "there is none: check the path"
            )
            raise UserError(f"feature store {folder}: no manifest.json; {state}")
        store = cls.described(folder)
        for part in sorted(store.complete):
            store._check_part(part)
        return store

    @classmethod
    def described(cls, folder: str | Path) -> "FeatureStore":
        """A store as its manifest describes it, or as its layout does while it is unfinished, without a look at its arrays: to inspect it. Raises
        UserError if neither can be read or is of this version."""
        folder = Path(folder)
        name = "manifest.json" if (folder / "manifest.json").exists() else "layout.json"
        facts = read_facts(folder / name)
        if facts.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"feature store {folder}: schema version {facts.get('schema_version')}, not {SCHEMA_VERSION}; make it again")
        try:
            complete = facts.pop("complete") if name == "manifest.json" else ()
            return cls(folder, facts, complete, facts.pop("missing", None))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"feature store {folder}: {name} is damaged ({error!r}); remove that folder and make the store again") from None

    @property
    def num_parts(self) -> int:
        return len(self.part_rows)

    @property
    def num_rows(self) -> int:
        return sum(self.part_rows)

    def read(self, column: str, part: int) -> np.ndarray:
        """[rows, dim] memory-mapped, in the store's dtype. Cheap; its pages stay resident until ``let_pages_go``. Rows that are missing hold anything."""
        assert part in self.complete, f"part {part} of {self.folder} is not among the sealed ones {sorted(self.complete)}"
        return self.load(f"{column}.{part:05d}.npy", (self.part_rows[part], self.columns[column]), self.dtype)

    def row_ids(self, part: int) -> np.ndarray:
        """int64 [rows] memory-mapped, of a store with ``named_rows``. Rows that are missing hold anything."""
        assert self.named_rows, f"{self.folder} was created without row_ids"
        return self.load(f"{ROW_IDS}.{part:05d}.npy", (self.part_rows[part],), np.dtype(np.int64))

    def written(self, part: int) -> np.ndarray:
        """bool [rows]: which rows a part has."""
        return np.asarray(self._marks(part)) == 1

    def unwritten(self, part: int) -> tuple[int, int]:
        """(number of rows that were never written, the first of them or -1), piece by piece: a count of 100 million rows takes 2 MB."""
        marks, number, first = self._marks(part), 0, -1
        for start in range(0, len(marks), MARKS_AT_ONCE):
            unwritten = np.asarray(marks[start : start + MARKS_AT_ONCE]) != 1
            let_pages_go(marks)
            if unwritten.any():
                first = start + int(np.argmax(unwritten)) if first < 0 else first
                number += int(np.count_nonzero(unwritten))
        return number, first

    def blocks(self, column: str, part: int, block_rows: int = BLOCK_ROWS) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 copy of up to ``block_rows`` rows) over a part; resident memory stays at one block. Missing rows are zeros.

        Raises UserError for a non-finite row."""
        features = self.read(column, part)
        marks = self._marks(part) if self.missing[part] else None
        for start in range(0, len(features), block_rows):
            block = features[start : start + block_rows].astype(np.float32)
            let_pages_go(features)
            if marks is not None:
                block[marks[start : start + block_rows] != 1] = 0
                let_pages_go(marks)
            self.check_finite(block, column, part, np.arange(start, start + len(block)))
            yield start, block

    def rows(self, column: str, part: int, rows: np.ndarray) -> np.ndarray:
        """float32 copies [len(rows), dim] of the given rows of a part, none of them missing. UserError for a non-finite one."""
        features = self.read(column, part)
        assert not self.missing[part] or self.written(part)[rows].all(), f"rows asked for were never written to part {part} of {self.folder}"
        taken = take_rows(features, rows)
        self.check_finite(taken, column, part, rows)
        return taken

    @staticmethod
    def bytes_needed(columns: dict[str, int], num_rows: int, dtype: str = "float32", row_ids: bool = False) -> int:
        """Disk space of a store in bytes, up to a few hundred bytes per file."""
        return num_rows * (1 + 8 * row_ids + sum(columns.values()) * np.dtype(dtype).itemsize)

    # -- checks

    def load(self, name: str, shape: tuple[int, ...], dtype: np.dtype, mode: str = "r") -> np.ndarray:
        """A file of the folder, memory-mapped. UserError if it is missing, cut short, or of another shape or dtype."""
        path = self.folder / name
        try:
            array = np.load(path, mmap_mode=mode, allow_pickle=False)
        except FileNotFoundError:
            raise UserError(f"feature store {self.folder}: {name} is missing; make the store again") from None
        except (ValueError, OSError, EOFError) as error:
            raise UserError(
                f"feature store {self.folder}: {name} cannot be read, it was cut short or damaged ({error}); make it again"
            ) from None
        if array.shape != shape or array.dtype != dtype:
            raise UserError(
                f"feature store {self.folder}: {name} holds {array.dtype} {list(array.shape)}, the manifest says {dtype} "
                f"{list(shape)}; make it again"
            )
        return array

    def check_finite(self, block: np.ndarray, column: str, part: int, rows: np.ndarray) -> None:
        """UserError that names the first of ``rows`` [n] of which ``block`` [n, dim] is not finite."""
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            raise UserError(
                f"feature store {self.folder}: column {column}, part {part}, row {rows[int(np.argmin(finite))]} is not finite "
                f"in {self.dtype} ({int((~finite).sum())} such rows in this block)"
            )

    def _marks(self, part: int) -> np.ndarray:
        return self.load(f"{MARKS}.{part:05d}.npy", (self.part_rows[part],), np.dtype(np.uint8))

    def _check_part(self, part: int) -> None:
        number, first = self.unwritten(part)
        if number != self.missing[part]:
            allowed = f", of which the manifest allows {self.missing[part]}" if self.missing[part] else ""
            raise UserError(
                f"feature store {self.folder}: {number} of {self.part_rows[part]} rows of part {part} were never written{allowed}"
                f"{f', the first is row {first}' if number else ''}; run what writes it again"
            )
        for column in self.columns:
            self.read(column, part)
        if self.named_rows:
            self.row_ids(part)


def check_folder(out: Path) -> None:
    """UserError if a folder ``out`` cannot be made, or written into if it is there: before hours of work that would end in it. Touches nothing."""
    existing = next(place for place in (out.absolute(), *out.absolute().parents) if os.path.exists(place))
    if not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is a file; name a folder")
    if out.name in ("", ".."):
        raise UserError(f"--out {out}: features get a folder of their own, and one beside it while they are made; name a new one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {existing} cannot be written; choose another folder")


def read_facts(path: Path) -> dict[str, Any]:
    """layout.json or manifest.json. UserError if it is no JSON object."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"feature store {path.parent}: {path.name} cannot be read ({error}); remove that folder and make the store again") from None
    return facts


def _short(layout: dict[str, Any], keys: list[str], limit: int = 160) -> str:
    text = json.dumps({key: layout.get(key) for key in keys})
    return text if len(text) <= limit else text[:limit] + "..."
