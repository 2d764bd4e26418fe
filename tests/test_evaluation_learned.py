"""Few-shot probes, nearest neighbours, SGD probes and k-means of embeddings, on real pictures' pixels and classes, against slow twins and scikit-learn."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from sklearn.neighbors import KNeighborsClassifier

from protoclip_scale.evaluation.embedding_clusters import embedding_cluster_figures
from protoclip_scale.evaluation.few_shot import drawn_rows, few_shot_figures
from protoclip_scale.evaluation.learned import Rows, learned_figures
from protoclip_scale.evaluation.neighbours import neighbour_hits
from protoclip_scale.evaluation.probe import predict
from protoclip_scale.evaluation.sgd_probe import fit_sgd
from protoclip_scale.recipe.schema import Evaluation
from protoclip_scale.recipe.schema.measures import Diagnostics, FewShot
from protoclip_scale.report.evaluation_table import evaluation_rows
from tests.support import spawn
from tests.test_evaluation_probe import pixel_features

CPU = torch.device("cpu")


@functools.cache
def unit_rows():
    """(train, targets, test, targets, number of classes): pixels about their mean at unit length, as float32."""
    train, targets, test, test_targets, num_classes = pixel_features()
    centre = train.mean(0)
    return F.normalize(train - centre, dim=1).float(), targets, F.normalize(test - centre, dim=1).float(), test_targets, num_classes


def classes_of(targets):
    return {"kind": [f"class {number:02d}" for number in targets.tolist()]}


def figures_with(train, test, **settings):
    section = Evaluation.model_validate(settings)
    rows = [Rows(images, images, classes_of(targets)) for images, targets in (train, test)]
    return learned_figures(section, rows[0], {"val": rows[1]}, CPU)["val"]


def test_neighbours_vote_as_scikit_learn_finds():
    train, targets, test, test_targets, _ = unit_rows()
    hits = neighbour_hits(train, targets, test, test_targets, 20, 0.07)
    reference = KNeighborsClassifier(20, metric="cosine", weights=lambda distances: np.exp(-distances / 0.07)).fit(train, targets)
    expected = reference.predict(test) == test_targets.numpy()
    assert abs(hits.mean().item() - expected.mean()) <= 0.002
    assert hits.mean() > 1.3 * torch.bincount(test_targets).max() / len(test_targets)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    assert torch.equal(neighbour_hits(train[order], targets[order], test, test_targets, 20, 0.07), hits)


def test_level_neighbours_share_the_last_places():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    votes_tie = neighbour_hits(train[:2], torch.tensor([0, 1]), train[:1], torch.tensor([1]), 1, 0.07)
    assert votes_tie.tolist() == [0.5]  # whichever row stands first
    assert neighbour_hits(train, torch.tensor([0, 0, 1, 1]), train[:1], torch.tensor([0]), 2, 0.07).tolist() == [1.0]


def test_few_shots_are_drawn_by_class_and_more_hold_fewer():
    _, targets, _, _, num_classes = unit_rows()
    counts = torch.bincount(targets)
    one, four = (drawn_rows(targets, shots, 0, 3) for shots in (1, 4))
    assert torch.equal(torch.bincount(targets[four]), counts.clamp(max=4))
    assert set(one.tolist()) < set(four.tolist()) and len(one) == num_classes
    assert not torch.equal(drawn_rows(targets, 4, 0, 2), four) and torch.equal(drawn_rows(targets, 4, 0, 3), four)


def test_few_shot_figures_are_means_over_draws_of_what_scikit_learn_reaches():
    train, targets, test, test_targets, num_classes = unit_rows()
    settings = FewShot(shots=(1, 4, 1000), draws=2)
    figures = few_shot_figures(train, targets, {"val": (test, test_targets)}, num_classes, settings, CPU)["val"]
    assert set(figures) == {"1shot/top1", "1shot/spread", "4shot/top1", "4shot/spread"}  # no class has 1,000 rows
    reached = []
    for draw in range(2):
        rows = drawn_rows(targets, 4, 0, draw)
        centre = train[rows].double().mean(0)
        reference = LogisticRegression(C=settings.c, max_iter=1000, tol=1e-5).fit(train[rows].double() - centre, targets[rows])
        reached.append(reference.score(test.double() - centre, test_targets))
    assert figures["4shot/top1"] == pytest.approx(np.mean(reached), abs=0.002)
    assert figures["4shot/spread"] == pytest.approx(np.std(reached, ddof=1), abs=0.002)
    assert figures["1shot/top1"] < figures["4shot/top1"]


def test_a_collapsed_model_scores_chance_in_all_of_them():
    """All images alike: whoever votes or fits must not gain from the order of classes or rows."""
    _, targets, _, test_targets, num_classes = unit_rows()
    order = targets.argsort()  # as folders of classes lie
    same, targets, test = F.normalize(torch.ones(len(targets), 8), dim=1), targets[order], F.normalize(torch.ones(len(test_targets), 8), dim=1)
    train = same.clone()
    train[::3] += 1e-8  # as kernels round
    figures = figures_with((train, targets), (test, test_targets), few_shot={"shots": [2]}, knn={})
    constant = figures["probe/kind/constant"]
    assert figures["probe/kind/top1"] <= constant and figures["knn/kind/top1"] <= constant
    assert figures["few_shot/kind/2shot/top1"] == pytest.approx(1 / num_classes, abs=1e-9)
    clusters = embedding_cluster_figures(test, classes_of(test_targets), Diagnostics())
    assert clusters["kmeans/kind/k"] == 1 and abs(clusters["kmeans/kind/ari"]) < 1e-9 and abs(clusters["kmeans/kind/ami"]) < 1e-9


def test_clusters_of_embeddings_agree_with_classes_as_scikit_learns_do():
    train, targets, *_, num_classes = unit_rows()
    figures = embedding_cluster_figures(train, classes_of(targets), Diagnostics())
    theirs = [KMeans(num_classes, n_init=1, max_iter=100, init="random", random_state=seed).fit(train.numpy()).labels_ for seed in range(8)]
    assert (figures["kmeans/kind/k"], figures["kmeans/kind/n"]) == (num_classes, len(train))
    for figure, score in (("ari", adjusted_rand_score), ("ami", adjusted_mutual_info_score)):
        scores = [score(targets, labels) for labels in theirs]
        assert min(scores) - 0.01 <= figures[f"kmeans/kind/{figure}"] <= max(scores) + 0.01 and min(scores) > 0.05


def _clusters_of_rank(rank, world, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    train, targets, *_ = unit_rows()
    return embedding_cluster_figures(train[:200], classes_of(targets[:200]), Diagnostics(restarts=2))


def test_clusters_do_not_depend_on_the_number_of_ranks(tmp_path):
    train, targets, *_ = unit_rows()
    alone = embedding_cluster_figures(train[:200], classes_of(targets[:200]), Diagnostics(restarts=2))
    assert spawn(_clusters_of_rank, 2, str(tmp_path)) == [alone, alone]


@pytest.mark.parametrize("method", ["protoclip_sgd", "slip_sgd"])
def test_sgd_probe_is_torchs_sgd_on_a_linear_layer(method):
    """The last epoch of few rows against torch.nn.Linear and torch.optim.SGD, batch by batch."""
    train, targets, _, _, num_classes = unit_rows()
    train, targets = train[:96], targets[:96]
    from protoclip_scale.data.randomness import permutation, raw_keys
    from protoclip_scale.evaluation.sgd_probe import RECIPES

    recipe, layer = RECIPES[method], torch.nn.Linear(train.shape[1], num_classes)
    draw = torch.Generator().manual_seed(int(raw_keys(1, 0, "sgd probe")[0]) >> 1)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(num_classes, train.shape[1] + 1, generator=draw)[:, :-1] * 0.01)
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    for epoch in range(recipe.epochs):
        rows = torch.from_numpy(permutation(len(train), 0, "sgd probe", epoch))
        optimizer.zero_grad()
        F.cross_entropy(layer(train[rows]), targets[rows]).backward()
        optimizer.step()
        schedule.step()
    found = fit_sgd(train, targets, num_classes, method, "paper", lambda weights: pytest.fail("asks about the test rows"))
    torch.testing.assert_close(found, torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach(), atol=1e-4, rtol=0)


def test_the_reference_takes_the_best_epoch_on_the_test_rows_and_says_so_in_its_name():
    train, targets, test, test_targets, num_classes = unit_rows()
    asked = []

    def accuracy(weights):
        asked.append((predict(weights, test) == test_targets).double().mean().item())
        return asked[-1]

    weights = fit_sgd(train, targets, num_classes, "protoclip_sgd", "reference", accuracy)
    assert len(asked) == 100 and accuracy(weights) == max(asked)
    asked.clear()
    fit_sgd(train[:64], targets[:64], num_classes, "slip_sgd", "reference", accuracy)
    assert len(asked) == 9  # every tenth of 90
    figures = figures_with((train[:64], targets[:64]), (test, test_targets), probe={"method": "slip_sgd", "variant": "reference"})
    assert "probe_slip_sgd_reference/kind/top1" in figures and not any(key.startswith("probe/") for key in figures)


def test_the_table_shows_them_beside_what_they_are_to_beat():
    figures = {"val/zero_shot/kind/top1": 0.4, "val/zero_shot/kind/constant": 0.3, "val/probe/kind/top1": 0.6, "val/probe_slip_sgd_reference/kind/top1": 0.7}
    figures |= {"val/few_shot/kind/16shot/top1": 0.5, "val/few_shot/kind/16shot/spread": 0.02, "val/knn/kind/top1": 0.45, "val/knn/kind/k": 20}
    figures |= {"val/image_effective_rank": 12.3, "val/kmeans/kind/ami": 0.2, "val/kmeans/kind/k": 3, "val/rows": 9, "watch/recipe@1": 5}
    rows = {row.label: (row.model, row.reference) for row in evaluation_rows(figures, {})["val"]}
    assert rows["few-shot kind, 16 a class"] == ("50.0% ± 2.0%", "zero-shot 40.0%")
    assert rows["linear probe kind, top 1"] == ("60.0%", "30.0%") and rows["linear probe kind, top 1 [slip sgd reference]"] == ("70.0%", "30.0%")
    assert rows["20 nearest neighbours kind, top 1"] == ("45.0%", "30.0%") and rows["image effective rank"][0] == "12.3" and rows["k-means of images and kind, AMI"] == ("0.2", "0")
    assert list(evaluation_rows(figures, {})) == ["val"]
