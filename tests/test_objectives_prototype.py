"""ProtoCLIP's losses: the numeric cases P2-P7 and P11 of the method specification (P1 is tested with back translation)."""

import math

import pytest
import torch
from torch.nn import functional as F

from protoclip_scale.errors import UserError
from protoclip_scale.objectives import Targets, build_objectives
from protoclip_scale.prototypes.loss import make_contrast, prototype_loss
from protoclip_scale.recipe import load_recipe
from tests.support import RECIPES
from tests.test_objectives_clip import angles
from tests.test_prototypes_loss import plain_loss, plain_targets

CENTROIDS = angles(0, 30, 180) * torch.tensor([[0.9], [0.8], [1.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 1])
STUDENT = angles(5, 35, 175, 20)
SCALE = torch.tensor(1 / 0.07, dtype=torch.float64)


def translated(num_clusters: int) -> torch.Tensor:
    means = torch.zeros(num_clusters, 2, dtype=torch.float64)
    for k in range(3):
        means[k] = STUDENT[k == LABELS].mean(dim=0)
    return means


def with_empty(centroids: torch.Tensor) -> torch.Tensor:
    return torch.cat([centroids, torch.zeros(1, 2, dtype=torch.float64)])


def loss(prototypes: torch.Tensor, teacher: torch.Tensor | None = None, temperature: float = 0.01) -> torch.Tensor:
    """Hard labels without a teacher."""
    return prototype_loss(STUDENT, SCALE, make_contrast(prototypes, teacher, temperature), LABELS)


def targets_of(centroids: torch.Tensor, temperature: float) -> torch.Tensor:
    """[K, K]: what a label's target expects of unit vectors is the target itself."""
    return make_contrast(torch.eye(len(centroids), dtype=centroids.dtype), centroids, temperature).positives_KP


@pytest.mark.parametrize(("temperature", "expected"), [(0.1, 0.5134755), (0.01, 0.3309445)], ids=["soft 0.1", "soft 0.01"])
def test_p2_values(temperature, expected):
    assert loss(translated(3), CENTROIDS, temperature).item() == pytest.approx(expected, abs=1e-7)


def test_p2_value_of_hard_labels():
    assert loss(translated(3)).item() == pytest.approx(0.2536091, abs=1e-7)


def test_p2_targets():
    target = targets_of(CENTROIDS, 0.1)
    assert target[0].tolist() == pytest.approx([0.865834, 0.134166, 0], abs=1e-6)
    assert target[1].tolist() == pytest.approx([0.458938, 0.541061, 1e-6], abs=1e-6)
    assert targets_of(CENTROIDS, 0.01)[1].tolist() == pytest.approx([0.161627, 0.838373, 0], abs=1e-6)


def test_p3_an_empty_cluster_keeps_its_place_in_the_softmax():
    assert loss(translated(4), with_empty(CENTROIDS), 0.1).item() == pytest.approx(0.5206751, abs=1e-7)
    assert loss(translated(4)).item() == pytest.approx(0.2536096, abs=1e-7)


def test_p4_cold_targets_of_unit_centroids_are_hard_labels():
    unit = F.normalize(CENTROIDS, dim=1)
    assert loss(translated(3), unit, 1e-4).item() == pytest.approx(loss(translated(3)).item(), abs=1e-6)


def test_p5_a_short_centroid_is_not_its_own_target():
    centroids = torch.tensor([[0.2, 0.0], [0.9, 0.1], [0.0, 0.5]], dtype=torch.float64)
    assert targets_of(centroids, 0.01)[0].tolist() == pytest.approx([0, 1, 0], abs=1e-5)


def test_p6_hot_targets_are_uniform():
    logits = SCALE * STUDENT @ translated(3).T
    expected = (logits.logsumexp(1, keepdim=True) - logits).mean().item()
    assert loss(translated(3), CENTROIDS, 1e9).item() == pytest.approx(expected, abs=1e-8)


def test_p7_gradients_reach_students_and_scale_only():
    prototypes = translated(3).requires_grad_()
    teacher = CENTROIDS.clone().requires_grad_()
    student = STUDENT.clone().requires_grad_()
    log_scale = torch.tensor(math.log(1 / 0.07), dtype=torch.float64, requires_grad=True)
    prototype_loss(student, log_scale.exp(), make_contrast(prototypes, teacher, 0.1), LABELS).backward()
    assert prototypes.grad is None and teacher.grad is None
    assert student.grad.abs().sum() > 0 and log_scale.grad.abs() > 0


@pytest.fixture(scope="module")
def objectives():
    return build_objectives(load_recipe(RECIPES / "demo.yaml", []))


def episode_tensors() -> dict[str, torch.Tensor]:
    names = ("image_centroids", "text_centroids", "image_from_text", "text_from_image", "image_from_teacher", "text_from_teacher")
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(5, 2, generator=generator, dtype=torch.float64) * 0.5 for name in names}


@pytest.mark.parametrize("name", ["prototype", "teacher"])
def test_p11_the_mean_over_rows_does_not_depend_on_how_they_are_split(objectives, name):
    features = {"image_prototype": STUDENT, "text_prototype": angles(10, 30, 170, 25), "prototype_scale": SCALE}
    labels = {key: torch.tensor([4, 1, 2, 0]) for key in ("image", "text", "teacher")}
    whole = objectives[name].coupled(features, {}, Targets(torch.arange(4), episode_tensors(), labels)).item()
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        part = {key: value[rows] if value.ndim == 2 else value for key, value in features.items()}
        targets = Targets(torch.arange(4)[rows], episode_tensors(), {key: value[rows] for key, value in labels.items()})
        halves.append(objectives[name].coupled(part, {}, targets).item())
    assert sum(halves) / 2 == pytest.approx(whole, rel=1e-12)


def test_directions_use_the_other_modality(objectives):
    tensors, labels = episode_tensors(), {"image": torch.tensor([0, 1]), "text": torch.tensor([2, 3])}
    features = {"image_prototype": STUDENT[:2], "text_prototype": angles(10, 30), "prototype_scale": SCALE}
    image_term = plain_loss(STUDENT[:2], SCALE, tensors["image_from_text"], plain_targets(tensors["text_centroids"], labels["text"], 0.01))
    text_term = plain_loss(angles(10, 30), SCALE, tensors["text_from_image"], plain_targets(tensors["image_centroids"], labels["image"], 0.01))
    found = objectives["prototype"].coupled(features, {}, Targets(torch.arange(2), tensors, labels))
    assert found.item() == pytest.approx((0.5 * (image_term + text_term)).item(), rel=1e-12)


def test_prototypes_rest_in_warmup_and_in_the_locked_ending():
    recipe = load_recipe(RECIPES / "cc3m_protoclip.yaml", [])
    objective = build_objectives(recipe)["prototype"]
    assert [objective.active(e) for e in (0, 1, 97, 98, 99)] == [False, True, True, False, False]


@pytest.mark.parametrize("name", ["prototype", "teacher"])
def test_a_setting_decides_about_empty_clusters(name):
    """The label of one row in two is that of an empty cluster."""
    tensors, labels = episode_tensors(), {key: torch.tensor([4, 1]) for key in ("image", "text", "teacher")}
    for key in tensors:
        if "_from_" in key:
            tensors[key][4] = 0
    features = {"image_prototype": STUDENT[:2], "text_prototype": angles(10, 30), "prototype_scale": SCALE}
    gradients = {}
    for choice in ("zero", "masked"):
        objective = build_objectives(load_recipe(RECIPES / "demo.yaml", [f"objectives.{name}.empty_clusters={choice}"]))[name]
        rows = {key: value.clone().requires_grad_() for key, value in features.items()}
        objective.coupled(rows, {}, Targets(torch.arange(2), tensors, labels)).backward()
        gradients[choice] = rows["image_prototype"].grad
    assert gradients["zero"].any(dim=1).tolist() == [True, True] and gradients["masked"].any(dim=1).tolist() == [False, True]


def test_masking_without_back_translation_is_refused():
    with pytest.raises(UserError, match="raw centroids are never empty"):
        load_recipe(RECIPES / "demo.yaml", ["objectives.prototype.empty_clusters=masked", "objectives.prototype.back_translation=false"])
