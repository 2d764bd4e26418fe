"""What a source holds, as plain facts that go into a run's folder, and one line about what has changed since."""

import hashlib
import json
from typing import Any

from protoclip_scale.data.sources.formats import FileScan, Place
from protoclip_scale.recipe import schema

SHOWN = 3  # names of each kind of change


def fingerprint(
    source: schema.Source, image_root: str | None, layout: str, places: list[Place], scans: list[FileScan], columns: dict[str, str]
) -> str:
    """sha256 of the layout, the image and caption columns with their types and in their order, where a table's images lie, and each file's path under the
    root, size, rows of its blocks and digest.

    Neither the root nor the cache bears on it; extra columns do not either, for they change no row.
    """
    facts = {
        "layout": layout,
        "image": (source.columns.image, columns.get(source.columns.image)),
        "captions": [(name, columns.get(name)) for name in source.columns.captions],
        "image_root": image_root,
        "separator": source.separator,
        "header": source.header,
        "files": [(place.relative, place.size, scan.rows, scan.digest) for place, scan in zip(places, scans, strict=True)],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def describe(reader) -> dict[str, Any]:
    """A BlockReader's source: name, format, commit (of a Hub dataset), columns with types, files with size, rows and digest, rows in all, fingerprint.

    150 kB as JSON for 1,540 files.
    """
    files = [
        {"file": place.relative, "size": place.size, "rows": sum(scan.rows), "digest": scan.digest}
        for place, scan in zip(reader.places, reader.scans, strict=True)
    ]
    return {
        "name": reader.name,
        "format": reader.layout,
        "commit": reader.commit,
        "columns": {name: str(kind) for name, kind in reader.column_types.items()},
        "image": reader.source.columns.image,
        "captions": list(reader.source.columns.captions),
        "image_root": reader.image_root,
        "files": files,
        "rows": sum(file["rows"] for file in files),
        "fingerprint": reader.fingerprint,
    }


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """One line that says what changed between two descriptions of a source; empty if nothing that bears on its rows did."""
    if before["fingerprint"] == now["fingerprint"]:
        return ""
    old, new = ({file["file"]: file for file in description["files"]} for description in (before, now))
    both = [name for name in old if name in new]
    rows = [name for name in both if old[name]["rows"] != new[name]["rows"]]
    content = [name for name in both if name not in set(rows) and (old[name]["digest"], old[name]["size"]) != (new[name]["digest"], new[name]["size"])]
    parts = [
        *_change("format", before["format"], now["format"]),
        *_change("commit", before["commit"], now["commit"]),
        *_change("columns", _columns(before), _columns(now)),
        *_change("image column", before["image"], now["image"]),
        *_change("caption columns", ", ".join(before["captions"]), ", ".join(now["captions"])),
        *_change("image_root", before["image_root"], now["image_root"]),
        *_files("missing", [name for name in old if name not in new]),
        *_files("new", [name for name in new if name not in old]),
        *_files("with another number of rows", [f"{name} ({old[name]['rows']} -> {new[name]['rows']})" for name in rows]),
        *_files("with other content", content),
    ]
    return "; ".join(parts) or "its blocks are cut otherwise, or its files are listed in another order"


def _change(what: str, before: Any, now: Any) -> list[str]:
    return [] if before == now else [f"{what} {before or 'none'} -> {now or 'none'}"]


def _columns(description: dict[str, Any]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in description["columns"].items())


def _files(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{len(names)} {'file' if len(names) == 1 else 'files'} {what}: {', '.join(names[:SHOWN])}{more}"]
