"""tools/inspect_store.py: what it says of whole, unfinished and damaged stores and of clusters."""

import re

import numpy as np
import pytest

from protoclip_scale.data.index import build_index
from protoclip_scale.prototypes.inspection import inspect
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.prototypes.teacher import open_teacher
from protoclip_scale.prototypes.teacher_clusters import cluster_teacher
from protoclip_scale.recipe import schema
from protoclip_scale.recipe.load import load_recipe
from tests.support import RECIPES
from tools import inspect_store as tool

SHIPPED = RECIPES / "demo_corpus_teacher"


@pytest.fixture
def told(capsys, monkeypatch):
    """(exit code, output, errors) of the tool."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments) -> tuple[int, str, str]:
        code = tool.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def recorded(folder, parts=2, rows=50) -> FeatureStore:
    return FeatureStore.create(folder, {"image": 4, "text": 4}, parts, rows, "float16", {"kind": "recorded features", "episode": 7, "model_step": 1200}, row_ids=True)


def fill(store: FeatureStore, part: int, rows: np.ndarray) -> None:
    with store.writer(part) as writer:
        values = np.eye(4)[rows % 3].astype(np.float32)  # three different rows, of length 1
        writer.write(rows, {"image": values, "text": 2 * values}, 100 * part + rows)


def test_the_shipped_teacher(told):
    code, out, err = told(SHIPPED)
    assert code == 0 and not err
    for expected in ("teacher features: sealed", "teacher 64, float16", "4,949 in 1 parts", "ef4087df83a9d182", "minilm", "explained variance", "sample of 4,949 rows"):
        assert expected in out, expected
    features = np.load(SHIPPED / "teacher.00000.npy").astype(np.float32)
    found = inspect(SHIPPED, 4949).samples[0]
    norms = np.linalg.norm(features, axis=1)
    assert np.allclose(found.norms, (norms.min(), norms.mean(), norms.max())) and np.allclose(found.values, (features.min(), features.mean(), features.max()), atol=1e-6)
    assert found.distinct == len(np.unique(features, axis=0)) < 4949 and found.zeros == found.non_finite == 0
    assert "sample of 100 rows" in told(SHIPPED, "--rows", 100)[1]


def test_an_unfinished_store_says_what_is_missing(told, tmp_path):
    store = recorded(tmp_path, parts=3)
    fill(store, 0, np.arange(50))
    fill(store, 1, np.arange(10, 30))
    code, out, err = told(tmp_path)
    assert code == 0 and not err
    assert "recorded features: not sealed: 80 of 150 rows are missing" in out and "model step" in out and "1200" in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "0 50 50 0 not sealed" in lines and "1 50 20 30 not sealed" in lines and "2 50 - 50 not begun" in lines
    assert any(re.fullmatch(r"image 1 \.\. 1 \.\. 1 0 \.\. 0\.25 \.\. 1 3 0 0", line) for line in lines) and any(line.startswith("text 2 .. 2 .. 2") for line in lines)
    assert "70 different in a sample of 70" in out
    fill(store, 1, np.arange(50))
    fill(store, 2, np.arange(49))
    store.seal(allow_missing=True)
    assert "recorded features: sealed; 1 rows were never written" in told(tmp_path)[1]
    assert "not sealed: 100 of 100 rows are missing" in told(recorded(tmp_path / "empty").folder)[1]


def test_a_damaged_store_is_shown_and_fails(told, tmp_path):
    store = recorded(tmp_path)
    for part in range(2):
        fill(store, part, np.arange(50))
    store.seal()
    features = np.load(tmp_path / "text.00001.npy", mmap_mode="r+")
    features[31] = np.nan
    features.flush()
    code, out, err = told(tmp_path)
    assert code == 1 and err.count("\n") == 1 and "1 of 100 sampled rows of column text are not finite" in err and "recorded features: sealed" in out
    features[31] = 0
    features.flush()
    code, out, err = told(tmp_path)
    assert code == 0 and [each.zeros for each in inspect(tmp_path).samples] == [0, 1]
    (tmp_path / "image.00000.npy").write_bytes((tmp_path / "image.00000.npy").read_bytes()[:-4])
    code, out, err = told(tmp_path)
    assert code == 1 and "image.00000.npy cannot be read, it was cut short" in err and "sample of 50 rows" in out, "the other part is still looked at"
    (tmp_path / "written.00001.npy").unlink()
    assert "written.00001.npy is missing" in told(tmp_path)[1]


def test_what_is_no_store_is_one_line(told, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    wrong = [(tmp_path / "none",), (RECIPES,), (tmp_path,), (SHIPPED, "--rows", 0)]
    messages = ["check the path", "it holds demo_corpus_image_teacher, demo_corpus_teacher, name one of them", "schema version None", "--rows 0"]
    for arguments, message in zip(wrong, messages, strict=True):
        code, out, err = told(*arguments)
        assert code == 1 and not out and err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def test_clusters_of_the_shipped_teacher(told, tmp_path):
    index = build_index(load_recipe(RECIPES / "demo.yaml").data)
    settings = schema.Prototypes(clusters=20, iterations=2, restarts=1)
    clusters = cluster_teacher(tmp_path / "clusters", open_teacher(SHIPPED, index), index, settings, (0, 2), range(4), 4)
    code, out, err = told(tmp_path / "clusters")
    assert code == 0 and not err and "teacher clusters: whole" in out and "4,949" in out and f"{clusters.counts.max():,} most; 0 have none" in out
    (tmp_path / "clusters" / "labels.npy").write_bytes(b"")
    code, out, err = told(tmp_path / "clusters")
    assert code == 1 and "teacher clusters: damaged" in out and "labels.npy is missing or damaged" in err
