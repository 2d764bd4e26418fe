"""How a set's figures came about: rows, protocol, and hashes that are the same on every machine."""

import hashlib
import json
import math
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from protoclip_scale.evaluation.pixels import Preprocessing, own_preprocessing
from protoclip_scale.evaluation.ranking import chosen_key
from protoclip_scale.evaluation.sets import HeldOutRows, cached_set
from protoclip_scale.evaluation.suites import RECIPE, Suite, suite_of_recipe
from protoclip_scale.evaluation.zero_shot import class_names
from protoclip_scale.files import alone, publish_json
from protoclip_scale.recipe.schema import EvaluationSet, Recipe

NAME = "evaluated_sets.json"


def hash_of(value: Any) -> str:
    """32 hexadecimal digits of plain data."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:32]


def template_hash(held_out: EvaluationSet) -> str:
    return hash_of(list(held_out.prompt_templates))


def class_hash(names: Sequence[str], words: Mapping[str, Sequence[str]]) -> str:
    """Of class names in order, each with the words that stand for it in prompts."""
    return hash_of([(name, list(words.get(name, (name,)))) for name in names])


def data_fingerprint(rows: HeldOutRows) -> str:
    """Of the files' names, sizes and digests in order, wherever they lie, and of which of their rows count."""
    files = [(posixpath.basename(place.relative), place.size, scan.rows, scan.digest) for place, scan in zip(rows.reader.places, rows.reader.scans, strict=True)]
    chosen = rows.settings.exclude, rows.settings.subset, rows.settings.captions_per_image
    return hash_of([files, rows.reader.column_types and sorted((name, str(kind)) for name, kind in rows.reader.column_types.items()), chosen])


def set_provenance(rows: HeldOutRows, figures: Mapping[str, Any], preprocessing: Preprocessing, precision: str, allow_subset: bool) -> dict[str, Any]:
    """What the figures of a set are worth: see docs/evaluation.md for the keys."""
    settings = rows.settings
    value = figures.get(chosen_key(settings, figures), math.nan)
    facts: dict[str, Any] = {
        "task": settings.task,
        "n": figures[f"{settings.name}/rows"],
        "undecodable": figures[f"{settings.name}/undecodable"],
        "rows_found": rows.found.rows,
        "rows_expected": settings.num_rows,
        "captions_found": rows.found.captions,
        "captions_expected": settings.num_captions,
        "subset_allowed": allow_subset,
        "metric": settings.chosen_metric,
        "value": value if math.isfinite(value) else None,
        "precision": precision,
        "preprocessing": preprocessing.as_dict(),
        "data": data_fingerprint(rows),
        "commit": rows.reader.commit,
    }
    if not settings.classify:
        return facts
    columns = {column: list(settings.classes) or class_names(rows.classes[column]) for column in settings.classify}
    return facts | {
        "prompts": settings.prompts,
        "templates": len(settings.prompt_templates),
        "template_hash": template_hash(settings),
        "classes": {column: len(names) for column, names in columns.items()},
        "class_hash": {column: class_hash(names, settings.class_words) for column, names in columns.items()},
    }


def provenance(suite: Suite, figures: Mapping[str, Any], preprocessing: Preprocessing, precision: str) -> dict[str, dict[str, Any]]:
    """``set_provenance`` of every set of a suite that has been evaluated in this process; reads nothing again."""
    sets = {held_out.name: cached_set(held_out, suite.root, suite.retry_seconds) for held_out in suite.evaluation.sets}
    return {name: set_provenance(rows, figures, preprocessing, precision, suite.allow_subset) for name, rows in sets.items()}


def publish_of_recipe(run_dir: Path, recipe: Recipe, figures: Mapping[str, Any]) -> None:
    """``publish`` for a run's own evaluation of itself."""
    publish(run_dir, RECIPE, provenance(suite_of_recipe(recipe), figures, own_preprocessing(recipe.model.image), "fp32"))


def publish(run_dir: Path, suite_name: str, sets: Mapping[str, Any]) -> None:
    """``provenance`` of a suite's newest evaluation beside the figures in a run directory: {suite: {set: facts}}."""
    with alone(run_dir / NAME):  # training and tools/watch.py may evaluate at the same time
        publish_json(run_dir / NAME, read(run_dir) | {suite_name: sets})


def read(run_dir: Path) -> dict[str, dict[str, Any]]:
    """{} if there is none that can be read."""
    try:
        return json.loads((run_dir / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
