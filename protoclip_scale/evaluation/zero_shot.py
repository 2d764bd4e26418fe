"""Zero-shot classification by prompts (methods 7.1)."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.retrieval import TOLERANCE


def class_names(classes: Sequence[str]) -> list[str]:
    """The distinct names that occur, sorted; rows without a class name ("") have no class."""
    return sorted(set(classes) - {""})


def targets_of(classes: Sequence[str], names: Sequence[str]) -> torch.Tensor:
    """[n] int64: the place of each row's class in ``names``, -1 for a row whose class is not among them."""
    numbers = {name: number for number, name in enumerate(names)}
    return torch.tensor([numbers.get(value, -1) for value in classes], dtype=torch.int64)


def prompts(name: str, templates: Sequence[str], words: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """The words that stand for a class (by default its name, as it stands in the data) in each template."""
    for template in templates:
        if "{}" not in template:
            raise UserError(f"evaluation templates: {template!r} has no place for the class name; write {{}} where it stands")
    return [template.replace("{}", word) for word in (words or {}).get(name, (name,)) for template in templates]


def class_embeddings(
    names: Sequence[str],
    templates: Sequence[str],
    embeddings_of: Callable[[list[str]], torch.Tensor],
    words: Mapping[str, Sequence[str]] | None = None,
) -> torch.Tensor:
    """[C, D] unit rows: each prompt normalised, their mean, normalised. ``embeddings_of`` maps m prompts to [m, D]."""
    means = [F.normalize(embeddings_of(prompts(name, templates, words)), dim=1).mean(0) for name in names]
    return F.normalize(torch.stack(means), dim=1)


def accuracy_figures(correct: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """``top1`` and ``class_mean`` (the mean over the classes that occur of their accuracies), shares in [0, 1].

    ``correct`` [n] float: 1, 0, or the share of a tie; ``targets`` [n] int64.
    """
    counts = torch.bincount(targets)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, targets, correct.double())
    return {"top1": correct.double().mean().item(), "class_mean": (sums[counts > 0] / counts[counts > 0]).mean().item()}


def shared_hits(scores: torch.Tensor, targets: torch.Tensor, tolerance: float = TOLERANCE) -> torch.Tensor:
    """[n] float64: whether the class with the highest of the ``scores`` [n, C] is the right one; 1/k of a hit where k classes are level at the top."""
    at_top = scores >= scores.amax(1, keepdim=True) - tolerance
    return at_top.gather(1, targets[:, None])[:, 0].double() / at_top.sum(1)


def constant_accuracy(targets: torch.Tensor) -> float:
    """The accuracy of the best constant answer, the share of the largest class; ``targets`` [n] int64."""
    return torch.bincount(targets).max().item() / len(targets)


def zero_shot_figures(images: torch.Tensor, class_rows: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Accuracy of the class with the highest cosine.

    ``images`` [n, D] and ``class_rows`` [C, D] are unit rows; rows with target -1 are left out. k classes level at the top (within
    1e-6) count 1/k if the right one is among them: a collapsed model scores 1/C. ``constant`` is the accuracy of the best constant
    answer, ``classes`` the number of classes, ``n`` that of rows. Accuracies are shares in [0, 1].
    """
    images, targets = images[targets >= 0], targets[targets >= 0]
    correct = shared_hits(images @ class_rows.T, targets)
    return {**accuracy_figures(correct, targets), "constant": constant_accuracy(targets), "classes": len(class_rows), "n": len(targets)}
