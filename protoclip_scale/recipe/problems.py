"""One line from one of pydantic's error records: key, what was found, what to do."""

import re
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from protoclip_scale.recipe.names import nearest, objective_module
from protoclip_scale.recipe.schema import Recipe

_MUST = {
    "model_type": "must be a section: keys and values below it",
    "dict_type": "must be a section: keys and values below it",
    "tuple_type": "must be a list",
    "too_short": "must have at least one entry",
}


def section_class(annotation: Any) -> type[BaseModel] | None:
    """The settings class inside an annotation such as ``Lit | None`` or ``tuple[Source, ...]``, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_class, get_args(annotation))), None)


def all_keys(section: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key below a section by its dotted name, subsections included (entries of lists as ``sources.0.files``)."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        found[prefix + name] = field
        below = section_class(field.annotation)
        if below is not None and not is_named_objectives(field):
            found |= all_keys(below, f"{prefix}{name}.{'0.' if is_list(field) else ''}")
    return found


def is_list(field: FieldInfo) -> bool:
    return "tuple" in str(field.annotation)


def is_named_objectives(field: FieldInfo) -> bool:
    """Whether the key maps names to settings whose class each name brings itself."""
    return "ObjectiveSettings" in str(field.annotation)


def located(place: tuple[str | int, ...]) -> tuple[str, dict[str, FieldInfo], FieldInfo | None]:
    """For pydantic's place of a problem: the dotted key, the keys known in its section, and the key's field if there is one."""
    parts: list[str] = []
    section: type[BaseModel] | None = Recipe
    known: dict[str, FieldInfo] = {}
    field: FieldInfo | None = None
    for part in place:
        if isinstance(part, str) and section is None:
            break  # pydantic's label for a branch of a union, not a key
        parts.append(str(part))
        if isinstance(part, int):
            continue
        if field is not None and is_named_objectives(field):
            section, field = objective_module(part).Settings, None
            continue
        known = section.model_fields
        field = known.get(part)
        section = section_class(field.annotation) if field else None
    return ".".join(parts), known, field


def one_line(problem: dict[str, Any]) -> str:
    """Text for a record of ``ValidationError.errors()``; contradictions found by our validators already name their keys, or ``{section}`` where theirs has several places."""
    if problem["type"] == "value_error":
        said = problem["msg"].removeprefix("Value error, ")
        return said.replace("{section}", located(problem["loc"])[0]) if "{section}" in said else said
    key, known, field = located(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{key} is not a key{_here_or_elsewhere(key.split('.')[-1], known)}"
    about = f" ({field.description})" if field and field.description else ""
    if problem["type"] == "missing":
        return f"{key} is missing; add it{about}"
    must = _MUST.get(problem["type"]) or problem["msg"].replace("Input should", "must").replace("String should", "must")
    if problem["type"] == "literal_error":
        must += nearest(str(problem["input"]), re.findall("'([^']*)'", problem["ctx"]["expected"])).split(";")[0]
    return f"{key}: found {_short(problem['input'])}, {must}{about}"


def _here_or_elsewhere(name: str, known: dict[str, FieldInfo]) -> str:
    """A near key of the same section; else a key of that very name in another section; else all keys of the section."""
    from protoclip_scale.recipe.schema import Recipe

    near = nearest(name, known)
    elsewhere = sorted((key for key in all_keys(Recipe) if key.split(".")[-1] == name), key=lambda key: key.count("."))
    return f", did you mean {elsewhere[0]}?" if near.startswith(";") and elsewhere else near


def _short(found: Any) -> str:
    text = repr(found)
    return text if len(text) <= 60 else text[:57] + "..."
