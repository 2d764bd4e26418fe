"""What a feature store, or a teacher's clusters, hold: facts for a person who looks at a folder, whole, unfinished or damaged."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from protoclip_scale.errors import UserError
from protoclip_scale.prototypes import teacher_clusters
from protoclip_scale.prototypes.mapped import take_rows
from protoclip_scale.prototypes.store import FeatureStore, read_facts

DEFAULT_KIND = "episode features"
SAMPLE_ROWS = 10_000


@dataclass(frozen=True)
class PartFacts:
    """``written``: None if no writer has begun it, or it cannot be told; ``problem``: why a file of it cannot be read, or empty."""

    number: int
    name: str
    rows: int
    written: int | None
    sealed: bool
    problem: str


@dataclass(frozen=True)
class SampleFacts:
    """Of the finite ones among ``rows`` sampled rows: norms, values, how many differ, how many are all zeros. None where there are none."""

    column: str
    rows: int
    non_finite: int
    zeros: int
    distinct: int
    norms: tuple[float, float, float] | None  # least, mean, most
    values: tuple[float, float, float] | None


@dataclass(frozen=True)
class Inspection:
    """``about``: what is said of all, in order; ``problems``: lines, the worst first."""

    kind: str
    state: str
    about: dict[str, str]
    parts: list[PartFacts] = field(default_factory=list)
    samples: list[SampleFacts] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def inspect(folder: str | Path, sample_rows: int = SAMPLE_ROWS) -> Inspection:
    """Facts of a folder, from a seeded sample of up to ``sample_rows`` written rows. Raises UserError if it holds neither a store nor clusters."""
    folder = Path(folder)
    manifest = folder / "manifest.json"
    if manifest.exists() and read_facts(manifest).get("kind") == teacher_clusters.KIND:
        return _clusters(folder, read_facts(manifest))
    if not manifest.exists() and not (folder / "layout.json").exists():
        inside = sorted(path.parent.name for path in folder.glob("*/layout.json"))
        hint = f"it holds {', '.join(inside[:4])}{' ...' if len(inside) > 4 else ''}, name one of them" if inside else "check the path"
        raise UserError(f"{folder} is no feature store, it has neither layout.json nor manifest.json; {hint}")
    store = FeatureStore.described(folder)
    parts = [_part(store, part) for part in range(store.num_parts)]
    readable = [part for part in parts if part.written and not part.problem]
    taken = _sample_of_parts(store, readable, sample_rows)
    samples = [_sample(column, np.concatenate([taken_rows(store, column, part, rows) for part, rows in taken])) for column in store.columns if taken]
    problems = [part.problem for part in parts if part.problem]
    problems += [f"feature store {folder}: {each.non_finite} of {each.rows} sampled rows of column {each.column} are not finite; make it again" for each in samples if each.non_finite]
    return Inspection(store.info.get("kind", DEFAULT_KIND), _state(store, parts), _about(store, taken), parts, samples, problems)


def taken_rows(store: FeatureStore, column: str, part: int, rows: np.ndarray) -> np.ndarray:
    """float32 copies of rows of a part, sealed or not."""
    return take_rows(store.load(f"{column}.{part:05d}.npy", (store.part_rows[part], store.columns[column]), store.dtype), rows)


def _part(store: FeatureStore, part: int) -> PartFacts:
    rows, sealed, written, problem = store.part_rows[part], part in store.complete, None, ""
    try:
        if sealed or store.begun(part):
            written = rows - store.unwritten(part)[0]
            for column in store.columns:
                taken_rows(store, column, part, np.empty(0, dtype=np.int64))
            if store.named_rows:
                store.row_ids(part)
        if sealed and written != rows - store.missing[part]:
            problem = f"feature store {store.folder}: part {part} has {written} rows, its manifest says {rows - store.missing[part]}; make it again"
    except UserError as error:
        problem = str(error)
    sources = store.info.get("sources", [])
    name = sources[part].get("name", "") if len(sources) == store.num_parts else ""
    return PartFacts(part, name, rows, written, sealed, problem)


def _sample_of_parts(store: FeatureStore, parts: list[PartFacts], sample_rows: int) -> list[tuple[int, np.ndarray]]:
    """(part, ascending rows): each part by its share of what is written."""
    total = sum(part.written for part in parts)
    taken = []
    for part in parts:
        written = np.flatnonzero(store.written(part.number))
        wanted = min(part.written, -(-sample_rows * part.written // total))
        taken.append((part.number, np.sort(np.random.default_rng(part.number).choice(written, wanted, replace=False))))
    return taken


def _sample(column: str, rows: np.ndarray) -> SampleFacts:
    finite = rows[np.isfinite(rows).all(axis=1)]
    norms = np.linalg.norm(finite.astype(np.float64), axis=1)
    return SampleFacts(
        column,
        len(rows),
        len(rows) - len(finite),
        int((norms == 0).sum()),
        len({row.tobytes() for row in finite}),
        (norms.min(), norms.mean(), norms.max()) if len(finite) else None,
        (finite.min(), finite.mean(), finite.max()) if len(finite) else None,
    )


def _state(store: FeatureStore, parts: list[PartFacts]) -> str:
    written = sum(part.written or 0 for part in parts)
    if store.complete:
        whole = "sealed" if len(store.complete) == store.num_parts else f"sealed, {len(store.complete)} of {store.num_parts} parts: another machine has the others"
        missing = sum(store.missing.values())
        return f"{whole}; {missing:,} rows were never written" if missing else whole
    return f"not sealed: {store.num_rows - written:,} of {store.num_rows:,} rows are missing" if written < store.num_rows else "not sealed, though all rows are there: run what writes it again"


def _about(store: FeatureStore, taken: list[tuple[int, np.ndarray]]) -> dict[str, str]:
    about = {
        "columns": ", ".join(f"{name} {dim}" for name, dim in store.columns.items()) + f", {store.dtype}",
        "rows": f"{store.num_rows:,} in {store.num_parts} parts",
        "bytes": _size(store.folder),
    }
    if store.named_rows and taken:
        ids = np.concatenate([np.asarray(store.row_ids(part))[rows] for part, rows in taken])
        about["row ids"] = f"{len(np.unique(ids)):,} different in a sample of {len(ids):,}"
    for source in store.info.get("sources", []):
        columns = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in source.items() if key not in ("name", "fingerprint"))
        about[f"source {source.get('name')}"] = f"{str(source.get('fingerprint'))[:16]}{f' ({columns})' if columns else ''}"
    return about | {key.replace("_", " "): _value(value) for key, value in store.info.items() if key not in ("kind", "sources")}


def _clusters(folder: Path, manifest: dict[str, Any]) -> Inspection:
    problems = []
    about = {"rows": f"{manifest.get('rows', 0):,}", "bytes": _size(folder)}
    made_from = manifest.get("made_from", {})
    about |= {"teacher": str(made_from.get("teacher"))[:16], "sources": ", ".join(str(each)[:16] for each in made_from.get("sources", []))}
    about |= {name: _value(value) for name, value in {**made_from.get("settings", {}), "seed": made_from.get("seed"), **manifest.get("figures", {})}.items()}
    try:
        teacher_clusters.check_files(folder, manifest)
        counts = safetensors.numpy.load_file(folder / teacher_clusters.CENTROIDS)["counts"]
        about["rows of a cluster"] = f"{counts.min():,} least, {int(np.median(counts)):,} median, {counts.max():,} most; {int((counts == 0).sum())} have none"
    except UserError as error:
        problems.append(str(error))
    return Inspection(teacher_clusters.KIND, "damaged" if problems else "whole", about, problems=problems)


def _size(folder: Path) -> str:
    num_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return f"{num_bytes:,}" if num_bytes < 1e6 else f"{num_bytes:,} ({num_bytes / 1e9:.2f} GB)" if num_bytes >= 1e9 else f"{num_bytes:,} ({num_bytes / 1e6:.1f} MB)"


def _value(value: Any) -> str:
    text = f"{value:,.4f}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text[:16] if len(text) == 64 and text.isalnum() else text
