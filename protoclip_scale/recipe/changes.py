"""What a recipe changes of the one that it extends, for people: the resolved recipe of a run no longer shows it."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from protoclip_scale.recipe.layers import flat, layers_of, merge, origin_of, read_tree, resolve_paths
from protoclip_scale.redact import redacted

NOT_CHANGES = ("name", "notes", "expected")


def against_base(path: str | os.PathLike, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """{base: names of the files that ``path`` extends (null without any), changes: [{key, base, value, said_by}]}, secrets replaced.

    A key that the base does not set, whose default therefore holds there, has no ``base``. Costs a second reading of the files.
    """
    path = Path(path).expanduser()
    *parents, own = layers_of(path, ())
    base: dict[str, Any] = {}
    base_origins = {(): own[1]}
    for layer, origin in parents:
        merge(base, layer, base_origins, origin)
    resolve_paths(base, base_origins)
    tree, origins = read_tree(path, overrides)
    before, now = flat(redacted(base)), flat(redacted(tree))
    changed = [key for key in now if key not in NOT_CHANGES and (key not in before or now[key] != before[key]) and (key != "data.root" or ("data", "root") in origins)]
    changes = [{"key": key, **({"base": before[key]} if key in before else {}), "value": now[key], "said_by": Path(origin_of(tuple(key.split(".")), origins).label).name} for key in changed]
    return {"base": ", ".join(Path(origin.label).name for _, origin in parents) or None, "changes": changes}
