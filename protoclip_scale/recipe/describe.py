"""Text about recipes made from their schema: ``--help [section]`` and docs/recipes.md, so that neither can go stale.

``python -m protoclip_scale.recipe.describe > docs/recipes.md`` writes the page; a test compares it.
"""

import types
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from protoclip_scale.errors import UserError
from protoclip_scale.recipe.names import nearest, objective_module, objective_names
from protoclip_scale.recipe.problems import is_list, is_named_objectives, section_class
from protoclip_scale.recipe.schema import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"

_RULES = """\
A recipe is one YAML file. It names data, towers, losses and schedule; it fixes the run. Any value may be left out that has a default below.

- `extends: other.yaml` (or a list) starts from other recipes, named relative to this file: sections merge, values and lists replace,
  a later one wins over an earlier one, this file over all. `name` is never inherited; left out, it is the file's.
- `--set section.key=value` replaces a value on the command line (`--set optim.lr=0.001`, `--set data.sources.0.files=part-*.parquet`), or a
  whole section (`--set 'prototypes={clusters: 500}'`).
- Paths in a file start from that file's folder, under `--set` from the working directory; in `objectives.teacher.features`, `{root}` is `data.root`.
- Unknown keys, wrong types, keys written twice and contradictions are refused with one line that names the key and what to do.
- The run directory gets `recipe.yaml`: every default written out, secrets replaced by `***`.
- On resume only `run.*`, `evaluation.*`, `optim.microbatch`, `optim.ema`, `data.root` (the same files elsewhere), `data.workers`, `data.retry_seconds` and `data.max_bad_fraction` may differ; `schedule.total` with `--extend`.
- `--help SECTION` prints these tables in the terminal, `--check` what a recipe amounts to.
"""


class Key(NamedTuple):
    """One row of a section's table."""

    name: str
    type: str
    default: str
    description: str


def sections() -> dict[str, type[BaseModel]]:
    """Every section by its dotted name; '' is the recipe itself. Objectives count as sections of ``objectives``."""
    found: dict[str, type[BaseModel]] = {}

    def visit(prefix: str, section: type[BaseModel]) -> None:
        found[prefix] = section
        for name, field in section.model_fields.items():
            dotted = f"{prefix}.{name}" if prefix else name
            below = section_class(field.annotation)
            if is_named_objectives(field):
                for objective in objective_names():
                    visit(f"{dotted}.{objective}", objective_module(objective).Settings)
            elif below is not None:
                visit(dotted, below)

    visit("", Recipe)
    return found


def keys_of(section: type[BaseModel]) -> list[Key]:
    """The rows of a section's table, in the schema's order."""
    return [Key(name, type_text(field), default_text(field), field.description or "") for name, field in section.model_fields.items()]


def type_text(field: FieldInfo) -> str:
    """What a value must be, in words: 'whole number > 0 or null', 'soft or hard', 'list of sections'."""
    if is_named_objectives(field):
        return "names to settings"
    return _type_text(field.annotation, field.metadata)


def _type_text(annotation: Any, constraints: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0], [*constraints, *_constraints(arguments[1:])])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_text(each, constraints) for each in arguments))
    if origin is Literal:
        return " or ".join(arguments)
    if origin is tuple:
        each = "section" if section_class(arguments[0]) else _type_text(arguments[0], [])
        if get_origin(arguments[0]) is Literal:
            return f"list of {each}"
        return f"list of {each}s" if Ellipsis in arguments else f"list of {len(arguments)} {each}s"
    if origin is dict:
        return "names to lists"
    if section_class(annotation):
        return "section"
    word = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}[annotation]
    bounds = " and ".join(f"{sign} {getattr(each, attribute)}" for each in constraints for attribute, sign in _BOUNDS if hasattr(each, attribute))
    return f"{word} {bounds}" if bounds and annotation in (int, float) else word


_BOUNDS = (("gt", ">"), ("ge", ">="), ("le", "<="), ("lt", "<"))


def _constraints(metadata: tuple[Any, ...]) -> list[Any]:
    """Bounds, also those inside a Field(...) of an Annotated type."""
    return [inner for each in metadata for inner in (each.metadata if isinstance(each, FieldInfo) else [each])]


def default_text(field: FieldInfo) -> str:
    """A default as it would be written in YAML; 'required' if there is none, '' for a section whose own table tells."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(list(value)) if isinstance(value, tuple) else str(value) or '""'


def help_text(section: str | None = None) -> str:
    """The text of ``--help`` (the sections) or ``--help SECTION`` (its keys). An unknown section is a UserError naming the nearest."""
    known = sections()
    if not section:
        lines = ["A recipe has these sections and keys; --help SECTION tells more.", ""]
        return "\n".join([*lines, *(f"  {key.name:<12} {key.description}" for key in keys_of(Recipe)), "", *_deeper("", known)])
    if section not in known:
        owner, _, last = section.rpartition(".")
        if owner in known and last in known[owner].model_fields:
            return _paragraph(next(key for key in keys_of(known[owner]) if key.name == last), section)
        raise UserError(f"--help {section}: there is no such section{nearest(section, [name for name in known if name])}")
    head = f"{section}: {_summary(known[section])}"
    return "\n".join([head, "", *(_paragraph(key, key.name) for key in keys_of(known[section])), *_deeper(section, known)]).rstrip()


def _paragraph(key: Key, name: str) -> str:
    default = f", default {key.default}" if key.default and key.default != "required" else ", required" if key.default else ""
    return f"  {name} ({key.type}{default})\n" + fill(key.description, 110, initial_indent="      ", subsequent_indent="      ")


def _deeper(section: str, known: dict[str, type[BaseModel]]) -> list[str]:
    below = [name for name in known if name and name != section and (not section or name.startswith(section + "."))]
    return [fill(f"Sections below: {', '.join(below)}", 110, initial_indent="  ", subsequent_indent="  ")] if below else []


def _summary(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split())


def page() -> str:
    """docs/recipes.md, made from the schema and from the recipes beside the package."""
    parts = ["# Recipes", "", "Made by `python -m protoclip_scale.recipe.describe`; do not edit.", "", _RULES, *_shipped(), "## Keys", ""]
    told: dict[type[BaseModel], str] = {}
    for name, section in sections().items():
        heading = f"`{name}`" if name else "The recipe"
        many = " (a list of these)" if name and _is_list(name) else ""
        if section in told:
            parts += [f"### {heading}{many}", "", f"Keys as in `{told[section]}`.", ""]
            continue
        told[section] = name
        parts += [f"### {heading}{many}", "", _summary(section), "", "| key | value | default | meaning |", "|---|---|---|---|"]
        parts += [f"| `{key.name}` | {_cell(key.type)} | {_default_cell(key.default)} | {_cell(key.description)} |" for key in keys_of(section)]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _is_list(name: str) -> bool:
    owner, _, last = name.rpartition(".")
    field = sections()[owner].model_fields.get(last) if owner in sections() else None
    return field is not None and is_list(field)


def _shipped() -> list[str]:
    """A table of the recipes that ship, with the first sentence of their notes."""
    from protoclip_scale.recipe.load import load_recipe

    rows = ["## Shipped recipes", "", "| file | what it is |", "|---|---|"]
    for path in (*sorted(RECIPES.glob("*.yaml")), *sorted(RECIPES.glob("matched/*.yaml"))):
        file = path.relative_to(RECIPES).as_posix()
        rows.append(f"| [{file}](../recipes/{file}) | {_cell(' '.join(load_recipe(path).notes.split()).split('. ')[0].rstrip('.'))}. |")
    return [*rows, ""]


def _default_cell(default: str) -> str:
    return default if default == "required" else f"`{default}`" if default else "see below"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    print(page(), end="")
