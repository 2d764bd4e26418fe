"""What a recipe changes of the one that it extends, for people: the resolved recipe of a run no longer shows it."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from protoclip_scale.recipe.load import _flat, _layers, _merge, _origin_of, _read, _resolve_paths
from protoclip_scale.redact import redacted

NOT_CHANGES = ("name", "notes", "expected")


def against_base(path: str | os.PathLike, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """{base: names of the files that ``path`` extends (null without any), changes: [{key, base, value, said_by}]}, secrets replaced.

    A key that the base does not set, whose default therefore holds there, has no ``base``. Costs a second reading of the files.
    """
    path = Path(path).expanduser()
    *parents, own = _layers(path, ())
    base: dict[str, Any] = {}
    base_origins = {(): own[1]}
    for layer, origin in parents:
        _merge(base, layer, base_origins, origin)
    _resolve_paths(base, base_origins)
    tree, origins = _read(path, overrides)
    before, now = _flat(redacted(base)), _flat(redacted(tree))
    changed = [key for key in now if key not in NOT_CHANGES and (key not in before or now[key] != before[key]) and (key != "data.root" or ("data", "root") in origins)]
    changes = [{"key": key, **({"base": before[key]} if key in before else {}), "value": now[key], "said_by": Path(_origin_of(tuple(key.split(".")), origins).label).name} for key in changed]
    return {"base": ", ".join(Path(origin.label).name for _, origin in parents) or None, "changes": changes}
