"""The manifest of a checkpoint: where training stands, which files belong to it, their sizes and digests, and which values lie in which.

Schema 2 says in which files the pieces of each tensor lie, and carries a digest of itself; schema 1 did not, and is read too.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_text

SCHEMA = 2
READABLE = (1, 2)
NAME = "manifest.json"
WHOLE = {"weights": "live", "weights_ema": "ema"}  # the manifest's keys of whole weights, each of a file KEY.safetensors, and whose they are
_ELSE = "resume from another checkpoint with --resume"


@dataclass(frozen=True)
class Cursor:
    """Where the episode machine stands: the next phase of which episode, and the steps of its training already taken."""

    episode: int
    phase: str
    step_in_episode: int
    step: int


def describe(cursor: Cursor, samples: int, attempt: int, **more: Any) -> dict[str, Any]:
    """The JSON part of a manifest."""
    return {"cursor": asdict(cursor), "samples": samples, "attempt": attempt, **more}


def cursor_of(manifest: dict[str, Any]) -> Cursor:
    return Cursor(**manifest["cursor"])


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """One line for each key: a table of ten thousand pieces stays out of the way of who reads the rest."""
    manifest = {"schema": SCHEMA, **manifest}
    manifest["manifest_sha256"] = _own_digest(manifest)
    lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in manifest.items())
    publish_text(folder / NAME, "{\n" + ",\n".join(lines) + "\n}\n")


def missing_file(folder: Path) -> str | None:
    """Which file of a checkpoint is not there or has another size, or None; a look at names and sizes only."""
    found = facts(folder)
    if not found:
        return f"{NAME} cannot be read"
    for name, promised in found["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != promised["bytes"]:
            return f"{name} is missing or cut short"
    return None


def facts(folder: Path) -> dict[str, Any]:
    """The manifest of a published checkpoint, its files unseen; empty if it cannot be read."""
    try:
        return json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint whose files have the promised sizes and digests. Reads all its bytes, several files at a time.

    Raises:
        UserError: a file is missing, truncated or changed, naming it; or a later release wrote it.
    """
    try:
        manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
        files, schema = manifest["files"], manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder}: {NAME} cannot be read ({error}); {_ELSE}") from None
    if schema not in READABLE:
        raise UserError(f"checkpoint {folder}: its format is version {schema}, this release reads versions {' and '.join(map(str, READABLE))}; use the release that wrote it")
    if schema > 1 and manifest.get("manifest_sha256") != _own_digest(manifest):
        raise UserError(f"checkpoint {folder}: {NAME} was changed or damaged (its own sha256 differs); {_ELSE}")
    with ThreadPoolExecutor(8) as pool:
        problems = [problem for problem in pool.map(lambda name: _problem_of(folder / name, files[name]), files) if problem]
    if problems:
        raise UserError(f"checkpoint {folder}: {problems[0]}; {_ELSE}")
    return manifest


def _problem_of(file: Path, promised: dict[str, Any]) -> str | None:
    """What is wrong with a file, or None."""
    try:
        size = file.stat().st_size
        if size != promised["bytes"]:
            return f"{file.name} has {size} bytes instead of {promised['bytes']}"
        return None if sha256_of(file) == promised["sha256"] else f"{file.name} was changed or damaged (sha256 differs)"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
