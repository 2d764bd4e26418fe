"""The tasks that come with the package: one YAML file each with classes, prompts, metric, size, and how its rows are prepared.

ImageNet's class names and template ensembles come from open_clip, which carries them; the other lists are data of the package (see NOTICE).
"""

import functools
import importlib.resources
from pathlib import Path
from typing import Any

import yaml

from protoclip_scale.errors import UserError
from protoclip_scale.recipe.names import nearest
from protoclip_scale.recipe.schema import EvaluationSet

SHIPPED = Path(str(importlib.resources.files("protoclip_scale.evaluation") / "shipped"))
CLASS_COLUMN = "class"  # of the files that tools/prepare_evaluation.py writes
ENSEMBLES = {"openai_imagenet": "OPENAI_IMAGENET_TEMPLATES", "simple_imagenet": "SIMPLE_IMAGENET_TEMPLATES"}  # names in open_clip
IMAGENET = "imagenet"  # the list of all its synsets, in the order of the class numbers


def task_names() -> list[str]:
    return sorted(path.stem for path in (SHIPPED / "tasks").glob("*.yaml"))


def suite_names() -> list[str]:
    return sorted(path.stem for path in (SHIPPED / "suites").glob("*.yaml"))


@functools.cache
def read_task(name: str) -> dict[str, Any]:
    """The content of a task's file. UserError names the nearest one."""
    if name not in task_names():
        raise UserError(f"task {name!r} is none of the package's{nearest(name, task_names())}")
    return yaml.safe_load((SHIPPED / "tasks" / f"{name}.yaml").read_text(encoding="utf-8"))


def synsets(name: str) -> list[str]:
    """WordNet ids of a list of ImageNet's classes."""
    return (SHIPPED / "synsets" / f"{name}.txt").read_text(encoding="utf-8").split()


def ensemble(name: str) -> list[str]:
    """An ensemble of templates that open_clip carries, with {} where the class name stands."""
    import open_clip

    return [template("{}") for template in getattr(open_clip, ENSEMBLES[name])]


def imagenet_words(ids: list[str]) -> dict[str, list[str]]:
    """The class names of open_clip by WordNet id."""
    import open_clip

    words = dict(zip(synsets(IMAGENET), open_clip.IMAGENET_CLASSNAMES, strict=True))
    return {number: [words[number]] for number in ids}


@functools.cache
def task_keys(name: str) -> dict[str, Any]:
    """What a task says about an ``EvaluationSet``: every key it fills in."""
    keys = {key: value for key, value in read_task(name).items() if key not in ("about", "prepare", "synsets")}
    keys["files"] = f"{name}/*.parquet"
    if wanted := read_task(name).get("synsets"):
        keys["classes"] = synsets(wanted)
        keys["class_words"] = imagenet_words(keys["classes"])
    if "classes" in keys:
        keys |= {"classify": [CLASS_COLUMN], "columns": {"caption": ""}}
    return keys


def templates_of(templates: str | tuple[str, ...]) -> tuple[str, ...]:
    """Templates written out, if it is an ensemble's name."""
    return tuple(ensemble(templates)) if isinstance(templates, str) else templates


def with_task(held_out: EvaluationSet) -> EvaluationSet:
    """The set with its ensemble written out, and what its task says for the keys that it does not give itself."""
    given = held_out.model_dump(exclude_unset=True)
    task = dict(task_keys(held_out.task)) if held_out.task else {}
    if given.get("hub"):
        task.pop("files", None)
    columns = task.get("columns", {}) | given.get("columns", {})
    both = task | given | ({"columns": columns} if columns else {})
    return EvaluationSet.model_validate(both | ({"templates": templates_of(both["templates"])} if "templates" in both else {}))
