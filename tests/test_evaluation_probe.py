"""The L-BFGS probe against scikit-learn's logistic regression, on real labels of the demo corpus and on hostile features."""

import functools
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from protoclip_scale.evaluation.probe import LinearProbe, choose_c, fit_logistic, held_out_rows, predict
from tests.support import CORPUS


@functools.cache
def pixel_features():
    """Pictures at 7 x 7 pixels, as features of their coarse class: (train, targets, test, targets, number of classes)."""
    features, names = [], []
    for file in sorted(CORPUS.glob("eval_seen_concept-*.parquet")):
        table = pq.read_table(file, columns=["image", "coarse"])
        for image, name in zip(table["image"].to_pylist(), table["coarse"].to_pylist(), strict=True):
            if name:
                features.append(np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB").resize((7, 7)), dtype=np.float64).ravel() / 255)
                names.append(name)
    kinds, targets = np.unique(names, return_inverse=True)
    features, targets = torch.tensor(np.stack(features)), torch.tensor(targets)
    test = torch.arange(len(targets)) % 3 == 0
    return features[~test], targets[~test], features[test], targets[test], len(kinds)


def test_probe_agrees_with_scikit_learn_at_the_chosen_c():
    train, targets, test, test_targets, num_classes = pixel_features()
    probe = LinearProbe(train.float(), targets, num_classes)
    train, test = train.float().double(), test.float().double()
    mean, deviation = train.mean(0), train.std(0, correction=0)
    reference = LogisticRegression(C=probe.c, max_iter=10_000, tol=1e-8).fit((train - mean) / deviation, targets)
    expected = reference.score((test - mean) / deviation, test_targets)
    reached = (probe.predict(test) == test_targets).double().mean().item()
    assert abs(reached - expected) <= 0.002
    np.testing.assert_allclose(probe.weights[:, :-1], reference.coef_, atol=1e-3 * np.abs(reference.coef_).max())
    assert expected > 2 * torch.bincount(test_targets).max().item() / len(test_targets)


@pytest.mark.parametrize("c", [1e-4, 1.0])
def test_raw_features_of_unlike_scale_reach_the_same_optimum(c):
    train, targets, _, _, num_classes = pixel_features()
    raw = train[:400, :30] * torch.logspace(-2, 1, 30, dtype=torch.float64) + 5
    targets = targets[:400]
    weights = fit_logistic(raw, targets, num_classes, c)
    reference = LogisticRegression(C=c, max_iter=1000, tol=1e-8, solver="newton-cg").fit(raw, targets)

    def objective(candidate):
        logits = raw @ candidate[:, :-1].T + candidate[:, -1]
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") + candidate[:, :-1].square().sum() / (2 * c)

    present = torch.tensor(reference.classes_)
    theirs = torch.cat([torch.tensor(reference.coef_), torch.tensor(reference.intercept_)[:, None]], dim=1)
    full = torch.zeros_like(weights)
    full[:, -1] = -1e3
    full[present] = theirs
    assert objective(weights).item() <= objective(full).item() * (1 + 1e-5)


def test_the_starting_point_changes_nothing_but_time():
    train, targets, _, _, num_classes = pixel_features()
    start = torch.randn(num_classes, train.shape[1] + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fit_logistic(train, targets, num_classes, 0.1, start), fit_logistic(train, targets, num_classes, 0.1), atol=1e-3, rtol=0)


def test_c_is_chosen_on_a_held_out_third_and_guards_against_overfitting():
    assert 0.3 < held_out_rows(10_000).double().mean() < 0.37
    assert torch.equal(held_out_rows(100), held_out_rows(200)[:100])
    train, targets, _, _, num_classes = pixel_features()
    standardised = (train - train.mean(0)) / train.std(0, correction=0)
    held_out = held_out_rows(len(train))
    chosen = choose_c(standardised, targets, num_classes)

    def held_out_accuracy(c):
        weights = fit_logistic(standardised[~held_out], targets[~held_out], num_classes, c)
        return (predict(weights, standardised[held_out]) == targets[held_out]).double().mean().item()

    assert held_out_accuracy(chosen) >= max(held_out_accuracy(c) for c in (1e-6, 1e-4, 1e-2, 1.0, 1e2)) - 0.005
    assert held_out_accuracy(chosen) > held_out_accuracy(1e6) + 0.02
