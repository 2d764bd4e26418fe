"""Top 5, ROC-AUC and a suite's average, against scikit-learn and slow twins."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score, top_k_accuracy_score

from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.ranking import average, ranking_figures, roc_auc, top_k
from protoclip_scale.recipe.schema import EvaluationSet


@pytest.mark.parametrize("levels", [None, 7])
def test_roc_auc_is_that_of_scikit_learn(levels):
    rng = np.random.default_rng(levels)
    scores = rng.standard_normal(500) if levels is None else rng.integers(levels, size=500) / levels
    positive = rng.random(500) < 0.3
    assert roc_auc(torch.tensor(scores), torch.tensor(positive)) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)


def test_top_5_is_that_of_scikit_learn_where_nothing_is_level():
    draws = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(300, 12, generator=draws), torch.randint(12, (300,), generator=draws)
    assert top_k(scores, targets, 5) == pytest.approx(top_k_accuracy_score(targets, scores, k=5), abs=1e-12)


def test_a_collapsed_model_scores_chance():
    rows = F.normalize(torch.ones(40, 8), dim=1)
    noise = 1e-8 * torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    figures = ranking_figures(rows + noise, rows[:20], torch.full((40,), 3), 1 / 20, "top1_top5")  # of one class: a fixed order would score 0 or 1
    assert figures["top5"] == pytest.approx(5 / 20) and figures["top1_top5"] == pytest.approx((1 / 20 + 5 / 20) / 2)
    assert ranking_figures(rows + noise, rows[:2], torch.arange(40) % 2, 0.5, "roc_auc")["roc_auc"] == pytest.approx(0.5)


def test_the_second_class_is_the_positive_one():
    class_rows = torch.eye(2)
    images = F.normalize(torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.2, 0.9], [0.7, 0.6], [0.0, 0.0]]), dim=1)
    figures = ranking_figures(images, class_rows, torch.tensor([0, 0, 1, 1, -1]), 0.0, "roc_auc")
    assert figures == {"roc_auc": 1.0}
    assert ranking_figures(images, class_rows, torch.tensor([1, 1, 0, 0, -1]), 0.0, "roc_auc") == {"roc_auc": 0.0}


@pytest.mark.parametrize(
    ("num_classes", "targets", "metric", "message"),
    [(3, [0, 1, 2], "roc_auc", "for two classes, not 3"), (5, [0, 1, 2], "top1_top5", "more than 5 classes, not 5"), (2, [1, 1, 1], "roc_auc", "all 3 are of one")],
)
def test_metrics_that_the_classes_do_not_allow(num_classes, targets, metric, message):
    with pytest.raises(UserError, match=message):
        ranking_figures(torch.eye(8)[:3], torch.eye(8)[:num_classes], torch.tensor(targets), 0.0, metric)


def test_the_average_is_over_the_sets_own_metrics():
    sets = [
        EvaluationSet(name="a", files="x", classify=("c",), metric="class_mean"),
        EvaluationSet(name="b", files="x", classify=("d", "e")),
        EvaluationSet(name="c", files="x"),
    ]
    figures = {"a/zero_shot/c/top1": 0.9, "a/zero_shot/c/class_mean": 0.3, "b/zero_shot/d/top1": 0.6, "b/zero_shot/e/top1": 0.1, "c/retrieval/mean_recall": 0.0}
    assert average(sets, figures) == pytest.approx(0.3)
    with pytest.raises(UserError, match="evaluation set c has no figure c/retrieval/mean_recall"):
        average(sets, {key: value for key, value in figures.items() if not key.startswith("c/")})
