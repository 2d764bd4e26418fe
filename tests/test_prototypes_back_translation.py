"""Prototype Back Translation (P1) and the target entropy, against figures of methods 6.10 and slow twins."""

import math

import numpy as np
import pytest

from protoclip_scale.prototypes.back_translation import class_means, unit_rows
from protoclip_scale.prototypes.diagnostics import imbalance, target_entropy
from protoclip_scale.prototypes.fixed_point import extent_of


def ang(*degrees: float) -> np.ndarray:
    radians = np.deg2rad(np.array(degrees))
    return np.stack([np.cos(radians), np.sin(radians)], axis=-1).astype(np.float32)


Z, LABELS = ang(5, 35, 175, 20), np.array([0, 1, 2, 1], dtype=np.int32)
P1 = np.array([[0.996195, 0.087156], [0.879422, 0.457798], [-0.996195, 0.087156], [0, 0]])


@pytest.mark.parametrize("cuts", [[], [2], [1, 3]])
def test_p1_class_means_with_an_empty_cluster(cuts):
    translated = class_means(np.split(Z, cuts), np.split(LABELS, cuts), 4)
    np.testing.assert_allclose(translated, P1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(translated, axis=1), [1, 0.991445, 1, 0], atol=1e-6)
    assert translated.dtype == np.float32 and not translated[3].any()


def test_class_means_are_those_of_a_slow_twin_however_rows_are_split():
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(5000, 32)).astype(np.float16), rng.integers(300, size=5000)
    twin = np.stack([rows[labels == k].astype(np.float64).mean(axis=0) for k in range(300)])
    whole = class_means([rows], [labels], 300)
    np.testing.assert_allclose(whole, twin, atol=1e-6)
    order = rng.permutation(5000)
    assert np.array_equal(class_means([rows], [labels], 300, extent_of([rows])), whole)
    shuffled = class_means(np.split(rows[order], [700, 2500]), np.split(labels[order], [700, 2500]), 300)
    assert np.array_equal(whole, shuffled), "a sum must not depend on the order of its terms"


def test_unit_rows_leave_empty_clusters_at_zero():
    np.testing.assert_allclose(np.linalg.norm(unit_rows(P1), axis=1), [1, 1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(unit_rows(P1)[1], P1[1] / 0.991445, atol=1e-6)


def test_target_entropy_is_that_of_a_slow_twin():
    centroids = ang(0, 30, 180) * np.array([[0.9], [0.8], [1.0]], dtype=np.float32)
    targets = np.array([[0.865834, 0.134166, 1e-300], [0.458938, 0.541061, 1e-6], [0, 0, 1]]) + 1e-300  # P2, temperature 0.1
    entropies = -(targets * np.log(targets)).sum(axis=1)
    expected = entropies[[0, 1, 2, 1]].mean() / math.log(3)
    assert target_entropy(centroids, [LABELS[:1], LABELS[1:]], 0.1) == pytest.approx(expected, rel=1e-4)


def test_target_entropy_goes_from_one_hot_to_uniform(monkeypatch):
    rng = np.random.default_rng(0)
    centroids, labels = unit_rows(rng.normal(size=(50, 8))), [rng.integers(50, size=400)]
    figures = [target_entropy(centroids, labels, temperature) for temperature in (1e-3, 0.01, 0.1, 1e3)]
    assert figures == sorted(figures) and figures[0] < 0.01 and figures[-1] == pytest.approx(1, abs=1e-6)
    monkeypatch.setattr("protoclip_scale.prototypes.diagnostics.TILE_ELEMENTS", 350)
    assert target_entropy(centroids, labels, 0.1) == pytest.approx(figures[2], rel=1e-6), "tiles change nothing"


def test_imbalance_goes_from_one_to_the_number_of_clusters():
    assert imbalance(np.array([5, 5, 5, 5])) == 1 and imbalance(np.array([0, 20, 0, 0])) == 4
