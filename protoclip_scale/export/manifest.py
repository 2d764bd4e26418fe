"""``manifest.json`` of an export: what it was made of, its files with sizes and digests, and the comparison with the model."""

import hashlib
import json
from pathlib import Path
from typing import Any

from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_json

NAME = "manifest.json"
SCHEMA = 1


def write_manifest(folder: Path, about: dict[str, Any], known: dict[str, str]) -> None:
    """List all files that lie there. ``known``: digests of files that need not be read again."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": known.get(path.relative_to(folder).as_posix()) or sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != NAME
    }
    publish_json(folder / NAME, {"schema": SCHEMA, **about, "files": files})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none: others' folders have none. Raises UserError if it cannot be read."""
    try:
        manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise UserError(f"{folder / NAME} is of version {manifest['schema']}, this release reads version {SCHEMA}; use the release that wrote it")
        return manifest
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / NAME} cannot be read ({error!r}); export the model again") from error


def check_files(folder: Path) -> dict[str, Any]:
    """The manifest of an export whose files all have their sizes and digests. Raises UserError, naming the first that has not, or that is not listed."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no {NAME}: it is no export of this release; export the model again")
    for name, promised in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{folder}: {name} is missing; export the model again")
        if file.stat().st_size != promised["bytes"]:
            raise UserError(f"{folder}: {name} has {file.stat().st_size:,} bytes instead of {promised['bytes']:,}; export the model again")
        if sha256_of(file) != promised["sha256"]:
            raise UserError(f"{folder}: {name} was changed or damaged (sha256 differs); export the model again")
    return manifest


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
