"""Recall with several captions per image (methods 7.4) against a twin that tries every order of tied items."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from protoclip_scale.evaluation.diagnostics import modality_figures
from protoclip_scale.evaluation.retrieval import hit_probability, retrieval_figures

R1_SCORES = torch.tensor([[0.9, 0.1, 0.8, 0.3], [0.2, 0.7, 0.6, 0.5], [0.4, 0.65, 0.1, 0.95]])
R1_IMAGES = torch.tensor([0, 0, 1, 2])


def from_scores(scores, caption_image, queries=None):
    """Embeddings whose products are exactly these scores: images as unit vectors of a basis, texts as columns."""
    return retrieval_figures(torch.eye(len(scores)), scores.T.contiguous(), torch.arange(scores.shape[1]), caption_image, queries)


def slow_hits(scores, correct, k):
    """Share of all orders of the items, among those sorted by score, that have a correct one among the first k."""
    orders = [o for o in itertools.permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in itertools.pairwise(o))]
    return sum(any(correct[item] for item in order[:k]) for order in orders) / len(orders)


def test_r1_has_the_figures_of_the_specification():
    figures = from_scores(R1_SCORES, R1_IMAGES)
    assert figures["image_to_text/R@1"] == pytest.approx(2 / 3)
    assert figures["text_to_image/R@1"] == pytest.approx(0.5)
    assert all(figures[f"{way}/R@{k}"] == 1 for way in ("image_to_text", "text_to_image") for k in (5, 10))
    assert 100 * figures["mean_recall"] == pytest.approx(86.11, abs=0.005)
    assert (figures["n"], figures["captions"]) == (3, 4)


@pytest.mark.parametrize("seed", range(20))
def test_ties_are_broken_at_random_in_expectation(seed):
    generator = torch.Generator().manual_seed(seed)
    caption_image = torch.tensor([0, 0, 1, 2, 2, 2])
    scores = torch.randint(3, (3, 6), generator=generator) / 4
    figures = from_scores(scores, caption_image)
    by_image = [slow_hits(scores[i].tolist(), (caption_image == i).tolist(), 1) for i in range(3)]
    by_caption = [slow_hits(scores[:, c].tolist(), [i == caption_image[c] for i in range(3)], 1) for c in range(6)]
    assert figures["image_to_text/R@1"] == pytest.approx(sum(by_image) / 3)
    assert figures["text_to_image/R@1"] == pytest.approx(sum(by_caption) / 6)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_hit_probability_equals_all_orders(k):
    for greater, ties, own in itertools.product(range(4), range(3), range(1, 3)):
        scores = [2] * greater + [1] * (ties + own) + [0]
        correct = [False] * (greater + ties) + [True] * own + [False]
        found = hit_probability(torch.tensor(greater), torch.tensor(ties), torch.tensor(own), k)
        assert found.item() == pytest.approx(slow_hits(scores, correct, k)), (greater, ties, own)


@pytest.mark.parametrize("captions_per_image", [1, 3])
def test_a_collapsed_model_scores_chance(captions_per_image):
    num_images = 60
    one = F.normalize(torch.randn(1, 48, generator=torch.Generator().manual_seed(0)), dim=1)
    images = F.normalize(one * torch.linspace(0.9, 1.1, num_images)[:, None], dim=1)  # equal up to rounding
    caption_image = torch.arange(num_images).repeat_interleave(captions_per_image)
    figures = retrieval_figures(images, one.expand(len(caption_image), -1).contiguous(), torch.arange(len(caption_image)), caption_image)
    for k in (1, 5, 10):
        assert figures[f"text_to_image/R@{k}"] == pytest.approx(k / num_images)
    assert figures["text_to_image/R@10"] == pytest.approx(figures["chance_R@10"])
    assert figures["mean_recall"] == pytest.approx(figures["chance_mean_recall"])
    if captions_per_image == 1:
        assert figures["image_to_text/R@10"] == pytest.approx(figures["chance_R@10"])


def test_a_caption_shared_by_two_images_is_half_a_hit_for_a_perfect_model():
    figures = retrieval_figures(torch.eye(3), torch.tensor([[1.0, 1, 0], [0, 0, 1]]), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]))
    assert figures["image_to_text/R@1"] == figures["text_to_image/R@1"] == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_queries_ask_a_larger_gallery():
    figures = from_scores(R1_SCORES, R1_IMAGES, queries=torch.tensor([0]))
    assert figures["image_to_text/R@1"] == 1
    assert figures["text_to_image/R@1"] == pytest.approx(0.5)  # captions 0 and 1 have ranks 0 and 2
    assert figures["n"] == 3


def test_tiles_do_not_change_the_figures(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    images, texts = (F.normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (30, 50))
    arguments = images, texts, torch.arange(50), torch.cat([torch.arange(30), torch.arange(20)])
    whole = retrieval_figures(*arguments)
    monkeypatch.setattr("protoclip_scale.evaluation.retrieval.TILE_SCORES", 64)
    assert retrieval_figures(*arguments) == whole


def test_modality_gap_of_equal_and_opposite_features():
    rows = F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(2)), dim=1)
    same = modality_figures(rows, rows)
    assert same["modality_gap"] == 0
    assert same["positive_cosine"] == pytest.approx(1)
    one_way = rows[:1].expand(40, -1)
    assert modality_figures(one_way, -one_way)["modality_gap"] == pytest.approx(2)
    assert modality_figures(one_way, rows)["image_feature_std"] == pytest.approx(0, abs=1e-7) != modality_figures(rows, rows)["image_feature_std"]
