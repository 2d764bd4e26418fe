"""From files and ``--set`` to a Recipe, and back to text: extends, overrides, one-line errors, what a resume may change."""

import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema
from protoclip_scale.recipe.layers import SCHEMA, origin_of, read_tree
from protoclip_scale.recipe.names import objective_module
from protoclip_scale.recipe.problems import located, one_line
from protoclip_scale.recipe.rules import contradictions
from protoclip_scale.redact import redacted

# What a run may change when it goes on; schedule.total only with --extend.
# The data may lie elsewhere: its fingerprint is compared.
MAY_CHANGE = ("run.*", "evaluation.*", "optim.microbatch", "optim.compile_blocks", "optim.ema", "optim.ema.*", "data.root", "data.workers", "data.retry_seconds", "data.max_bad_fraction", "data.prepare")


def load_recipe(path: str | os.PathLike, overrides: Iterable[str] = ()) -> schema.Recipe:
    """Read a recipe with what it extends, apply ``a.b=value`` overrides, check it.

    A file overrides what it extends and a later parent an earlier one: mappings merge, lists and values replace; an override
    replaces what it names. ``name`` is not inherited; by default it is the file's. Raises UserError with one line: file (or
    --set), key, what was found, what to do.
    """
    path = Path(path).expanduser()
    tree, origins = read_tree(path, overrides)
    try:
        if "objectives" in tree:
            tree["objectives"] = _with_their_settings(tree["objectives"])
        recipe = schema.Recipe.model_validate(tree)
        for contradiction in contradictions(recipe):
            raise UserError(f"{path}: {contradiction}")
        return recipe
    except ValidationError as error:
        first, *others = error.errors()
    except _ObjectiveProblem as problem:
        first, others = problem.args[0], []
    place = () if first["type"] == "value_error" else tuple(str(part) for part in first["loc"])
    other_keys = {located(problem["loc"])[0] for problem in others} - {".".join(place)}
    more = f"; also look at {', '.join(sorted(other_keys))}" if other_keys else ""
    raise UserError(f"{origin_of(place, origins).label}: {one_line(first)}{more}")


def dump(recipe: schema.Recipe) -> str:
    """The resolved recipe as YAML, every default written out, secrets replaced by ***. ``load_recipe`` reads it back."""
    return yaml.safe_dump({"schema": SCHEMA} | redacted(recipe), sort_keys=False, allow_unicode=True, width=120)


def diff(old: schema.Recipe, new: schema.Recipe, extend: bool = False) -> list[str]:
    """What changed that may not change on resume, as lines 'key: old -> new'. ``extend`` also allows schedule.total."""
    allowed = MAY_CHANGE + (("schedule.total",) if extend else ())
    changes = _changes(redacted(old), redacted(new))
    return [f"{key}: {_shown(before)} -> {_shown(after)}" for key, before, after in changes if not any(fnmatchcase(key, each) for each in allowed)]


def _changes(before: dict, after: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in before | after:
        one, other = before.get(name), after.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _changes(one, other, f"{prefix}{name}.")
        elif one != other or (name in before) != (name in after):
            yield f"{prefix}{name}", one, other


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf")).removesuffix("\n").removesuffix("\n...")


class _ObjectiveProblem(Exception):
    """Carries one of pydantic's error records."""


def _with_their_settings(objectives: Any) -> Any:
    """Objectives with settings made by their own classes: done here, so that an error carries the objective's key."""
    if not isinstance(objectives, dict):
        return objectives
    made = {}
    for name, settings in objectives.items():
        try:
            made[name] = objective_module(str(name)).Settings.model_validate({} if settings is None else settings)
        except ValidationError as error:
            first = error.errors()[0]
            raise _ObjectiveProblem({**first, "loc": ("objectives", name, *first["loc"])}) from None
        except ValueError as error:
            raise _ObjectiveProblem({"type": "value_error", "loc": ("objectives", name), "msg": str(error), "input": settings}) from None
    return made
