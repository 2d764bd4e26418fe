"""Which checkpoints stay, and how one goes."""

import shutil
from collections.abc import Collection
from pathlib import Path

from protoclip_scale.engine.checkpoint.finding import list_checkpoints, prototypes_folder, step_of

_LEAVING = ".leaving-"


def outdated(steps: Collection[int], keep: int, keep_every: int) -> set[int]:
    """Steps whose checkpoints go: all but the newest ``keep`` (0 keeps all) and the multiples of ``keep_every`` (0: none besides)."""
    older = sorted(steps)[:-keep] if keep else []
    return {step for step in older if not keep_every or step % keep_every}


def prune(run_dir: Path, keep: int, keep_every: int = 0, in_use: Collection[str] = ()) -> None:
    """Delete checkpoints that are ``outdated``, apart from those whose folders' names are ``in_use``. Prototypes saved beside a checkpoint go with it."""
    folders = {step_of(folder.name): folder for folder in list_checkpoints(run_dir)}
    for leaving in (run_dir / "checkpoints").glob(f"{_LEAVING}*"):  # a kill came between
        shutil.rmtree(leaving, ignore_errors=True)
    for step in sorted(outdated(folders, keep, keep_every)):
        if not {folders[step].name, prototypes_folder(folders[step]).name} & set(in_use):
            remove(prototypes_folder(folders[step]))
            remove(folders[step])


def remove(folder: Path) -> None:
    """Delete a checkpoint; under another name first, so that no half of it is ever taken for one."""
    if folder.is_dir():
        leaving = folder.with_name(f"{_LEAVING}{folder.name}")
        shutil.rmtree(leaving, ignore_errors=True)
        folder.rename(leaving)
        shutil.rmtree(leaving)
