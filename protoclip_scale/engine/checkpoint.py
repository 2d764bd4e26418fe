"""Checkpoints: safetensors shards of named tensor ranges, a manifest with hashes, and one atomic rename to publish.

Every rank writes its ranges; whoever loads puts the ranges together, so the number of ranks may change. A directory that
is visible under its final name is complete. ``step-00001200.prototypes`` holds what clustering added at the same step.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from protoclip_scale import collectives
from protoclip_scale.engine.faults import event
from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_json, sync

SCHEMA = 1
_SMALL = 65_536


@dataclass(frozen=True)
class Cursor:
    """Where the episode machine stands: the next phase of which episode, and the steps of its training already taken."""

    episode: int
    phase: str
    step_in_episode: int
    step: int


def ranges(index: int, numel: int, world: int) -> list[tuple[int, int]]:
    """[start, stop) of a flattened tensor for each rank: small tensors go whole to one, large ones are cut evenly."""
    if numel < _SMALL:
        return [(0, numel) if r == index % world else (0, 0) for r in range(world)]
    return [(numel * r // world, numel * (r + 1) // world) for r in range(world)]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(folder: Path) -> None:
    """Delete a checkpoint; under another name first, so that no half of it is ever taken for one."""
    if folder.is_dir():
        leaving = folder.with_name(f".leaving-{folder.name}")
        folder.rename(leaving)
        shutil.rmtree(leaving)


def save(final: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any], may_publish: Callable[[], None]) -> None:
    """Write and publish a checkpoint directory; a collective.

    ``tensors`` must be the same on all ranks. ``about`` (JSON) goes into the manifest. ``may_publish`` is called on rank 0
    before the rename and raises if a newer attempt owns the run.
    """
    rank, world = collectives.rank(), collectives.world_size()
    writing = final.with_name(f".writing-{final.name}")
    if rank == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    collectives.barrier()
    pieces = {}
    for index, (name, tensor) in enumerate(sorted(tensors.items())):
        start, stop = ranges(index, tensor.numel(), world)[rank]
        if stop > start:
            pieces[f"{name}@{start}"] = tensor.detach().reshape(-1)[start:stop].cpu().contiguous().clone()
    from safetensors.torch import save_file  # a tenth of a second that finding a checkpoint need not wait for

    shard = writing / f"shard-{rank + 1:05d}-of-{world:05d}.safetensors"
    save_file(pieces, shard)
    sync(shard)
    written = collectives.all_gather_objects({"name": shard.name, "bytes": shard.stat().st_size, "sha256": _sha256(shard)})
    event("checkpoint.written")

    def publish() -> None:
        manifest = {
            "schema": SCHEMA,
            **about,
            "files": {entry["name"]: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for entry in written},
            "tensors": {
                name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in sorted(tensors.items())
            },
        }
        publish_json(writing / "manifest.json", manifest)
        may_publish()
        _remove(final)
        os.rename(writing, final)
        sync(final.parent)

    collectives.from_rank_zero(publish)
    event("checkpoint.published")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint whose files have the promised sizes and hashes.

    Raises:
        UserError: a file is missing, truncated or changed, naming it.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        files, schema = manifest["files"], manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder}: manifest.json cannot be read ({error}); resume from another checkpoint with --resume") from None
    if schema != SCHEMA:
        raise UserError(f"checkpoint {folder}: its format is version {schema}, this release reads version {SCHEMA}")
    for name, facts in files.items():
        file = folder / name
        if not file.is_file():
            problem = "is missing"
        elif file.stat().st_size != facts["bytes"]:
            problem = f"has {file.stat().st_size} bytes instead of {facts['bytes']}"
        elif _sha256(file) != facts["sha256"]:
            problem = "was changed or damaged (sha256 differs)"
        else:
            continue
        raise UserError(f"checkpoint {folder}: {name} {problem}; resume from another checkpoint with --resume")
    return manifest


def read_tensors(folder: Path, manifest: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors whose names start with ``prefix``, put together from their ranges, on the CPU."""
    tensors = {
        name: torch.empty(facts["shape"], dtype=getattr(torch, facts["dtype"]))
        for name, facts in manifest["tensors"].items()
        if name.startswith(prefix)
    }
    filled = dict.fromkeys(tensors, 0)
    for file in manifest["files"]:
        try:
            with safe_open(folder / file, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118 (not a dict)
                    name, _, start = key.rpartition("@")
                    if name in tensors:
                        piece = shard.get_tensor(key)
                        tensors[name].reshape(-1)[int(start) : int(start) + piece.numel()] = piece
                        filled[name] += piece.numel()
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint {folder}: {file} cannot be read ({error}); resume from another checkpoint with --resume") from None
    for name, tensor in tensors.items():
        if filled[name] != tensor.numel():
            raise UserError(f"checkpoint {folder}: {name} has {filled[name]} of {tensor.numel()} values; resume from another checkpoint with --resume")
    return tensors


def list_checkpoints(run_dir: Path | str) -> list[Path]:
    """Published checkpoints of a run, oldest first; what only holds prototypes is not one."""
    return sorted(p for p in (Path(run_dir) / "checkpoints").glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit())


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def prototypes_folder(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".prototypes")


def cursor_of(manifest: dict[str, Any]) -> Cursor:
    return Cursor(**manifest["cursor"])


def facts(folder: Path) -> dict[str, Any]:
    """The manifest of a published checkpoint, its files unseen; empty if it cannot be read."""
    try:
        return json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}


def prototypes_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of what clustering added at a checkpoint's step, or None. Raises UserError if it is damaged."""
    folder = prototypes_folder(checkpoint)
    return read_manifest(folder) if folder.is_dir() else None


def describe(cursor: Cursor, samples: int, attempt: int, **more: Any) -> dict[str, Any]:
    """The JSON part of a manifest."""
    return {"cursor": asdict(cursor), "samples": samples, "attempt": attempt, **more}


def find(run_dir: Path, chosen: str) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint to load, its manifest, and warnings about damaged ones that were passed over.

    ``chosen``: ``latest``, a step number, or a path. Raises UserError if there is none, or the chosen one is damaged.
    """
    checkpoints = list_checkpoints(run_dir)
    if chosen != "latest":
        folder = folder_of(run_dir, int(chosen)) if chosen.isdigit() else Path(chosen)
        if not folder.is_dir():
            have = ", ".join(str(int(p.name.removeprefix("step-"))) for p in checkpoints) or "none"
            raise UserError(f"checkpoint {chosen}: there is none in {run_dir}; steps there are: {have}")
        return folder, read_manifest(folder), []
    warnings: list[str] = []
    for folder in reversed(checkpoints):
        try:
            return folder, read_manifest(folder), warnings
        except UserError as error:
            warnings.append(str(error))
    raise UserError(warnings[0] if warnings else f"{run_dir} holds no checkpoint; train it first, or name another run directory")


def read_weights(run_dir: Path | str, chosen: str = "latest") -> dict[str, torch.Tensor]:
    """The state dict of a run's model, without the optimiser's half."""
    folder, manifest, _ = find(Path(run_dir), chosen)
    return {name.removeprefix("model/"): tensor for name, tensor in read_tensors(folder, manifest, "model/").items()}


def set_aside(run_dir: Path, after: int, attempt: int) -> list[str]:
    """Rename the checkpoints of steps after ``after``: a run resumed from an older one leaves them, and must not find them later."""
    moved = []
    for folder in list_checkpoints(run_dir):
        if int(folder.name.removeprefix("step-")) > after:
            for path in (folder, prototypes_folder(folder)):
                if path.is_dir():
                    path.rename(path.with_name(f"discarded-{attempt:04d}-{path.name}"))
                    moved.append(path.name)
    return moved


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints; 0 keeps all. Prototypes saved beside a checkpoint go with it."""
    for folder in list_checkpoints(run_dir)[:-keep] if keep else []:
        _remove(prototypes_folder(folder))
        _remove(folder)
