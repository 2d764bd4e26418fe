"""The checkpoints of a run directory: their names, the newest sound one, and those that a run resumed from an older one leaves behind.

A directory that is visible under its final name is complete. ``step-00001200.prototypes`` holds what clustering added at the same step.
"""

from pathlib import Path
from typing import Any

from protoclip_scale.engine.checkpoint.manifest import read_manifest
from protoclip_scale.errors import UserError


def list_checkpoints(run_dir: Path | str) -> list[Path]:
    """Published checkpoints of a run, oldest first; what only holds prototypes is not one."""
    return sorted(path for path in (Path(run_dir) / "checkpoints").glob("step-*") if path.is_dir() and is_checkpoint(path.name))


def is_checkpoint(name: str) -> bool:
    return name.startswith("step-") and name.removeprefix("step-").isdigit()


def step_of(name: str) -> int:
    """The step of a checkpoint's folder, or of the prototypes beside it."""
    return int(name.removeprefix("step-").removesuffix(".prototypes"))


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def prototypes_folder(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".prototypes")


def prototypes_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of what clustering added at a checkpoint's step, or None. Raises UserError if it is damaged."""
    folder = prototypes_folder(checkpoint)
    return read_manifest(folder) if folder.is_dir() else None


def find(run_dir: Path, chosen: str) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint to load, its manifest, and warnings about damaged ones that were passed over.

    ``chosen``: ``latest``, a step number, or a path. Raises UserError if there is none, or the chosen one is damaged.
    """
    checkpoints = list_checkpoints(run_dir)
    if chosen != "latest":
        folder = folder_of(run_dir, int(chosen)) if chosen.isdigit() else Path(chosen)
        if not folder.is_dir():
            have = ", ".join(str(step_of(path.name)) for path in checkpoints) or "none"
            raise UserError(f"checkpoint {chosen}: there is none in {run_dir}; steps there are: {have}")
        return folder, read_manifest(folder), []
    warnings: list[str] = []
    for folder in reversed(checkpoints):
        try:
            return folder, read_manifest(folder), warnings
        except UserError as error:
            warnings.append(str(error))
    raise UserError(warnings[0] if warnings else f"{run_dir} holds no checkpoint; train it first, or name another run directory")


def set_aside(run_dir: Path, after: int, attempt: int) -> list[str]:
    """Rename the checkpoints of steps after ``after``: a run resumed from an older one leaves them, and must not find them later."""
    moved = []
    for folder in list_checkpoints(run_dir):
        if step_of(folder.name) > after:
            for path in (folder, prototypes_folder(folder)):
                if path.is_dir():
                    path.rename(path.with_name(f"discarded-{attempt:04d}-{path.name}"))
                    moved.append(path.name)
    return moved
