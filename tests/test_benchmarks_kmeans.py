"""benchmarks/kmeans.py: every contestant does the same work, features come from any kind of file, and its figures are the contestants'."""

import importlib
import json
import runpy

import numpy as np
import pytest
import safetensors.numpy

from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.recipe.schema import Prototypes
from tests.support import RECIPES, ROOT


@pytest.fixture
def parts(monkeypatch):
    """The benchmark's modules by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return {name: importlib.import_module(f"kmeans_parts.{name}") for name in ("contestants", "features")}


def test_features_come_from_a_store_and_from_files(parts, tmp_path):
    store = RECIPES / "demo_corpus_teacher"
    rows = parts["features"].read(store, None)
    assert np.array_equal(rows, FeatureStore.open(store).rows("teacher", 0, np.arange(4949))) and rows.dtype == np.float32
    np.save(tmp_path / "rows.npy", rows.astype(np.float16))
    safetensors.numpy.save_file({"text": rows, "image": rows[:9]}, tmp_path / "rows.safetensors")
    assert np.array_equal(parts["features"].read(tmp_path / "rows.npy", None), rows)
    assert np.array_equal(parts["features"].read(tmp_path / "rows.safetensors", "text"), rows)
    with pytest.raises(UserError, match="holds image, text; choose one with --column"):
        parts["features"].read(tmp_path / "rows.safetensors", None)
    with pytest.raises(UserError, match="neither an .npy nor a .safetensors file"):
        parts["features"].read(tmp_path / "rows.txt", None)
    larger = parts["features"].enlarge(rows, 12_000)
    assert np.array_equal(larger[4949:], parts["features"].enlarge(rows, 12_000)[4949:]) and len(np.unique(larger[4949:], axis=0)) == 12_000 - 4949


def test_contestants_do_the_same_work(parts):
    contestants, chosen = parts["contestants"], Prototypes(clusters=100, iterations=8, restarts=1)
    rows = parts["features"].read(RECIPES / "demo_corpus_teacher", None)
    start = contestants.starts(rows, 0, 1, 1, chosen, 0)["start"]
    found = [work(rows, 0, 1, 1, chosen, 0, start) for work in (contestants.ours, contestants.faiss_kmeans, contestants.sklearn_kmeans)]
    assert all(line["seconds"] > 0 and line["cpu"] > 0 for line in found)
    for line in found[1:]:
        assert line["objective"] == pytest.approx(found[0]["objective"], rel=2e-3)
    own = [contestants.ours(rows, rank, 2, 1, chosen, 0, start)["labels"] for rank in range(2)]
    assert sum(map(len, own)) == len(found[0]["labels"]) == 4949, "two ranks' lanes are all rows"


@pytest.mark.slow
def test_the_benchmark_prints_a_table_and_one_object(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    main = runpy.run_path(str(ROOT / "benchmarks" / "kmeans.py"))["main"]
    main(["--features", str(RECIPES / "demo_corpus_teacher"), "--rows", "2000", "--clusters", "100", "--iterations", "4", "--rounds", "1"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(figures["law6"]) == 12 and all(found["equal_labels"] == 1 for found in figures["law6"].values())
    assert figures["objective_over_faiss"] == pytest.approx(1, rel=1e-3) and len(figures["of_faiss"]) == 6
    assert {"faiss.Kmeans, 20 x 3, 1 x 1", "scikit-learn, 1 x 2", "ours, torch, 2 x 1"} <= figures["times"].keys()
