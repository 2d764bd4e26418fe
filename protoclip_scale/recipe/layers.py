"""A recipe's files as one tree of plain values that knows who said what: extends, ``--set``, paths."""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from protoclip_scale.errors import UserError
from protoclip_scale.recipe.names import nearest

SCHEMA = 1  # of recipe files; one that does not say has this release's
# Paths in a file are relative to that file, under --set to the working directory. The second group also takes names, so only ./ ../ ~ mark a path.
PATHS = ("data.root", "objectives.*.features")
PATHS_OR_NAMES = ("model.init_from", "model.text.name")


class Origin(NamedTuple):
    """Who said a value: the label for messages and the folder its relative paths start from."""

    label: str
    folder: Path


def _safe_load(text: str) -> Any:
    """yaml.safe_load that refuses a key written twice, of which YAML would silently keep the last."""
    _refuse_repeats(yaml.compose(text, yaml.SafeLoader), set())
    return yaml.safe_load(text)


def _refuse_repeats(node: yaml.Node | None, seen: set[int]) -> None:
    if node is None or id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))  # an alias is the same node again
    if isinstance(node, yaml.MappingNode):
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge"]
        for key in written:
            if written.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is written twice", node.start_mark)
    for child in node.value:
        for part in child if isinstance(child, tuple) else (child,):
            _refuse_repeats(part, seen)


def read_tree(path: Path, overrides: Iterable[str]) -> tuple[dict[str, Any], dict[tuple[str, ...], Origin]]:
    """The unchecked tree of a recipe, and who said what."""
    layers = layers_of(path, ())
    tree: dict[str, Any] = {}
    origins: dict[tuple[str, ...], Origin] = {(): layers[-1][1]}
    for layer, origin in layers:
        merge(tree, layer, origins, origin)
    tree["name"] = layers[-1][0].get("name", path.stem)
    for override in overrides:
        _override(tree, origins, override)
    if isinstance(tree.get("data"), dict) and tree["data"].get("root") is None:
        tree["data"]["root"] = str(layers[-1][1].folder)
    resolve_paths(tree, origins)
    return tree, origins


def layers_of(path: Path, children: tuple[Path, ...]) -> list[tuple[dict, Origin]]:
    """The file and all it extends, farthest ancestor first."""
    resolved = path.resolve()
    if resolved in children:
        raise UserError(f"{path}: extends: a cycle, {' -> '.join(p.name for p in (*children, resolved))}; remove one of these lines")
    tree = _parse(path, children)
    parents = tree.pop("extends", None) or []
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{path}: extends: found {parents!r}, must be a path relative to this file, or a list of them")
    ancestors = [layer for parent in parents for layer in layers_of(path.parent / parent, (*children, resolved))]
    return [*ancestors, (tree, Origin(str(path), path.parent.absolute()))]


def _parse(path: Path, children: tuple[Path, ...]) -> dict:
    asked_by = f"{children[-1].name}: extends: " if children else ""
    try:
        tree = _safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = [file.name for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"{asked_by}{path}: there is no such recipe{nearest(path.name, there) if there else ''}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{asked_by}{path}: cannot be read as a recipe: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {_yaml_problem(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: found {type(tree).__name__}, a recipe is a YAML mapping of sections; --help lists them")
    if (version := tree.pop("schema", SCHEMA)) != SCHEMA:
        raise UserError(f"{path}: schema: found {version!r}, this release reads recipes of schema {SCHEMA}; use the release that wrote it, or write the recipe anew (--help)")
    return _unshared(tree)


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}not readable as YAML: {getattr(error, 'problem', None) or ' '.join(str(error).split())}"


def _unshared(value: Any) -> Any:
    """A copy in which YAML aliases are separate objects, so that an override changes one place only."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def merge(base: dict, layer: dict, origins: dict, origin: Origin, place: tuple[str, ...] = ()) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value, origins, origin, (*place, str(key)))
        else:
            base[key] = value
            _said(origins, (*place, str(key)), origin)


def _said(origins: dict, place: tuple[str, ...], origin: Origin) -> None:
    """Note who said the value at a place, and with it all that lies below."""
    for replaced in [known for known in origins if known[: len(place)] == place]:
        del origins[replaced]
    origins[place] = origin


def _override(tree: dict, origins: dict, text: str) -> None:
    key, equals, written = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {text}: write section.key=value, for instance --set optim.lr=0.001")
    try:
        value = _unshared(_safe_load(written))
    except yaml.YAMLError:
        value = written  # *.parquet and {root}/teacher are meant as they stand
    origin = Origin("--set", Path.cwd())
    place: Any = tree
    for depth, part in enumerate(parts[:-1]):
        place = _child(place, part, f"--set {text}: {'.'.join(parts[: depth + 1])}")
    if isinstance(place, list):
        _child(place, parts[-1], f"--set {text}: {key}")
        place[int(parts[-1])] = value
    else:
        place[parts[-1]] = value
    _said(origins, tuple(parts), origin)


def _child(place: dict | list, part: str, where: str) -> Any:
    """The section or list under ``part``, made if it was null or missing."""
    if isinstance(place, list):
        if not part.isdigit() or int(part) >= len(place):
            raise UserError(f"{where}: found {part!r}, must be the number of an entry, 0 to {len(place) - 1}")
        return place[int(part)]
    if place.get(part) is None:
        place[part] = {}
    if not isinstance(place[part], dict | list):
        raise UserError(f"{where}: holds {place[part]!r}, so nothing can be set below it")
    return place[part]


def origin_of(keys: tuple[str, ...], origins: dict) -> Origin:
    """Who said the value: the nearest section that was said at once, or, for an unknown section, who wrote below it."""
    below = [origin for known, origin in origins.items() if keys and known[: len(keys)] == keys]
    above = (origins[keys[:length]] for length in range(len(keys), -1, -1) if keys[:length] in origins)
    return below[-1] if below else next(above)


def resolve_paths(tree: dict, origins: dict) -> None:
    """Make paths absolute in place; ``{root}`` in one stands for ``data.root``, so that one key moves all of a recipe's data."""
    for key, value in sorted(flat(tree).items(), key=lambda item: item[0] != "data.root"):
        is_path = any(fnmatchcase(key, pattern) for pattern in PATHS) or (key in PATHS_OR_NAMES and str(value).startswith(("./", "../", "~")))
        if not is_path or not isinstance(value, str):
            continue
        *sections, last = key.split(".")
        section = tree
        for part in sections:
            section = section[part]
        if key != "data.root" and isinstance(tree.get("data"), dict):
            value = value.replace("{root}", str(tree["data"].get("root")))
        folder = origin_of((*sections, last), origins).folder
        section[last] = value if "://" in value else os.path.normpath(folder / Path(value).expanduser())


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{'optim.lr': 0.001, ...}; a list counts as one value, an empty section too."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
