"""Every recipes/demo*.yaml, end to end with small towers: it is checked, trained, evaluated and exported, and open_clip loads what comes out."""

import json

import pytest
import torch
from safetensors.torch import load_file

import protoclip_scale
from protoclip_scale import classify
from protoclip_scale.engine.checkpoint import open_weights
from protoclip_scale.engine.saved_model import load_model, recipe_of, source_of_run
from protoclip_scale.evaluation import figures_csv
from protoclip_scale.export.writing import verify
from protoclip_scale.models.build import build_model
from protoclip_scale.recipe import load_recipe
from protoclip_scale.report.evaluation_table import evaluation_rows
from tests.exports import computed_elsewhere, differences, pairs
from tests.support import RECIPES, TINY, TINY_PROTOTYPES, errors, final_tensors, launch, metrics, output, pretrain

pytestmark = pytest.mark.timeout(900)  # each trains, and waits for other libraries
NAMES = sorted(path.stem for path in RECIPES.glob("demo*.yaml"))
HELD_OUT = {"name": "val", "files": "val-*.parquet", "classify": ["coarse"], "exclude": {"coarse": ["flag"]}, "subset": 40}
SMALL = {
    "declip": ("objectives.simsiam.dim=32", "objectives.simsiam.predictor_dim=16", "objectives.neighbour.size=128", "model.text.mask_token=true"),
    "filip": ("objectives.filip.dim=16", "model.image.size=64"),  # four places of the image tower's map
    "slip": ("objectives.simclr.hidden_dim=32", "objectives.simclr.dim=16"),
}
SMALL["defilip"] = (*SMALL["declip"], *SMALL["filip"])
TOKENS = {"demo_filip": {"zero_shot_tokens", "retrieval_tokens"}, "demo_defilip": {"zero_shot", "retrieval", "zero_shot_tokens", "retrieval_tokens"}}


def settings_of(name):
    """Small towers and heads, one held-out set, an export."""
    base = TINY_PROTOTYPES if load_recipe(RECIPES / f"{name}.yaml").prototypes else TINY
    return (*base, *SMALL.get(name.removeprefix("demo_"), ()), f"evaluation={json.dumps({'sets': [HELD_OUT], 'batch': 16})}", "run.export=open_clip")


def trained(folder, name, ranks=1):
    assert pretrain(folder / name, f"{name}.yaml", settings_of(name), ranks=ranks) == [0] * ranks, output(folder / name)
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_is_evaluated_and_exported(name, tmp_path):
    run = trained(tmp_path, name)
    assert not errors(run)
    losses = [line["loss"] for line in metrics(run, "train")]
    assert len(losses) == 12 and all(map(torch.isfinite, torch.tensor(losses)))
    figures = metrics(run, "eval")[-1]
    assert {key.split("/")[1] for key in figures if key.startswith("val/") and key.count("/") > 1} - {"clusters"} == TOKENS.get(name, {"zero_shot", "retrieval"})
    baseline = json.loads((run / "baseline.json").read_text())
    assert {key for key in baseline if "zero_shot" in key or "retrieval" in key} == {key for key in figures if "zero_shot" in key or "retrieval" in key}
    assert evaluation_rows(figures, baseline)["val"]

    export = run / "export" / "open_clip"
    recipe, live, _ = load_model(run)
    found = differences(live, recipe.model, computed_elsewhere([("open_clip", export)], tmp_path)[0])  # law 8
    assert found["image"] < 1e-5 and found["text"] < 1e-5 and found["spread"] > 1e-3
    assert not any("head" in key and not key.startswith("visual.head.proj") for key in load_file(export / "open_clip_model.safetensors"))
    assert (export / "token_heads.safetensors").is_file() == (name in TOKENS)
    verify(source_of_run(recipe_of(run), open_weights(run)), export)

    if name in TOKENS:
        ours, again = protoclip_scale.load(run), protoclip_scale.load(export)
        assert ours.compared == again.compared and again.token_scale == pytest.approx(ours.token_scale, rel=1e-6)
        pictures, captions = pairs()[0][:20], pairs()[1][:20]
        images, texts = ours.encode_image_tokens(pictures), ours.encode_text_tokens(captions)
        assert images.shape == (20, 4, 16) and (again.encode_image_tokens(pictures) - images).abs().max() < 1e-5
        assert (again.encode_text_tokens(captions) - texts).abs().max() < 1e-5


@pytest.mark.slow
def test_figures_of_an_export_of_tokens_are_those_of_the_run(tmp_path):
    """By launch/evaluate.py; and what uses such an export by cosines would mean nothing."""
    run = trained(tmp_path, "demo_filip")
    (tmp_path / "suite.yaml").write_text(json.dumps({"sets": [{**HELD_OUT, "files": str(RECIPES / "demo_corpus" / HELD_OUT["files"])}], "batch": 16}))
    for model, out, arguments in ((run, "run", ()), (run / "export" / "open_clip", "export", ("--suite", tmp_path / "suite.yaml"))):
        done = launch("--model", model, *arguments, "--out", tmp_path / f"{out}.json", script="launch/evaluate.py")
        assert done.returncode == 0, done.stderr
        assert "by tokens" in done.stdout and "modality" not in done.stdout
    found, expected = (json.loads((tmp_path / f"{name}.json").read_text())["results"][0]["figures"] for name in ("export", "run"))
    assert found.keys() == expected.keys() and found == pytest.approx(expected, abs=1e-6)
    logged = {key: value for key, value in metrics(run, "eval")[-1].items() if key in expected}
    assert logged == expected
    watched = launch(run, "--until-done", script="tools/watch.py")
    assert watched.returncode == 0 and "by tokens" in watched.stdout, watched.stderr
    rows, _ = figures_csv.read(run)
    assert {row.key: row.value for row in rows if row.step == 12} == pytest.approx(expected)
    photo = tmp_path / "photo.png"
    pairs()[0][3].save(photo)
    assert classify.main([str(run / "export" / "open_clip"), str(photo), "--classes", "heart,dog", "--template", "a {}", "--template", "{}"]) == 0


@pytest.mark.slow
def test_filip_alone_trains_on_two_ranks_where_parts_have_no_gradient(tmp_path):
    """Projections and CLIP's temperature are in the model and in no loss: DDP must not wait for them, and they stay as they were drawn."""
    runs = [trained(tmp_path / f"{ranks}", "demo_filip", ranks) for ranks in (1, 2) if not (tmp_path / f"{ranks}").mkdir()]
    losses = [[line["loss"] for line in metrics(run, "train")] for run in runs]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5) and losses[1] == pytest.approx(losses[0], rel=0.02)  # Adam magnifies rounding; gradients are law 1's
    recipe = recipe_of(runs[0])
    drawn = build_model(recipe, frozenset({"image", "text"}), recipe.run.seed).state_dict()
    for name in ("image_projection.weight", "text_projection.weight", "logit_scale.log"):
        assert all(torch.equal(drawn[name], final_tensors(run)[f"model/{name}"]) for run in runs), name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_check_finds_no_problem(name):
    done = launch("--recipe", RECIPES / f"{name}.yaml", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
