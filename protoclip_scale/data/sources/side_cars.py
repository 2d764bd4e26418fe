"""Files beside a tar shard that tell its number of samples, so that it need not be read for that.

In this order: ``NAME.idx`` (DALI's wds2idx: a line ``v1.2 1000``, then one a sample), ``NAME_stats.json`` (img2dataset: ``successes``),
``sizes.json`` (file name to rows, one for a folder). One that cannot be read as such counts for nothing.
"""

import json
import posixpath
import re

from protoclip_scale.data.sources.filesystems import without_query
from protoclip_scale.data.sources.formats import Place
from protoclip_scale.data.sources.ranges import attempt, is_local, is_missing

MAX_BYTES = 256 << 20  # a longer one is not read
INDEX_HEAD = re.compile(rb"v1\.[0-9]+ ([0-9]+)\s")


def rows_of_side_car(place: Place) -> int | None:
    """Samples of the shard, as a side-car says; None without one."""
    path = without_query(place.path)
    stem, name = path.removesuffix(".tar"), posixpath.basename(path)
    head = INDEX_HEAD.match(_read(place, f"{stem}.idx", 64))
    if head:
        return int(head[1])
    for beside, key in ((f"{stem}_stats.json", "successes"), (posixpath.join(posixpath.dirname(path), "sizes.json"), name)):
        rows = _number(_read(place, beside, MAX_BYTES), key)
        if rows is not None:
            return rows
    return None


def _read(place: Place, path: str, max_bytes: int) -> bytes:
    """The first bytes of a file; none if it is not there or may not be read."""
    try:
        if is_local(place.filesystem):
            with open(path, "rb") as file:
                return file.read(max_bytes)
        return attempt(lambda: place.filesystem.cat_file(path, start=0, end=max_bytes))
    except (PermissionError, IsADirectoryError):
        return b""
    except Exception as error:
        if isinstance(error, FileNotFoundError) if is_local(place.filesystem) else is_missing(error):
            return b""
        raise


def _number(data: bytes, key: str) -> int | None:
    try:
        tree = json.loads(data)
    except ValueError:
        return None
    rows = tree.get(key) if isinstance(tree, dict) else None
    return rows if isinstance(rows, int) and not isinstance(rows, bool) and rows >= 0 else None
