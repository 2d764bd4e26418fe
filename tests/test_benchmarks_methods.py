"""benchmarks/methods.py: the matched recipes at small size differ in their losses alone, its table holds paired differences, and it trains, resumes and evaluates for real."""

import importlib
import json
import runpy

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip_scale.recipe import dump, load_recipe
from tests.support import CORPUS, ROOT

SOURCES = ["fxemoji"] * 40 + ["healthicons"] * 30 + ["temaki"] * 20 + ["noto"] * 300
TINY = """
data: {plan: {episode_size: 64, global_batch: 32}}
model: {embed_dim: 32, image: {size: 33}, text: {width: 32, heads: 2, layers: 1}}
schedule: {warmup_steps: 0}
"""


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return {name: importlib.import_module(f"methods_parts.{name}") for name in ("corpus", "figures", "recipes", "runs")}


@pytest.fixture
def corpus(tmp_path):
    """A file with the train corpus's columns: real rows of the demo corpus under other names."""
    rows = pq.read_table(CORPUS / "train-00000-of-00010.parquet", columns=["image", "caption", "coarse"]).slice(0, len(SOURCES))
    path = tmp_path / "train_corpus.parquet"
    pq.write_table(rows.append_column("source", pa.array(SOURCES)).append_column("split", pa.array(["train"] * len(SOURCES))), path)
    return path


def test_methods_differ_in_their_losses_alone(parts, tmp_path):
    recipes = {method: load_recipe(parts["recipes"].write_recipe(method, tmp_path, 12, {}, tmp_path / "recipes"), parts["recipes"].seeded(7)) for method in parts["recipes"].METHODS}
    base = recipes["clip"]
    for method, recipe in recipes.items():
        assert (recipe.data, recipe.model, recipe.optim, recipe.schedule, recipe.evaluation, recipe.run) == (base.data, base.model, base.optim, base.schedule, base.evaluation, base.run)
        assert recipe.data.plan.seed == recipe.run.seed == 7
        matched = load_recipe(ROOT / "recipes" / "matched" / f"{method}.yaml")
        assert {name: each.weight for name, each in recipe.objectives.items()} == {name: each.weight for name, each in matched.objectives.items()}
        assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.data.augmentation, recipe.data.caption) == (matched.optim.lr, matched.optim.weight_decay, matched.data.augmentation, matched.data.caption)
    assert len({str(recipe.objectives) for recipe in recipes.values()}) == len(recipes)


def finish(parts, bench, method: str, seed: int, figures: dict | None, seconds: float | None) -> None:
    """As if the run had been done."""
    run = bench.run_dir(method, seed)
    (bench.folder / "results").mkdir(parents=True, exist_ok=True)
    run.mkdir()
    (run / "recipe.yaml").write_text(dump(load_recipe(bench.recipe(method), parts["recipes"].seeded(seed))))
    (run / "status.json").write_text(json.dumps({"state": "done", "attempt": 1 if seconds else 2}))
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "train", "samples": 1000}) + "\n")
    (run / "log.txt").write_text("0.50 GB of the peak memory are above what imports take\n")
    (bench.folder / "results" / f"{method}-{seed}-cost.json").write_text(json.dumps({"phases": {"train": (seconds or 0) * 0.75, "extract": (seconds or 0) * 0.25, "evaluate": 9}}))
    if figures:
        (bench.folder / "results" / f"{method}-{seed}-evaluation.json").write_text(json.dumps({"results": [{"figures": figures}]}))


def figures_of(parts, value: float, tokens: str = "") -> dict[str, float]:
    recalls = {f"{name}/retrieval{tokens}/mean_recall": value / 100 for name in parts["corpus"].SETS}
    return {f"twemoji/zero_shot{tokens}/coarse/top1": 3 * value / 100, f"twemoji/probe{tokens}/coarse/top1": 5 * value / 100, **recalls}


def test_the_table_is_made_of_paired_differences(parts, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    bench = parts["runs"].Bench(out, parts["corpus"].prepare(corpus, CORPUS, out / "corpus"), 12, {})
    for seed, (clip, slip, declip) in enumerate([(4, 5, 6), (6, 7.1, 4), (8, 8.9, 9)]):
        finish(parts, bench, "clip", seed, figures_of(parts, clip), 10)
        finish(parts, bench, "slip", seed, figures_of(parts, slip), 20 if seed else None)
        finish(parts, bench, "declip", seed, figures_of(parts, declip), 40)
    finish(parts, bench, "filip", 0, figures_of(parts, 5, "_tokens"), 10)
    finish(parts, bench, "siglip", 0, None, 10)
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "methods.py"))
    assert benchmark["main"](["--corpus", str(corpus), "--out", str(out), "--table"]) == 0
    output = capsys.readouterr().out
    figures = json.loads(output.splitlines()[-1])
    assert list(figures) == ["clip", "siglip", "slip", "declip", "filip"]
    slip, declip = figures["slip"], figures["declip"]
    assert slip["mean_recall_minus_clip"] == {"mean": pytest.approx(1.0), "spread": pytest.approx(0.1), "seeds": 3, "p": pytest.approx(1 - (300 / 302) ** 0.5), "significant": True}  # t = 10 sqrt 3 at 2 degrees of freedom
    assert declip["mean_recall_minus_clip"]["mean"] == pytest.approx(1 / 3) and not declip["mean_recall_minus_clip"]["significant"]
    assert slip["zero_shot_minus_clip"]["mean"] == pytest.approx(3) and slip["probe"]["mean"] == pytest.approx(35)
    assert figures["filip"]["tokens"] and figures["filip"]["mean_recall_minus_clip"]["p"] is None and not slip["tokens"]
    assert figures["siglip"]["zero_shot"] is None and figures["siglip"]["peak_gb"] == 0.5
    assert (figures["clip"]["samples_per_second"], slip["samples_per_second"]) == (100, 50)  # seed 0 of slip was interrupted: its time is not known
    assert "+1.00 ±0.10*" in output and "filip (by tokens)" in output
    assert benchmark["main"](["--corpus", str(corpus), "--out", str(out), "--episodes", "9", "--table"]) == 1
    assert "is a finished run with other settings" in capsys.readouterr().err


def test_what_is_judged_is_not_trained_on(parts, corpus, tmp_path):
    folder = parts["corpus"].prepare(corpus, CORPUS, tmp_path / "corpus")
    pictures = {path.stem: {row["image"]["bytes"] for row in pq.read_table(path).to_pylist()} for path in folder.glob("*.parquet")}
    assert not any(pictures["train-00000"] & pictures[name] for name in parts["corpus"].SETS) and pictures["probe"] < pictures["train-00000"]
    assert not {"", "flag"} & set(pq.read_table(folder / "probe.parquet")["coarse"].to_pylist())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_runs_are_trained_once_resumed_and_evaluated(parts, corpus, tmp_path, capsys):
    """Real processes: some minutes."""
    small, out = tmp_path / "small.yaml", tmp_path / "out"
    small.write_text(TINY)
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "methods.py"))
    arguments = ["--corpus", str(corpus), "--out", str(out), "--methods", "clip,slip", "--seeds", "1", "--episodes", "2", "--small", str(small)]
    assert benchmark["main"](arguments) == 0, capsys.readouterr().err
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["slip"]["samples"] == first["clip"]["samples"] == [128] and first["slip"]["samples_per_second"] > 0 and first["slip"]["peak_gb"] > 0
    assert first["slip"]["mean_recall_minus_clip"]["seeds"] == 1 and 0 < first["clip"]["probe"]["mean"] < 100
    weights = {path: path.stat().st_mtime for path in out.glob("*-0/checkpoints/latest")}
    status = out / "slip-0" / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "running"}))  # as a kill leaves it
    assert benchmark["main"](arguments) == 0, capsys.readouterr().err
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["slip"]["samples_per_second"] is None and again["clip"] == first["clip"]
    assert weights[out / "clip-0" / "checkpoints" / "latest"] == (out / "clip-0" / "checkpoints" / "latest").stat().st_mtime
