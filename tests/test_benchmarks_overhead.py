"""benchmarks/overhead.py: held-out vendors stay out of training, every policy is a valid recipe, and its table holds what runs have measured."""

import importlib
import json
import runpy

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip_scale.recipe import load_recipe
from tests.support import CORPUS, ROOT

SOURCES = ["fxemoji"] * 40 + ["healthicons"] * 30 + ["temaki"] * 20 + ["noto"] * 200


@pytest.fixture
def parts(monkeypatch):
    """The benchmark's modules by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return {name: importlib.import_module(f"overhead_parts.{name}") for name in ("corpus", "figures", "policies", "runs")}


@pytest.fixture
def corpus(tmp_path):
    """A file with the train corpus's columns: real rows of the demo corpus under other names, every tenth of the val split."""
    rows = pq.read_table(CORPUS / "train-00000-of-00010.parquet", columns=["image", "caption", "coarse"]).slice(0, len(SOURCES))
    splits = ["val" if number % 10 == 0 else "train" for number in range(len(SOURCES))]
    path = tmp_path / "train_corpus.parquet"
    pq.write_table(rows.append_column("source", pa.array(SOURCES)).append_column("split", pa.array(splits)), path)
    return path


def test_held_out_vendors_are_not_trained_on(parts, corpus, tmp_path):
    prepared = parts["corpus"].prepare(corpus, CORPUS, tmp_path / "corpus")
    pictures = {path.stem: [row["image"]["bytes"] for row in pq.read_table(path).to_pylist()] for path in prepared.folder.glob("*.parquet")}
    train = set().union(*(images for name, images in pictures.items() if name.startswith("train-")))
    assert {name: len(images) for name, images in pictures.items() if not name.startswith("train-")} == {"twemoji": 1914, "fxemoji": 40, "healthicons": 30, "temaki": 20}
    assert len(train) == SOURCES.count("noto") * 9 // 10
    assert not any(train & set(images) for name, images in pictures.items() if not name.startswith("train-"))


def test_every_policy_is_a_recipe_that_differs_in_nothing_else(parts, corpus, tmp_path):
    bench = parts["runs"].Bench(tmp_path, parts["corpus"].prepare(corpus, CORPUS, tmp_path / "corpus"), samples=50_000, threads=1)
    for teacher in parts["policies"].TEACHERS:  # as if they had been made
        (tmp_path / f"teacher-{teacher}").mkdir()
        (tmp_path / f"teacher-{teacher}" / "manifest.json").touch()
    recipes = {name: load_recipe(bench.recipe(), bench.overrides(policy, seed=7)) for name, policy in parts["policies"].POLICIES.items()}
    base = recipes["clip"]
    for name, recipe in recipes.items():
        assert (recipe.data, recipe.optim, recipe.evaluation, recipe.run, recipe.model.image, recipe.model.text) == (base.data, base.optim, base.evaluation, base.run, base.model.image, base.model.text)
        assert recipe.data.plan.seed == recipe.run.seed == 7
        assert (recipe.schedule == base.schedule) == (name != "clip_longer")
    assert len({recipe.model_dump_json() for recipe in recipes.values()}) == len(recipes)


def test_the_table_is_made_of_paired_differences(parts, corpus, tmp_path, monkeypatch, capsys):
    bench = parts["runs"].Bench(tmp_path / "work", parts["corpus"].prepare(corpus, CORPUS, tmp_path / "work" / "corpus"), samples=1000, threads=1)
    measured = {("clip", 0): (10, 100), ("clip", 1): (20, 100), ("protoclip", 0): (13, 150), ("protoclip", 1): (21, 140), ("teacher_once", 1): (24, 110)}
    (tmp_path / "work" / "teacher-text").mkdir()  # as if it had been made
    (tmp_path / "work" / "teacher-text" / "manifest.json").touch()
    settings = {(policy, seed): bench.overrides(parts["policies"].POLICIES[policy], seed) for policy, seed in measured}
    for (policy, seed), (recall, seconds) in measured.items():
        place = bench.place(policy, seed)
        place.mkdir(parents=True)
        recalls = dict(zip(bench.corpus.sets, (recall - 3, recall - 1, recall + 1, recall + 3), strict=True))
        result = parts["runs"].Result(policy, seed, 1000, {"train": 0.75 * seconds, "extract": 0.25 * seconds}, recalls, 1.0, 100.0, settings[policy, seed], None)
        (place / "result.json").write_text(json.dumps(vars(result)))
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "overhead.py"))
    assert benchmark["main"](["--corpus", str(corpus), "--folder", str(tmp_path / "work"), "--samples", "1000", "--table"]) == 0
    output = capsys.readouterr().out
    figures = json.loads(output.splitlines()[-1])
    assert list(figures) == ["clip", "protoclip", "teacher_once"]
    assert figures["protoclip"]["minus_clip"] == {"mean": 2.0, "spread": pytest.approx(2**0.5), "seeds": 2}
    assert figures["teacher_once"]["minus_clip"]["mean"] == 4 and figures["teacher_once"]["minus_protoclip"]["mean"] == 3
    assert figures["protoclip"]["cost_over_clip"] == pytest.approx(1.45) and figures["teacher_once"]["cost_over_clip"] == pytest.approx(1.1)
    assert figures["protoclip"]["share_of_clip"] == pytest.approx({"train": 0.75 * 1.45, "extract": 0.25 * 1.45})
    assert "+2.00 ±1.41" in output and "1.45" in output
    assert benchmark["main"](["--corpus", str(corpus), "--folder", str(tmp_path / "work"), "--samples", "1000", "--set", "optim.lr=1e-4", "--table"]) == 1
    assert "is of a run with other settings (optim.lr=1e-4)" in capsys.readouterr().err
    assert benchmark["main"](["--corpus", str(corpus), "--folder", str(tmp_path / "work"), "--policies", "clop"]) == 1
    assert "clop" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_measured_once_and_kept(parts, corpus, tmp_path, monkeypatch):
    """Real processes: half a minute each."""
    extra = ("data.plan={episode_size: 64, lanes: 4, global_batch: 32}", "prototypes.clusters=8", "prototypes.iterations=2")
    bench = parts["runs"].Bench(tmp_path, parts["corpus"].prepare(corpus, CORPUS, tmp_path / "corpus"), samples=2 * parts["policies"].EPISODE_ROWS, threads=1, extra=extra)
    result = bench.run("protoclip", 0)
    assert {"fetch", "extract", "cluster", "train"} <= set(result.phases) and "evaluate" not in result.phases
    assert result.samples == 128 and 0 < result.ret4 < 100 and list(result.recalls) == list(bench.corpus.sets)
    monkeypatch.setattr(parts["runs"].subprocess, "run", lambda *_, **__: pytest.fail("run again"))
    assert bench.run("protoclip", 0) == result
