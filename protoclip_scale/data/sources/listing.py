"""Listing: from the patterns of a source to its files, in order, each with its size and a stamp that changes when the file does."""

import fnmatch
import functools
import glob
import itertools
import os
import posixpath
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import fsspec

from protoclip_scale.data.sources.filesystems import (
    full_url,
    full_url_of,
    is_remote,
    is_url,
    join,
    open_filesystem,
    protocol_of,
    shown,
    shown_pattern,
    without_query,
)
from protoclip_scale.data.sources.formats import Place
from protoclip_scale.errors import UserError

NUM_THREADS = 16  # requests at once
HTTP = ("http", "https")
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
STAMPS = ("ETag", "etag", "blob_id", "Content-MD5", "LastModified", "last_modified", "Last-Modified", "updated")  # what fsspec's filesystems call it

Item, Result = TypeVar("Item"), TypeVar("Result")
Retry = Callable[[Callable[[], Any], str, str], Any]  # (action, what it does, place as shown) -> the action's result


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``function`` of every item, in order. After the first error no item is begun, or 1,540 files of a dead server would each be retried in turn."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def expand_braces(pattern: str) -> list[str]:
    """``shard-{00000..00012}.tar`` and ``{a,b}.tar`` written out; numbers keep their leading zeros. Other braces stay as they are."""
    found = next((match for match in BRACES.finditer(pattern) if "," in match[1] or NUMBERS.fullmatch(match[1])), None)
    if found is None:
        return [pattern]
    words = found[1].split(",")
    if numbers := NUMBERS.fullmatch(found[1]):
        first, last = numbers.groups()
        if int(last) < int(first):
            raise UserError(f"{pattern!r}: the range {{{found[1]}}} runs backwards; write the smaller number first")
        words = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [pattern[: found.start()] + word + end for word, end in itertools.product(words, expand_braces(pattern[found.end() :]))]


def list_places(patterns: tuple[str, ...], root: str, suffixes: tuple[str, ...], retry: Retry) -> list[Place]:
    """What the patterns match, each place once, sorted by its path under ``root``. A folder stands for the files with one of ``suffixes`` in it;
    without suffixes the places are folders. UserError if a pattern matches nothing.

    Over HTTP every file costs one HEAD request, 16 at a time; a glob there needs a server that lists its folders.
    """
    found: dict[str, Place] = {}
    for pattern in patterns:
        for written_out in _without_braces(pattern, root):
            for place in _match(written_out, shown_pattern(pattern, root), root, suffixes, retry):
                found.setdefault(full_url(place), place)
    places = _with_sizes(list(found.values()), retry) if suffixes else list(found.values())
    return sorted(places, key=lambda place: (place.relative, place.url))


def _without_braces(pattern: str, root: str) -> list[str]:
    local = join(root, pattern)
    return [pattern] if not is_url(local) and os.path.exists(local) else expand_braces(pattern)


def _match(pattern: str, as_written: str, root: str, suffixes: tuple[str, ...], retry: Retry) -> list[Place]:
    """The places of one pattern without braces; those of exact remote files have no size yet."""
    http = protocol_of(join(root, pattern)) in HTTP
    magic = bool(re.search(r"[*\[]", pattern)) if http else glob.has_magic(pattern)  # in an HTTP URL a question mark begins the query
    literal = not magic or (not is_remote(join(root, pattern)) and os.path.exists(join(root, pattern)))
    url = join(root if http or literal else glob.escape(root), pattern)
    filesystem, path = open_filesystem(url)
    named_file = is_remote(url) and not magic and (without_query(url).endswith(suffixes) if suffixes else False)
    if named_file or (http and not magic and not (suffixes and url.endswith("/"))):
        return [_place(filesystem, {"name": path}, root)]
    if http:
        entries = retry(lambda: _matches_over_http(filesystem, url, suffixes), f"listing {as_written!r}", shown(url))
        if not entries:
            raise UserError(
                f"the server lists no file that matches {shown(url)!r}; name the files as a range, for instance shard-{{00000..00012}}.parquet"
            )
    else:
        entries = retry(lambda: _matches(filesystem, path, literal, suffixes), f"listing {as_written!r}", shown(url))
        if not entries:
            raise UserError(
                f"no files match {as_written!r} under data.root {shown(root)!r}: check the path, set data.root, or prepare the data first"
            )
    return [_place(filesystem, entry, root) for entry in entries]


def _matches(filesystem: fsspec.AbstractFileSystem, path: str, literal: bool, suffixes: tuple[str, ...]) -> list[dict[str, Any]]:
    """fsspec's facts about the files (without suffixes: the folders) that a path or glob names."""
    wanted = "file" if suffixes else "directory"
    if not literal:
        return [entry for entry in map(_followed, filesystem.glob(path, detail=True).values()) if entry["type"] == wanted]
    try:
        entry = _followed(filesystem.info(path))
    except FileNotFoundError:
        return []
    if entry["type"] == "directory" and suffixes:
        entries = map(_followed, filesystem.ls(path, detail=True))
        return [inside for inside in entries if inside["type"] == "file" and inside["name"].endswith(suffixes)]
    return [entry] if entry["type"] == wanted else []


def _followed(entry: dict[str, Any]) -> dict[str, Any]:
    """A local link as what it leads to; fsspec tells a link's own type and time."""
    if not entry.get("islink") or not os.path.exists(entry["name"]):
        return entry
    return entry | {"type": "directory" if os.path.isdir(entry["name"]) else "file"}


def _matches_over_http(filesystem: fsspec.AbstractFileSystem, url: str, suffixes: tuple[str, ...]) -> list[dict[str, Any]]:
    """The links of a folder's page that match. fsspec's own glob takes a dropped connection for an empty folder."""
    folder, _, name = url.rpartition("/")
    if re.search(r"[*\[]", folder):
        raise UserError(f"{shown(url)}: over HTTP only the last part of a pattern may hold * or []; list the folders one by one")
    links = filesystem.ls(folder + "/", detail=True)
    names = {posixpath.basename(without_query(link["name"])): link for link in links if link["type"] == "file"}
    return [link for link_name, link in names.items() if (fnmatch.fnmatchcase(link_name, name) if name else link_name.endswith(suffixes))]


def _place(filesystem: fsspec.AbstractFileSystem, entry: dict[str, Any], root: str) -> Place:
    path = str(entry["name"])
    full = full_url_of(filesystem, path)
    if not is_url(full):
        about = os.stat(path)
        entry = {"size": about.st_size if entry["type"] == "file" else None, "mtime": about.st_mtime_ns}
    prefix = _prefix(root if is_url(root) else os.path.abspath(root))
    plain = without_query(path)
    return Place(
        url=shown(full),
        filesystem=filesystem,
        path=path,
        relative=f"{plain}/".removeprefix(prefix).rstrip("/") if f"{plain}/".startswith(prefix) else shown(full),  # of the root itself: ''
        size=entry.get("size"),
        stamp=_stamp(entry),
    )


@functools.lru_cache
def _prefix(root: str) -> str:
    """What the paths of a filesystem begin with that lie under the root."""
    return open_filesystem(root)[1].rstrip("/") + "/"


def _stamp(entry: dict[str, Any]) -> str:
    if "mtime" in entry:
        return f"mtime:{entry['mtime']}"
    return next((f"{name}:{entry[name]}" for name in STAMPS if entry.get(name)), "")


def _with_sizes(places: list[Place], retry: Retry) -> list[Place]:
    """Asks for the size of each file that was named and not listed."""
    unknown = [place for place in places if place.size is None]
    for folder in sorted({posixpath.dirname(place.path) for place in unknown if protocol_of(place.url) == "hf"}):
        some = next(place for place in unknown if posixpath.dirname(place.path) == folder)
        retry(lambda some=some, folder=folder: some.filesystem.ls(folder, detail=True), "listing", full_url_of(some.filesystem, folder))  # the next answers come from its cache

    def ask(place: Place) -> Place:
        entry = retry(lambda: place.filesystem.info(place.path), "asking for the size", place.url)
        return replace(place, size=entry.get("size"), stamp=_stamp(entry))

    asked = dict(zip((place.path for place in unknown), in_threads(ask, unknown), strict=True))
    return [asked.get(place.path, place) for place in places]
