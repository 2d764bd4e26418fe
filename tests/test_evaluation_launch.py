"""``launch/evaluate.py`` on run directories and exports."""

import importlib.util
import json
import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from protoclip_scale.engine import checkpoint
from protoclip_scale.engine.run_log import RunLog
from protoclip_scale.evaluation import provenance
from protoclip_scale.evaluation.run import evaluate
from protoclip_scale.evaluation.tasks import task_keys
from protoclip_scale.export.facts import Checkpoint, extras_of_run
from protoclip_scale.export.source import source_of_model
from protoclip_scale.export.writing import export as write_export
from protoclip_scale.models.build import build_model
from protoclip_scale.recipe import dump, load_recipe
from tests.support import CORPUS, RECIPES, ROOT, TINY, launch
from tests.test_evaluation_run import CPU, UNSEEN, tokenizer

SMALL = (*(value for value in TINY if not value.startswith("evaluation")), f"evaluation={{sets: [{json.dumps(UNSEEN)}], gallery: {{}}, probe_train: null}}")
KEY = "unseen/retrieval/mean_recall"


def script():
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "launch" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(RECIPES / "demo_clip.yaml", SMALL)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, recipe):
    """A run directory with two checkpoints of different weights."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(dump(recipe))
    (folder / "baseline.json").write_text(json.dumps({KEY: 0.4321}))
    for step in (20, 100):
        weights = build_model(recipe, frozenset({"image", "text", "logit_scale"}), seed=step).state_dict()
        tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
        about = checkpoint.describe(checkpoint.Cursor(0, "train", 0, step), samples=0, attempt=1)
        checkpoint.save(checkpoint.folder_of(folder, step), checkpoint.replicated_pieces(tensors), about, lambda: None)
    return folder


def figures_of_seed(recipe, seed):
    return evaluate(build_model(recipe, frozenset({"image", "text"}), seed=seed), recipe, tokenizer(), CPU)


def test_all_checkpoints_of_a_run_are_tabled_and_written(run_dir, recipe, tmp_path, capsys):
    out = tmp_path / "new" / "figures.json"
    assert script().main(["--model", str(run_dir), "--checkpoint", "all", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [result["step"] for result in found["results"]] == [20, 100]
    for result in found["results"]:
        assert result["figures"] == pytest.approx(figures_of_seed(recipe, result["step"]), abs=1e-6)
    printed = capsys.readouterr().out
    assert "demo_clip, step 20" in printed and "demo_clip, step 100" in printed
    assert "43.2%" in printed  # the untrained model's, from baseline.json


def test_a_result_that_cannot_be_written_is_told_before_anything_is_evaluated(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("protoclip_scale.evaluation.run.evaluate_suite", None)
    (tmp_path / "file").write_text("x")
    for option, place in (("--out", tmp_path), ("--csv", tmp_path / "file" / "figures.csv")):
        assert script().main(["--model", str(run_dir), option, str(place)]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: {option} {place}: cannot be written") and said.count("\n") == 1


def test_the_card_tells_where_its_figures_come_from(run_dir, recipe, tmp_path):
    """First the run's own evaluation, then a newer one of launch/evaluate.py that lies in the run directory."""
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    point = Checkpoint(100, 100, "live")
    card = extras_of_run(folder, recipe, point).card("open_clip", folder)
    assert "None was made during the run" in card and "Where the figures come from" not in card
    figures = figures_of_seed(recipe, 100)
    RunLog(folder, 1, is_main=True).metrics("eval", 100, 100, **figures)
    provenance.publish_of_recipe(folder, recipe, figures)
    about = provenance.read(folder)["recipe"]["unseen"]
    card = extras_of_run(folder, recipe, point).card("open_clip", folder)
    row = next(line for line in card.splitlines() if line.startswith("| unseen | "))
    assert [cell.strip() for cell in row.split("|")[2:6]] == [f"{about['n']:,}", f"ensemble, {about['templates']} templates", about["template_hash"][:12], about["data"][:12]]
    assert about["n"] == figures["unseen/rows"] and len(about["data"]) == 32
    assert script().main(["--model", str(folder), "--prompts", "single", "--out", str(folder / "evaluation.json")]) == 0
    card = extras_of_run(folder, recipe, point).card("open_clip", folder)
    assert "single, 1 templates" in card and "the whole set has" not in card
    of_set = json.loads((folder / "evaluation.json").read_text())
    of_set["results"][0]["sets"]["unseen"]["rows_expected"] = about["n"] + 1000
    (folder / "evaluation.json").write_text(json.dumps(of_set))
    assert f"(the whole set has {about['n'] + 1000:,})" in extras_of_run(folder, recipe, point).card("open_clip", folder)


def test_an_export_is_evaluated_on_a_suite_of_its_own(recipe, tmp_path):
    model = build_model(recipe, frozenset({"image", "text", "logit_scale"}), seed=5)
    export = write_export(source_of_model(model, recipe.model), "open_clip", tmp_path / "export")
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"sets": [{**UNSEEN, "files": str(CORPUS / UNSEEN["files"])}]}))
    out = tmp_path / "figures.json"
    assert script().main(["--model", str(export), "--suite", str(suite), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["results"][0]["figures"] == pytest.approx(figures_of_seed(recipe, 5), abs=1e-4)
    assert not torch.is_inference_mode_enabled()


@pytest.fixture
def prepared(tmp_path):
    """CIFAR-10 as tools/prepare_evaluation.py writes it, a hundred times too small: real pictures, two of each class."""
    rows = pq.read_table(CORPUS / "val-00000-of-00001.parquet").slice(0, 20).to_pylist()
    names = task_keys("cifar10")["classes"]
    (tmp_path / "data/cifar10").mkdir(parents=True)
    table = {"image": [row["image"]["bytes"] for row in rows], "caption": [[]] * 20, "class": [names[number % 10] for number in range(20)]}
    pq.write_table(pa.table(table), tmp_path / "data/cifar10/shard-00000.parquet")
    return tmp_path / "data"


def test_a_suite_of_the_package_on_all_checkpoints(run_dir, prepared, tmp_path, capsys):
    out, csv = tmp_path / "result.json", tmp_path / "result.csv"
    command = ["--model", run_dir, "--checkpoint", "all", "--suite", "protoclip10", "--sets", "cifar10", "--data", prepared, "--classifiers", tmp_path / "texts", "--allow-subset"]
    assert script().main([*map(str, command), "--out", str(out), "--csv", str(csv)]) == 0
    found = json.loads(out.read_text())["results"]
    assert len(list((tmp_path / "texts").rglob("cifar10.class.safetensors"))) == len(found) == 2  # their text towers differ
    for result in found:
        facts, figures = result["sets"]["cifar10"], result["figures"]
        assert (facts["n"], facts["rows_expected"], facts["subset_allowed"], facts["templates"], facts["prompts"]) == (20, 10_000, True, 18, "ensemble")
        assert facts["classes"] == {"class": 10} and facts["value"] == figures["cifar10/zero_shot/class/top1"] and facts["preprocessing"]["size"] == 32
        assert "protoclip10/average" not in figures and "cifar10/retrieval/mean_recall" not in figures
    frame = pd.read_csv(csv)
    assert list(frame.columns) == ["model", "step", "weights", "key", "value"] and sorted(frame.step.unique()) == [20, 100]
    assert script().main([*map(str, command), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["results"] == found  # with the classifiers that are there
    assert script().main([*map(str, command), "--prompts", "names"]) == 1
    assert "of other templates than this evaluation" in capsys.readouterr().err


def test_a_suite_has_an_average(run_dir, tmp_path, capsys):
    suite = tmp_path / "mine.yaml"
    sets = [{**UNSEEN, "files": str(CORPUS / UNSEEN["files"])}, {"name": "pairs", "files": str(CORPUS / "val-*.parquet")}]
    suite.write_text(yaml.safe_dump({"name": "mine", "sets": sets}))
    out = tmp_path / "result.json"
    assert script().main(["--model", str(run_dir), "--suite", str(suite), "--out", str(out)]) == 0
    figures = json.loads(out.read_text())["results"][0]["figures"]
    assert figures["mine/average"] == pytest.approx((figures["unseen/zero_shot/coarse/top1"] + figures["pairs/retrieval/mean_recall"]) / 2)
    assert f"mine/average (demo_clip, step 100): {figures['mine/average']:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{tmp}/nowhere"], "does not exist"),
        (["--model", "{run}", "--suite", "protoclip10", "--data", "{tmp}"], "no files match"),
        (["--model", "{run}", "--suite", "protoclip10", "--sets", "cifar10", "--data", "{tmp}/data"], "20 rows where there must be 10,000"),
        (["--model", "{run}", "--suite", "protoclip10", "--sets", "cifar"], "did you mean cifar10"),
        (["--model", "{run}", "--suite", "protoclip11"], "protoclip10"),
        (["--model", "{run}", "--out", "{tmp}/typo.yaml/out.json"], "--out"),
        (["--model", "{run}", "--csv", "{tmp}/typo.yaml/out.csv"], "--csv"),
        (["--model", "{tmp}"], "neither a run directory"),
        (["--model", "{run}", "--checkpoint", "60"], "steps there are: 20, 100"),
        (["--model", "{run}", "--weights", "ema"], "holds no averaged weights"),
        (["--model", "{run}", "--suite", "{tmp}/none.yaml"], "cannot be read"),
        (["--model", "{run}", "--suite", "{tmp}/typo.yaml"], "did you mean exclude"),
        (["--model", "{run}", "--suite", "{tmp}/empty.yaml"], "names no sets"),
        (["--model", "{run}", "--expect-ranks", "4"], "but 1 ranks run"),
        (["--model", "{run}", "--suite", "{tmp}/lost.yaml"], "no files match"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(arguments, message, run_dir, prepared, tmp_path, capsys):
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump({"sets": [{**UNSEEN, "exclud": {}}]}))
    (tmp_path / "empty.yaml").write_text("batch: 3\n")
    (tmp_path / "lost.yaml").write_text(yaml.safe_dump({"sets": [{**UNSEEN, "files": "lost-*.parquet"}]}))
    filled = [argument.replace("{tmp}", str(tmp_path)).replace("{run}", str(run_dir)) for argument in arguments]
    assert script().main(filled) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.slow
def test_two_ranks_through_accelerate(run_dir, recipe, tmp_path):
    out = tmp_path / "figures.json"
    done = launch("--model", run_dir, "--checkpoint", "100", "--expect-ranks", "2", "--out", out, ranks=2, script="launch/evaluate.py")
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["results"][0]["figures"] == pytest.approx(figures_of_seed(recipe, 100), abs=1e-6)
    assert done.stdout.count("mean recall") == 1
