"""Zero-shot figures beside accuracy: the right class among the first five, ROC-AUC, and a suite's average over the sets' chosen figures (methods 7.1)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.retrieval import TOLERANCE, hit_probability
from protoclip_scale.recipe.schema import EvaluationSet

TOP = 5
TOKENS = "_tokens"  # in the key of a measure: by late interaction instead of by embeddings


def top_k(scores: torch.Tensor, targets: torch.Tensor, k: int) -> float:
    """Expected share of rows whose right class is among the k with the highest of ``scores`` [n, C], when level classes stand in random order."""
    right = scores.gather(1, targets[:, None])
    greater = (scores > right + TOLERANCE).sum(1)
    ties = ((scores - right).abs() <= TOLERANCE).sum(1) - 1
    return hit_probability(greater, ties, torch.ones_like(ties), k).mean().item()


def roc_auc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """The probability that a positive row scores above a negative one, ties counting half (scores closer than 1e-6 are level as a rule).

    ``scores`` [n], ``positive`` [n] bool. A collapsed model gets 1/2. UserError if all rows are of one kind. Cost: one sort.
    """
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        raise UserError(f"ROC-AUC needs rows of both classes, but all {len(positive)} are of one; check the class column")
    levels, place = torch.unique((scores.double() / TOLERANCE).round(), return_inverse=True)
    counts = torch.bincount(place, minlength=len(levels)).double()
    ranks = counts.cumsum(0) - (counts - 1) / 2  # mean rank of a level, from 1 on
    above = ranks[place][positive].sum() - num_positive * (num_positive + 1) / 2
    return (above / (num_positive * num_negative)).item()


def ranking_figures(images: torch.Tensor, class_rows: torch.Tensor, targets: torch.Tensor, top1: float, metric: str) -> dict[str, float]:
    """``ranking_figures_of_scores`` by cosines: ``images`` [n, D], ``class_rows`` [C, D] unit rows; rows with target -1 are left out."""
    return ranking_figures_of_scores(images[targets >= 0] @ class_rows.T, targets[targets >= 0], top1, metric)


def ranking_figures_of_scores(scores: torch.Tensor, targets: torch.Tensor, top1: float, metric: str) -> dict[str, float]:
    """``top5`` and ``top1_top5`` (their mean with top 1) of more than five classes; ``roc_auc`` of two, the second being positive, where it is the ``metric``.

    ``scores`` [n, C], ``targets`` [n] int64. UserError for a metric that the number of classes does not allow.
    """
    num_classes = scores.shape[1]
    if metric == "roc_auc" and num_classes != 2:
        raise UserError(f"metric roc_auc is for two classes, not {num_classes}; choose top1 or class_mean")
    if metric == "top1_top5" and num_classes <= TOP:
        raise UserError(f"metric top1_top5 is for more than {TOP} classes, not {num_classes}; choose top1 or class_mean")
    figures = {}
    if num_classes > TOP:
        top5 = top_k(scores, targets, TOP)
        figures = {"top5": top5, "top1_top5": (top1 + top5) / 2}
    return figures | ({"roc_auc": roc_auc(scores[:, 1] - scores[:, 0], targets == 1)} if metric == "roc_auc" else {})


def chosen_key(held_out: EvaluationSet, figures: Mapping[str, Any]) -> str:
    """The key of the figure that stands for a set: by embeddings, or by tokens where ``figures`` has no such one."""
    metric = held_out.chosen_metric
    measure, column = ("retrieval", "") if metric == "mean_recall" else ("zero_shot", f"/{held_out.classify[0]}")
    keys = [f"{held_out.name}/{measure}{suffix}{column}/{metric}" for suffix in ("", TOKENS)]
    return next((key for key in keys if key in figures), keys[0])


def average(sets: Sequence[EvaluationSet], figures: Mapping[str, Any]) -> float:
    """The unweighted mean over sets of the figure that stands for each. UserError for a set that has none."""
    keys = {held_out.name: chosen_key(held_out, figures) for held_out in sets}
    for name, key in keys.items():
        if key not in figures:
            raise UserError(f"evaluation set {name} has no figure {key}, so the suite has no average; correct its metric, its classify or its captions")
    return sum(figures[key] for key in keys.values()) / len(keys)
