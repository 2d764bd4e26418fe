"""Making a teacher's store: a source's blocks -> an encoder -> PCA -> one row for each row of each source, by any number of processes.

    <out>.partial/sample/           features at full width of a seeded sample, from which the PCA is found; a part for each group of units
    <out>.partial/pca.safetensors
    <out>.partial/rows/             features of all rows, already reduced; a part for each group
    <out>/                          the store: a part for each source, and the PCA

Every step is a function of a unit or of all of them, never of processes or of where an earlier attempt was stopped: an interrupted extraction goes
on with the units that are not on disk, by as many processes as there are now, and ends with the same bytes. Each unit is encoded once.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from protoclip_scale import collectives
from protoclip_scale.data.sources import BlockReader
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.store import FeatureStore, check_folder, read_facts
from protoclip_scale.prototypes.teacher import COLUMN, KIND, describe_source
from protoclip_scale.prototypes.teacher_encoders import Encoder
from protoclip_scale.prototypes.teacher_pca import Projection, fit_pca
from protoclip_scale.prototypes.teacher_work import Work
from protoclip_scale.prototypes.teacher_writing import Features, Report, write_groups

PCA_ROWS = 262_144  # 1.1 GB at RoBERTa-large's width
BAD_ROWS_ALWAYS_ALLOWED = 10
SAMPLE = "embedding"
PCA_FILE = "pca.safetensors"


def extract_teacher(
    readers: Sequence[BlockReader],
    encoder: Encoder,
    out: str | Path,
    *,
    dim: int = 64,
    pca_rows: int = PCA_ROWS,
    dtype: str = "float16",
    max_bad_fraction: float = 1.0,
    report: Report = print,
    event: Callable[[str], None] = lambda name: None,
) -> FeatureStore:
    """The sealed store in ``out`` of every row of the readers' sources; a collective over processes that share the file system of ``out``.

    ``dim``: width after PCA, 0 for none; the PCA is found from at most ``pca_rows`` rows. ``report`` takes rank 0's lines, ``event`` the names of
    moments at which a test may kill. Raises UserError for bad input, if ``out`` holds another teacher, and if more images than ``max_bad_fraction``
    cannot be decoded. Costs one forward pass of the encoder per row; disk: rows x dim x 4 bytes and the sample, half of which stays; memory of rank
    0: the sample, of the others: some blocks.
    """
    out = Path(out)
    work = Work.of_sources([reader.block_rows for reader in readers])
    pca_rows = min(pca_rows, work.num_rows)
    _check_sizes(dim, pca_rows, work.num_rows, encoder)
    info: dict[str, Any] = {"kind": KIND, "sources": [describe_source(reader, encoder.columns(reader.source)) for reader in readers]}
    info |= encoder.info | {"dim": dim or encoder.width, "pca_rows": pca_rows if dim else 0}
    partial = out.parent / (out.name + ".partial")
    if not collectives.from_rank_zero(lambda: _is_finished(out, info, dtype)):
        report = report if collectives.rank() == 0 else lambda line: None
        collectives.from_rank_zero(lambda: _check_input(readers, work, encoder, partial, dim, pca_rows, dtype))
        rows = _Extraction(readers, encoder, partial, info, report, event).rows(work, dim, pca_rows, dtype)
        collectives.from_rank_zero(lambda: _publish(rows, work, out, encoder.images, max_bad_fraction, event))
    collectives.from_rank_zero(lambda: shutil.rmtree(partial, ignore_errors=True))
    return FeatureStore.open(out)


def _check_sizes(dim: int, pca_rows: int, num_rows: int, encoder: Encoder) -> None:
    if dim > encoder.width:
        raise UserError(f"--dim {dim} is more than the {encoder.width} features of {encoder.info['model']}; choose at most {encoder.width}, or 0 for no PCA")
    if dim < 0 or pca_rows < 1:
        raise UserError(f"--dim {dim} with --pca-rows {pca_rows}: the first is at least 0 (no PCA), the second at least 1")
    if dim and dim >= pca_rows:
        raise UserError(f"--dim {dim} needs more than {dim} rows to find it from; the recipe's sources hold {num_rows}, of which {pca_rows} are taken (--pca-rows)")


def _is_finished(out: Path, info: dict[str, Any], dtype: str) -> bool:
    """UserError, before anything is encoded, if ``out`` holds something else, be it unfinished."""
    check_folder(out)
    if not (out / "layout.json").exists():
        return False
    layout = read_facts(out / "layout.json")
    there = layout.get("info")
    if not isinstance(there, dict) or {key: there.get(key) for key in info} != info or layout.get("dtype") != dtype:
        raise UserError(f"--out {out} holds features of another teacher or of other data; remove that folder or choose another")
    return (out / "manifest.json").exists()


def _check_input(readers: Sequence[BlockReader], work: Work, encoder: Encoder, partial: Path, dim: int, pca_rows: int, dtype: str) -> None:
    """What would otherwise be noticed after hours: sources without a caption, and a full disk."""
    for reader in readers if not encoder.images else ():
        blocks = (reader.read(block, images=False).column("captions") for block in range(len(reader.block_rows)))
        if not any(text and text.strip() for block in blocks for cell in block.to_pylist() for text in cell or ()):
            columns = " or ".join(reader.source.columns.captions)
            raise UserError(f"source {reader.name!r} has no caption in any row of {columns}; correct data.sources columns.caption, or use --image-model")
    sample = pca_rows if dim else 0
    needed = 2 * FeatureStore.bytes_needed({COLUMN: dim or encoder.width}, work.num_rows, dtype) + FeatureStore.bytes_needed({SAMPLE: encoder.width}, sample)
    existing = next(folder for folder in partial.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free and not partial.exists():
        raise UserError(f"disk full: the features need {needed / 1e6:.0f} MB, {existing} has {free / 1e6:.0f} MB free; choose another --out, or a smaller --dim")


class _Extraction:
    """Writes the two stores of the unfinished extraction; its methods are collectives."""

    def __init__(self, readers: Sequence[BlockReader], encoder: Encoder, partial: Path, info: dict[str, Any], report: Report, event: Callable[[str], None]):
        self.readers, self.encoder, self.partial, self.info, self.report, self.event = readers, encoder, partial, info, report, event

    def rows(self, work: Work, dim: int, pca_rows: int, dtype: str) -> FeatureStore:
        """The sealed store of all rows, reduced."""
        if not dim:
            return self._write("rows", work, COLUMN, self.encoder.width, dtype, "encoding", lambda unit, block: self._encode(work, unit, block()))
        sample, chosen = work.sample(pca_rows)
        encoded = self._write(
            "sample", sample, SAMPLE, self.encoder.width, "float32", "encoding for the PCA", lambda unit, block: self._encode(sample, unit, block())
        )
        path = self.partial / PCA_FILE
        collectives.from_rank_zero(lambda: path.exists() or fit_pca(encoded, SAMPLE, dim, pca_rows).save(path))
        self.event("teacher.pca")
        projection = Projection.load(path)
        self.report(f"PCA {self.encoder.width} -> {dim} keeps {projection.explained:.1%} of the variance")
        number_in_sample = {int(unit): number for number, unit in enumerate(chosen)}

        def reduced(unit: int, block: Callable[[], pa.Table]) -> np.ndarray:
            if unit not in number_in_sample:
                return projection(self._encode(work, unit, block()))
            number = number_in_sample[unit]
            place = sample.rows_in_group(number)
            return projection(encoded.rows(SAMPLE, int(sample.group[number]), np.arange(place.start, place.stop)))

        return self._write("rows", work, COLUMN, dim, dtype, "encoding", reduced)

    def _encode(self, work: Work, unit: int, block: pa.Table) -> np.ndarray:
        return self.encoder.encode(block.slice(int(work.first_in_block[unit]), int(work.rows[unit])))

    def _write(self, name: str, work: Work, column: str, width: int, dtype: str, what: str, features: Features) -> FeatureStore:
        group_rows = work.group_rows
        store = FeatureStore.create(self.partial / name, {column: width}, len(group_rows), group_rows, dtype, self.info)
        return write_groups(store, work, features, self.readers, self.encoder.images, what, self.report, self.event)


def _publish(rows: FeatureStore, work: Work, out: Path, images: bool, max_bad_fraction: float, event: Callable[[str], None]) -> None:
    """The rows of all groups as one part for each source, sealed."""
    info = dict(rows.info)
    if images:
        bad = sum(int((~block.any(axis=1)).sum()) for group in range(rows.num_parts) for _, block in rows.blocks(COLUMN, group))
        if bad > max(BAD_ROWS_ALWAYS_ALLOWED, max_bad_fraction * work.num_rows):
            raise UserError(
                f"data: {bad} of {work.num_rows} images could not be decoded, more than data.max_bad_fraction {max_bad_fraction}; clean the data or raise the limit"
            )
        info["undecodable_rows"] = bad
    pca = rows.folder.parent / PCA_FILE
    if pca.exists():
        info["explained_variance"] = round(Projection.load(pca).explained, 4)
    num_sources = len(info["sources"])
    source_rows = [int(work.rows[work.source == source].sum()) for source in range(num_sources)]
    store = FeatureStore.create(out, rows.columns, num_sources, source_rows, str(rows.dtype), info)
    if pca.exists():
        shutil.copyfile(pca, out / f".{PCA_FILE}")
        os.replace(out / f".{PCA_FILE}", out / PCA_FILE)
    groups_source = work.source[[work.units_of(group)[0] for group in range(rows.num_parts)]]
    for source in range(num_sources):
        with store.writer(source) as writer:
            written = writer.written
            for group in np.flatnonzero(groups_source == source).tolist():
                first_row = int(work.first_in_source[work.units_of(group)[0]])
                if not written[first_row : first_row + rows.part_rows[group]].all():
                    for start, block in rows.blocks(COLUMN, group):
                        writer.write(slice(first_row + start, first_row + start + len(block)), {COLUMN: block})
                    writer.flush()
                    event("teacher.copied")
    store.seal()
    event("teacher.sealed")
