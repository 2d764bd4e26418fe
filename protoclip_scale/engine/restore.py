"""What the copies of a run (``run.copy_to``) know and give back: to a run directory that is empty, or lacks the newest checkpoint."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from protoclip_scale.data.sources.retry import text_of
from protoclip_scale.engine import checkpoint
from protoclip_scale.engine.checkpoint.copies import RUN_FILES, Copies
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Known:
    """What stands in the place of the copies: the run's id (None if it holds no run), its newest attempt, and the steps of complete copies."""

    run_id: str | None = None
    attempt: int = 0
    steps: tuple[int, ...] = ()


def copies_of(recipe: Recipe) -> Copies | None:
    """The place that ``run.copy_to`` names. UserError if it cannot be one."""
    place = recipe.run.copy_to
    return Copies(place.format(name=recipe.name), recipe.data.retry_seconds) if place else None


def ask(copies: Copies) -> Known:
    """Raises what the file system raises."""
    return Known(copies.run_id(), copies.newest_attempt(), tuple(copies.steps()))


def ask_once(copies: Copies) -> tuple[Known, list[str]]:
    """``ask`` where the run can go on without an answer; then a warning says so."""
    try:
        return ask(copies), []
    except UserError:
        raise
    except Exception as error:
        return Known(), [f"run.copy_to {copies.shown} does not answer ({text_of(error)}); going on from the run directory"]


def recipe_of(copies: Copies) -> Recipe | None:
    """The recipe that the copied run was trained with; None before its first copy."""
    content = copies.patiently("reading recipe.yaml", lambda: copies.get_bytes("recipe.yaml"))
    if content is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content)
        return load_recipe(path)


def bring(copies: Copies, steps: list[int], run_dir: Path) -> tuple[int | None, list[str]]:
    """Bring the first of ``steps`` whose copy is sound into a run directory; that step (None if none is), and warnings about others.

    What the run had written comes with it, where it is not there.
    """
    warnings: list[str] = []
    for step in steps:
        folder = checkpoint.folder_of(run_dir, step)
        try:
            copies.get(folder.name, run_dir)
        except UserError as error:
            warnings.append(str(error))
            continue
        beside = checkpoint.prototypes_folder(folder).name
        if beside in copies.patiently("listing copies", copies.names):
            try:
                copies.get(beside, run_dir)
            except UserError as error:
                warnings.append(f"{error}; clustering again")
        for name in RUN_FILES:
            if not (run_dir / name).exists():
                content = copies.patiently(f"reading {name}", lambda name=name: copies.get_bytes(name))
                if content is not None:
                    (run_dir / name).write_bytes(content)
        return step, warnings
    return None, warnings
