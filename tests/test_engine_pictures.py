"""Pictures of a clustering of real rows: what is drawn, from which rows, by whom; and the parts they are made of."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from protoclip_scale.data.index import index_of, open_readers
from protoclip_scale.data.plan import Plan
from protoclip_scale.data.spool import Spool
from protoclip_scale.engine import pictures
from protoclip_scale.engine.pictures import choose, draw_prototypes, newest_pictures
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.recipe import schema
from protoclip_scale.report.caption_words import telling_words
from protoclip_scale.report.clustering_line import clustering_line
from protoclip_scale.report.drawing import COLORS
from protoclip_scale.report.prototype_map import MappedSet, draw_map, principal_plane
from protoclip_scale.report.size_histogram import bins_of, draw_sizes
from tests.support import CORPUS

LANES, CLUSTERS, DIM = range(2, 4), 9, 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(plan, spool with two of four lanes of episode 1)."""
    data = schema.Data(root=str(CORPUS), sources=[{"files": "train-*.parquet"}], plan={"episode_size": 256, "lanes": 4, "global_batch": 64})
    readers = open_readers(data)
    plan = Plan(index_of(readers), data.plan)
    spool = Spool(tmp_path_factory.mktemp("spool"), "run")
    spool.fill(plan.episode(1), 1, LANES, readers)
    return plan, spool


def started(corpus, folder: Path, shown: int = 6):
    """What ``draw_prototypes`` asks of a run."""
    plan, spool = corpus
    recipe = SimpleNamespace(name="trial", prototypes=SimpleNamespace(pictures=shown, clusters=CLUSTERS), data=SimpleNamespace(plan=SimpleNamespace(seed=0)))
    return SimpleNamespace(recipe=recipe, plan=plan, spool=spool, folder=folder)


def clustered(corpus, episode: int = 1, keep=slice(None)):
    """(rows, labels, prototypes) of the two lanes; ``keep``: which slots of each lane have features."""
    plan, _ = corpus
    slots = np.arange(plan.lane_rows)[keep]
    row_ids = [plan.episode(1).row_ids[lane][slots] for lane in LANES]
    rng = np.random.default_rng(0)
    features = {name: [rng.normal(size=(len(slots), DIM)).astype(np.float32) for _ in LANES] for name in ("image", "text")}
    rows = SimpleNamespace(episode=episode, features=features, row_ids=row_ids, positions=[lane * plan.lane_rows + slots for lane in LANES], folder=None)
    labels = {name: [rng.integers(-1, CLUSTERS - 1, size=len(slots)).astype(np.int32) for _ in LANES] for name in ("image", "text", "teacher")}
    names = ("image_centroids", "text_centroids", "image_from_text", "text_from_image", "image_from_teacher", "text_from_teacher")
    return rows, labels, EpisodePrototypes(2, {name: torch.from_numpy(rng.normal(size=(CLUSTERS, DIM)).astype(np.float32)) for name in names}, {})


def test_each_labeling_is_drawn_from_the_rows_that_its_prototypes_have(corpus, tmp_path, monkeypatch):
    plan, spool = corpus
    rows, labels, prototypes = clustered(corpus, keep=slice(3, 60, 2))
    grids = {}
    monkeypatch.setattr(pictures, "draw_grid", lambda path, title, sections: grids.update({Path(path).stem: (title, sections)}))
    draw_prototypes(started(corpus, tmp_path), rows, labels, prototypes)
    assert sorted(grids) == [f"prototypes-0003-{name}" for name in ("image", "teacher", "text")] and "episode 3" in grids["prototypes-0003-image"][0]
    assert [path.name for path in newest_pictures(tmp_path)] == ["prototypes-0003-map.png", "prototypes-0003-sizes.png"]
    for name, space, key in (("image", "image", "image_centroids"), ("text", "text", "text_centroids"), ("teacher", "image", "image_from_teacher")):
        own, features = np.concatenate(labels[name]), np.concatenate(rows.features[space])
        cards = [card for cards in grids[f"prototypes-0003-{name}"][1].values() for card in cards]
        assert len(cards) == 6 == len({card[0] for card in cards}), "none twice"
        for title, size, images, captions in cards:
            cluster = int(title.removeprefix("prototype "))
            members = np.flatnonzero(own == cluster)
            assert size == len(members)
            distances = np.square(features[members] - prototypes.centroids[key][cluster].numpy()).sum(axis=1)
            nearest = members[np.argsort(distances)][:6]
            assert len(images) == len(nearest)
            for place, caption in zip(nearest, captions, strict=True):
                lane = LANES[place // len(rows.positions[0])]
                stored = spool.open(1, lane)
                assert caption == stored.row(int(np.flatnonzero(stored.row_ids == np.concatenate(rows.row_ids)[place])[0]))[1][0]


def test_pictures_of_a_teacher_alone_and_of_rows_that_are_gone(corpus, tmp_path):
    rows, labels, prototypes = clustered(corpus)
    of_teacher = EpisodePrototypes(2, {name: rows for name, rows in prototypes.centroids.items() if name.endswith("from_teacher")}, {})
    draw_prototypes(started(corpus, tmp_path / "teacher"), rows, {"teacher": labels["teacher"]}, of_teacher)
    assert [path.name.split("-")[2] for path in newest_pictures(tmp_path / "teacher")] == ["map.png", "sizes.png", "teacher.png"]
    assert all(np.ptp(np.asarray(Image.open(path).convert("L"))) > 200 for path in newest_pictures(tmp_path / "teacher"))
    rows.episode = 0  # of which the spool has nothing
    draw_prototypes(started(corpus, tmp_path / "gone"), rows, labels, prototypes)
    assert [path.name.split("-")[2] for path in newest_pictures(tmp_path / "gone")] == ["map.png", "sizes.png"]
    draw_prototypes(started(corpus, tmp_path / "none", shown=0), rows, labels, prototypes)
    assert newest_pictures(tmp_path / "none") == []


def test_clusters_are_chosen_by_size_by_spread_and_at_random_and_none_twice():
    sizes, own = np.array([50, 3, 40, 30, 20, 10, 0, 9]), np.array([25, 3, 20, 0, 10, 5, 0, 4])
    spread = np.array([0.5, 0.01, 0.1, 0, 0.3, 0.2, 0, 0.4])
    chosen = choose(sizes, own, spread, 6, np.array([6, 0, 1, 7, 3, 5, 4, 2]))
    assert list(chosen.values()) == [[0, 2], [5, 4], [1, 7]], "clusters 3 and 6 have no row here, cluster 1 is too small to be called tight"
    assert list(choose(sizes, own, spread, 1, np.arange(8)).values()) == [[0]]
    everything = choose(sizes, own, spread, 100, np.arange(8))
    assert sorted(cluster for clusters in everything.values() for cluster in clusters) == [0, 1, 2, 4, 5, 7]


def test_the_plane_is_that_of_the_principal_components():
    rows = np.random.default_rng(0).normal(size=(200, 12)) * np.linspace(4, 0.1, 12)
    points, shares = principal_plane(rows)
    values = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose(shares, values[:2] ** 2 / (values**2).sum(), rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(points, axis=0), values[:2], rtol=1e-9)
    turned = principal_plane(rows @ np.diag([-1.0] * 12))[0]
    np.testing.assert_allclose(np.abs(turned), np.abs(points), atol=1e-9)
    assert np.isfinite(principal_plane(np.ones((5, 3)))[0]).all()


def pixels_of(path: Path, color: str) -> np.ndarray:
    """(rows, columns) of pixels of about a colour."""
    wanted = np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)])
    return np.argwhere(np.abs(np.asarray(Image.open(path).convert("RGB")).astype(int) - wanted).sum(axis=2) < 20)


def test_the_map_shows_every_cluster_that_has_rows_in_its_colour(tmp_path):
    corners = np.array([[-1.0, -0.5], [1, 0.5], [1, -0.5], [0, 0]])
    sizes = np.array([9, 9, 9, 0])
    draw_map(tmp_path / "map.png", "title", {"space of images": [MappedSet("image", False, corners, sizes, {0: "word"}), MappedSet("text", True, -corners, sizes, {})]})
    blue, orange = (pixels_of(tmp_path / "map.png", COLORS[name]) for name in ("image", "text"))
    assert len(blue) > 100 and len(orange) > 100
    draw_map(tmp_path / "less.png", "title", {"space of images": [MappedSet("image", False, corners, np.array([9, 9, 0, 0]), {}), MappedSet("text", True, -corners, sizes, {})]})
    assert len(pixels_of(tmp_path / "less.png", COLORS["image"])) < len(blue)
    draw_map(tmp_path / "one.png", "title", {"space": [MappedSet("teacher", True, corners[:1], sizes[:1], {0: "x" * 99})]})
    assert len(pixels_of(tmp_path / "one.png", COLORS["teacher"])) > 50


def test_histograms_hold_every_cluster_and_show_a_single_huge_one(tmp_path):
    sizes = {"image": np.array([1] * 5000 + [9000]), "text": np.array([0] * 10)}
    edges = bins_of(sizes)
    assert len(edges) <= 50 and edges[:33].tolist() == list(range(33)) and all(np.histogram(values, edges)[0].sum() == len(values) for values in sizes.values())
    assert bins_of({"image": np.array([3, 0])}).tolist() == [0, 1, 2, 3, 4]
    draw_sizes(tmp_path / "sizes.png", "title", sizes)
    bars = pixels_of(tmp_path / "sizes.png", COLORS["image"])
    columns = np.unique(bars[bars[:, 0] > 150, 1])
    assert np.diff(columns).max() > 300, "one bar at each end"
    assert len(pixels_of(tmp_path / "sizes.png", COLORS["text"])) > 100


def test_a_word_tells_a_group_from_the_others():
    groups = {3: ["the red cat", "a cat, the", "the cat42 Cat"], 5: ["the dog", "the big dog"], 7: ["the the", "7 !"], 9: ["", "12"]}
    assert telling_words(groups) == {3: "cat", 5: "dog", 7: "the"}


def test_the_line_of_a_clustering_names_what_was_measured():
    figures = {"kmeans/image/objective": 12.0, "kmeans/image/imbalance": 1.284, "kmeans/image/empty": 0, "kmeans/teacher/empty": 3, "quality/image/silhouette": 0.2847}
    figures |= {"quality/image_from_text/silhouette": -0.4, "target_entropy/image": 0.5, "quality/modality_gap": 1.1245}
    assert clustering_line(figures) == (
        "clusters: image silhouette 0.285, imbalance 1.28, target entropy/ln K 0.5 | teacher empty 3 | image from text silhouette -0.4 | modality gap 1.12"
    )
    assert clustering_line({"loss": 3.0}) == ""
