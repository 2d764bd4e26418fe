"""What is to be evaluated and how images are read: from a recipe, or from a YAML file of its own."""

import os
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from protoclip_scale.data.decode import Limits
from protoclip_scale.errors import UserError
from protoclip_scale.recipe.names import nearest
from protoclip_scale.recipe.problems import one_line
from protoclip_scale.recipe.schema import Data, Evaluation, Recipe


@dataclass(frozen=True)
class Suite:
    """Held-out sets, the folder or URL that their files are relative to, and the limits on images and retries."""

    evaluation: Evaluation
    root: str
    limits: Limits = Limits()
    retry_seconds: float = Data.model_fields["retry_seconds"].default

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
    return Suite(recipe.evaluation, data.root, Limits(max_pixels=data.max_pixels, max_bytes=data.max_bytes), data.retry_seconds)


def suite_of_file(path: str | os.PathLike) -> Suite:
    """The content of a recipe's ``evaluation`` section in a file of its own; its files are relative to that file's folder.

    Raises UserError with one line for a file that is missing, not YAML or not such a section, or that names no set.
    """
    path = Path(path).expanduser()
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--suite {path}: cannot be read ({error}); name a YAML file, or `recipe` for the run's own sets") from None
    except yaml.YAMLError as error:
        raise UserError(f"--suite {path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not tree.get("sets"):
        raise UserError(f"--suite {path}: names no sets; write what stands under `evaluation:` in a recipe, `sets:` first")
    try:
        evaluation = Evaluation.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"--suite {path}: {one_line({**problem, 'loc': ('evaluation', *problem['loc'])})}") from None
    return Suite(evaluation, str(path.absolute().parent))
