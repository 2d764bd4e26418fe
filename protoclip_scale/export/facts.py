"""What a run directory says of the model that comes out of it: for its card and its manifest."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from protoclip_scale import __version__
from protoclip_scale.data.sources.filesystems import is_url
from protoclip_scale.evaluation import provenance
from protoclip_scale.evaluation.suites import RECIPE
from protoclip_scale.export.card import DataSource, Facts, write_card
from protoclip_scale.export.manifest import sha256_of
from protoclip_scale.export.writing import Extras
from protoclip_scale.objectives.compared import compared_by
from protoclip_scale.recipe import Recipe, dump, schema
from protoclip_scale.redact import redact_text

_LICENCE_FILES = ("NOTICE", "LICENSE", "LICENSE.txt", "LICENSE.md")
UNKNOWN = "unknown"


class Checkpoint(NamedTuple):
    """Where the exported weights stand: steps and samples taken, and whether they are ``live`` or ``ema``."""

    step: int
    samples: int
    weights: str


def extras_of_run(run_dir: Path, recipe: Recipe, point: Checkpoint, license: str = UNKNOWN, repo: str | None = None, prototypes: dict[str, torch.Tensor] | None = None) -> Extras:
    """The card of a run's export, and where it comes from. ``license``: of the weights; ``repo``: the Hub's name of it, for the card's lines of code."""
    text = _without_folders(redact_text(dump(recipe)))
    environment = _json(run_dir / "environment.json")
    facts = Facts(
        name=recipe.name,
        license=license,
        settings=recipe.model,
        weights=point.weights,
        sources=_sources(run_dir, recipe),
        figures=_figures(run_dir, point.step),
        sets=_sets(run_dir, point.step),
        baseline=_json(run_dir / "baseline.json"),
        objectives=_objectives(recipe),
        training=_training(recipe, point, environment),
        recipe=text,
        repo=repo,
        compared=compared_by(recipe),
    )
    origin = {"run": recipe.name, "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(), **point._asdict(), "release": __version__}
    return Extras(lambda layout, folder: write_card(facts, layout, folder), prototypes, origin)


def _objectives(recipe: Recipe) -> tuple[str, ...]:
    """Those that were trained."""
    return tuple(name for name, settings in recipe.objectives.items() if settings.weight > 0)


def _without_folders(text: str) -> str:
    """A recipe in YAML, with paths of this machine cut down to their last name."""
    return re.sub(r"(?m)(?<=[ '\"\[])/(?:[^/\s'\",\]]+/)+(?=[^/\s'\",\]]+)", ".../", text)


def facts_of_import(file: Path, family: str, settings: schema.Model, license: str) -> tuple[Facts, dict[str, Any]]:
    """The card's facts and the manifest's origin of weights that somebody else published."""
    digest = sha256_of(file)
    training = {"weights": f"{file.name} (sha256 {digest})", "family": family, "converted by": f"protoclip-scale {__version__}"}
    facts = Facts(f"{file.stem}, converted", license, settings, "live", [], {}, {}, {}, (), training, "", None)
    return facts, {"file": file.name, "sha256": digest, "family": family, "release": __version__}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _sources(run_dir: Path, recipe: Recipe) -> list[DataSource]:
    read = {each["name"]: each for each in _json(run_dir / "sources.json").get("sources", [])}
    return [_source(source, read.get(source.label, {}), recipe.data.root) for source in recipe.data.sources]


def _source(source: Any, read: dict[str, Any], root: str) -> DataSource:
    first = source.files if isinstance(source.files, str) else (source.files or ("",))[0]
    folder = None if source.hub or is_url(first) or is_url(root) else (Path(root) / first).parent
    return DataSource(
        name=redact_text(source.label),
        hub=source.hub,
        revision=read.get("commit"),
        rows=source.rows or read.get("rows"),
        fingerprint=read.get("fingerprint", ""),
        licence=_licence(folder) if folder else "",
    )


def _licence(folder: Path) -> str:
    """What a data folder says of its licence: the key of its card's front matter, or the file that holds the terms."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if text.startswith("---\n"):
        try:
            front = yaml.safe_load(text.split("---\n")[1])
        except yaml.YAMLError:
            front = None
        if isinstance(front, dict) and front.get("license"):
            return str(front["license"])
    found = next((folder / name for name in _LICENCE_FILES if (folder / name).is_file()), None)
    return f"see {found.name} of {folder.name}" if found else ""


def _figures(run_dir: Path, step: int) -> dict[str, Any]:
    """The last evaluation at the step or before it, of training's own lines, with those of a complete one beside the run where it is of that step."""
    found: dict[str, Any] = {}
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if (run_dir / "metrics.jsonl").is_file() else []
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a line that a kill has torn
        if line.get("kind") == "eval" and line["step"] <= step:
            found = line
    for result in _results(run_dir, step):
        found = {"step": step, **(found if found.get("step") == step else {}), **result.get("figures", {})}
    return found


def _sets(run_dir: Path, step: int) -> dict[str, Any]:
    """By held-out set what evaluation/provenance.py tells of its figures."""
    found = provenance.read(run_dir).get(RECIPE, {})
    for result in _results(run_dir, step):
        found = found | result.get("sets", {})
    return found


def _results(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """What launch/evaluate.py --out has put into the run directory about a step."""
    return [result for path in sorted(run_dir.glob("evaluation*.json")) for result in _json(path).get("results", []) if result.get("step") == step]


def _training(recipe: Recipe, point: Checkpoint, environment: dict[str, Any]) -> dict[str, str]:
    hardware, versions = environment.get("hardware", {}), environment.get("versions", {})
    gpus = hardware.get("gpus") or []
    ranks = environment.get("ranks", 1)
    device = f"{len(gpus)} x {gpus[0]} on rank 0's machine" if gpus else f"{hardware.get('cpus', '?')} CPU cores ({hardware.get('machine', '?')})"
    return {
        "samples seen": f"{point.samples:,}",
        "steps": f"{point.step:,} of {recipe.data.plan.global_batch:,} pairs",
        "weights": "exponential moving average (optim.ema)" if point.weights == "ema" else "as trained",
        "objectives": ", ".join(_objectives(recipe)),
        "precision": recipe.optim.precision,
        "processes": str(ranks),
        "hardware": device,
        "software": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "code": f"protoclip-scale {__version__}, commit {environment.get('git_commit') or 'unknown'}",
    }
