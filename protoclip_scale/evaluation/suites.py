"""What is to be evaluated and how images are read: from a recipe, from a suite of the package, or from a YAML file of the user's."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from pydantic import ValidationError

from protoclip_scale.data.decode import Limits
from protoclip_scale.data.sources.filesystems import is_url
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.tasks import SHIPPED, suite_names, with_task
from protoclip_scale.recipe.names import nearest
from protoclip_scale.recipe.problems import one_line
from protoclip_scale.recipe.schema import Data, Evaluation, EvaluationSet, Recipe

RECIPE = "recipe"  # in the place of a suite's name: the sets that a run's recipe has


@dataclass(frozen=True)
class Suite:
    """Held-out sets, their tasks written out; the folder or URL that their files are relative to, and the limits on images and retries."""

    evaluation: Evaluation
    root: str
    limits: Limits = Limits()
    retry_seconds: float = Data.model_fields["retry_seconds"].default
    name: str = ""  # of a suite that has an average
    allow_subset: bool = False  # whether sets may hold another number of rows than they must

    @property
    def every_set(self) -> tuple[EvaluationSet, ...]:
        """The sets, and the one that probes learn from."""
        train = self.evaluation.probe_train
        return (*self.evaluation.sets, *([train] if train else ()))

    def __post_init__(self):
        names = [held_out.name for held_out in self.evaluation.sets]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"evaluation.sets: two sets have the name {name!r}; give each its own")
        for gallery, members in self.evaluation.gallery.items():
            for member in members:
                if member not in names:
                    raise UserError(f"evaluation.gallery.{gallery}: {member!r} is not one of evaluation.sets{nearest(member, names)}")


def suite_of_recipe(recipe: Recipe) -> Suite:
    """The recipe's own sets."""
    data = recipe.data
    return Suite(_with_tasks(recipe.evaluation), data.root, Limits(max_pixels=data.max_pixels, max_bytes=data.max_bytes), data.retry_seconds)


def suite_of(name_or_file: str | os.PathLike, data: str | os.PathLike) -> Suite:
    """A suite of the package, with files in the folder (or at the URL) ``data``, or a suite of the user's (``suite_of_file``)."""
    if str(name_or_file) not in suite_names():
        return suite_of_file(name_or_file)
    return _suite(SHIPPED / "suites" / f"{name_or_file}.yaml", str(data) if is_url(str(data)) else str(Path(data).expanduser().absolute()))


def suite_of_file(path: str | os.PathLike) -> Suite:
    """The content of a recipe's ``evaluation`` section in a file of its own, with an average if it gives the suite a ``name``; its files are relative to that file's folder.

    Raises UserError with one line for a file that is missing, not YAML or not such a section, or that names no set.
    """
    path = Path(path).expanduser()
    return _suite(path, str(path.absolute().parent))


def chosen(suite: Suite, sets: Sequence[str]) -> Suite:
    """The suite with some of its sets only, and without its average. UserError for a set that it has not, and for galleries of others."""
    names = [held_out.name for held_out in suite.evaluation.sets]
    for name in sets:
        if name not in names:
            raise UserError(f"--sets: {name!r} is not in the suite{nearest(name, names)}")
    kept = tuple(held_out for held_out in suite.evaluation.sets if held_out.name in sets)
    galleries = {name: members for name, members in suite.evaluation.gallery.items() if set(members) <= set(sets)}
    return replace(suite, evaluation=suite.evaluation.model_copy(update={"sets": kept, "gallery": galleries}), name="" if len(kept) < len(names) else suite.name)


def with_prompts(suite: Suite, prompts: str) -> Suite:
    """The suite with this kind of prompts (``schema.PROMPTS``) for all sets."""
    sets = tuple(held_out.model_copy(update={"prompts": prompts}) for held_out in suite.evaluation.sets)
    return replace(suite, evaluation=suite.evaluation.model_copy(update={"sets": sets}))


def _suite(path: Path, root: str) -> Suite:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--suite {path}: cannot be read ({error}); name a YAML file, one of {', '.join(suite_names())}, or `recipe` for the run's own sets") from None
    except yaml.YAMLError as error:
        raise UserError(f"--suite {path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not tree.get("sets"):
        raise UserError(f"--suite {path}: names no sets; write what stands under `evaluation:` in a recipe, `sets:` first")
    name = tree.pop("name", "")
    if not isinstance(name, str) or (name and not re.fullmatch(r"[A-Za-z0-9._-]+", name)):
        raise UserError(f"--suite {path}: name {name!r} cannot stand in a figure's key; use letters, digits, dots, dashes and underscores")
    try:
        evaluation = Evaluation.model_validate({key: value for key, value in tree.items() if key != "about"})
        return Suite(_with_tasks(evaluation), root, name=name)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"--suite {path}: {one_line({**problem, 'loc': ('evaluation', *problem['loc'])})}") from None


def _with_tasks(evaluation: Evaluation) -> Evaluation:
    train = evaluation.probe_train
    return evaluation.model_copy(update={"sets": tuple(map(with_task, evaluation.sets)), "probe_train": with_task(train) if train else None})
