"""Law 8: open_clip and transformers, in a process of their own and without this package, give the live model's embeddings of real pairs."""

import contextlib
import copy
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizerFast

import protoclip_scale
from protoclip_scale.errors import UserError
from protoclip_scale.export.card import Facts, write_card
from protoclip_scale.export.source import published, round_weights, source_of_model
from protoclip_scale.export.writing import LAYOUTS, Extras, check_layout, export, verify
from protoclip_scale.models.build import build_model, load_export
from protoclip_scale.models.initial_weights import TOKENS
from protoclip_scale.models.text import CLIP_VOCABULARY, MASK_ID, with_mask_row, without_mask_row
from protoclip_scale.recipe import load_recipe, schema
from tests.exports import DEMO_TEXT, Settings, computed_elsewhere, differences, pairs, recipe_of, trained_looking
from tests.support import RECIPES, ROOT, TINY_PROTOTYPES, output, pretrain, zero_environment

TOWERS = {
    "demo": recipe_of(128, {"name": "regnetx_002", "size": 48}, DEMO_TEXT).model,
    "rn50": recipe_of(64, {"name": "resnet50_clip", "size": 64}, DEMO_TEXT | {"activation": "quick_gelu"}).model,
    "vit": recipe_of(64, {"name": "test_vit", "size": 160}, DEMO_TEXT).model,
    "masked": recipe_of(64, {"name": "test_resnet", "size": 32}, DEMO_TEXT | {"mask_token": True}).model,
}
OWN_CLASSIFIER = recipe_of(128, {"name": "mobilenetv3_small_050", "size": 48, "normalization": "imagenet"}, DEMO_TEXT).model  # layers behind its pooling
CASES = [(layout, name) for name in TOWERS for layout in LAYOUTS]
SHIPPED = sorted(path.name for path in RECIPES.glob("*.yaml"))


def written(model, settings, layout, folder, dtype="float32", **extras):
    return export(source_of_model(model, settings), layout, folder, dtype, Extras(**extras))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """(layout, tower) -> live model, export folder, what the other process computed. The demo's towers also in half precision."""
    root = tmp_path_factory.mktemp("exports")
    models = {name: trained_looking(settings) for name, settings in TOWERS.items()}
    jobs = [(layout, written(models[name], TOWERS[name], layout, root / f"{layout}-{name}")) for layout, name in CASES]
    for dtype, layout in (("bfloat16", "transformers"), ("float16", "open_clip")):
        model = copy.deepcopy(models["demo"])
        jobs.append((layout, written(models["demo"], TOWERS["demo"], layout, root / dtype, dtype)))
        round_weights(model, getattr(torch, dtype))
        models[dtype] = model
    found = computed_elsewhere(jobs, root)
    keys = [*CASES, ("transformers", "bfloat16"), ("open_clip", "float16")]
    return {key: (models[key[1]], folder, theirs) for key, (_, folder), theirs in zip(keys, jobs, found, strict=True)}


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_others_give_the_live_models_embeddings(exports, layout, name):
    model, _, theirs = exports[layout, name]
    found = differences(model, TOWERS[name], theirs)
    assert found["image"] <= 1e-5 and found["text"] <= 1e-5 and found["spread"] > 1e-3, found
    assert theirs["logit_scale"].shape == () and theirs["logit_scale"].item() == pytest.approx(schema.LN_100)  # bounded
    ids, lengths = found["tokens"]
    kept = torch.arange(ids.shape[1]) < lengths[:, None]  # transformers pads with the end token
    assert torch.equal(ids[kept], theirs["ids"][kept]) and ids.shape == theirs["ids"].shape
    assert "mask" not in theirs or torch.equal(theirs["mask"].bool(), kept)


@pytest.mark.parametrize(("layout", "dtype"), [("transformers", "bfloat16"), ("open_clip", "float16")])
def test_half_precision_files_give_the_embeddings_of_rounded_weights(exports, layout, dtype):
    rounded, folder, theirs = exports[layout, dtype]
    found, unrounded = differences(rounded, TOWERS["demo"], theirs), differences(exports[layout, "demo"][0], TOWERS["demo"], theirs)
    assert found["image"] <= 1e-5 and found["text"] <= 1e-5
    bound = {"bfloat16": 0.03, "float16": 0.004}[dtype]  # 2^-8 and 2^-11, through the layers
    assert 1e-5 < max(unrounded["image"], unrounded["text"]) < bound
    verify(source_of_model(exports[layout, "demo"][0], TOWERS["demo"]), folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_are_prepared_alike(exports, layout):
    """Ours resizes uint8 tensors; open_clip resizes with PIL, transformers with torchvision: a level or two apart, by rounding."""
    _, folder, theirs = exports[layout, "demo"]
    model = protoclip_scale.load(folder)
    ours = model.model.normalize_images(torch.stack([model.preprocess(picture) for picture in pairs()[0][:64]]))
    levels = (ours - theirs["images"][:64]).abs() * 255 * torch.tensor(model.model.normalization[1])[:, None, None]
    assert levels.mean() < 0.1 and levels.max() < 8, (levels.mean(), levels.max())


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_an_export_comes_back(exports, layout, name):
    model, folder, _ = exports[layout, name]
    settings, again = load_export(folder)
    expected = published(TOWERS[name])
    assert settings.model_copy(update={"init_from": None}) == expected and not expected.text.mask_token
    state = model.state_dict() | {"logit_scale.log": torch.tensor([schema.LN_100])}
    state[TOKENS] = without_mask_row(state[TOKENS])
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    started = build_model(recipe_of(expected.embed_dim, expected.image.model_dump(), expected.text.model_dump())._replace(model=expected.model_copy(update={"init_from": str(folder)})), frozenset({"image", "text", "logit_scale"}), 3)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in started.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_with_a_mask_token_is_exported_without_it_and_starts_from_the_export_with_a_row_of_its_own(exports, layout):
    model, folder, _ = exports[layout, "masked"]
    settings = TOWERS["masked"].model_copy(update={"init_from": str(folder)})
    fresh, started = (build_model(Settings(each), frozenset({"image", "text"}), 3).state_dict() for each in (TOWERS["masked"], settings))
    table = model.state_dict()[TOKENS]
    assert load_export(folder)[1].state_dict()[TOKENS].shape == (CLIP_VOCABULARY, table.shape[1])
    assert len(table) == CLIP_VOCABULARY + 1 and not torch.equal(fresh[TOKENS][MASK_ID], table[MASK_ID])
    assert torch.equal(started[TOKENS], with_mask_row(without_mask_row(table), fresh[TOKENS][MASK_ID : MASK_ID + 1]))
    if layout == "transformers":
        assert json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"] == CLIP_VOCABULARY == len(json.loads((folder / "vocab.json").read_text()))


def test_an_export_holds_nothing_but_the_two_towers(exports):
    _, folder, _ = exports["open_clip", "demo"]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "open_clip_config.json", "open_clip_model.safetensors"]
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["timm_model_pretrained"] is False
    assert {name.split(".")[0] for name in load_file(folder / "open_clip_model.safetensors")} == {
        "visual", "token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection", "logit_scale",
    }  # fmt: skip
    _, folder, _ = exports["transformers", "demo"]
    kinds = json.loads((folder / "config.json").read_text())
    assert kinds["architectures"] == ["VisionTextDualEncoderModel"] and kinds["vision_config"]["model_type"] == "timm_wrapper"
    for (layout, name), (_, folder, _) in exports.items():
        assert str(folder.parent) not in "".join(path.read_text() for path in folder.glob("*.json")), (layout, name)


def test_an_export_that_differs_from_the_model_is_refused(exports, tmp_path):
    model, folder, _ = exports["transformers", "rn50"]
    source = source_of_model(model, TOWERS["rn50"])
    assert verify(source, folder)["dtype"] == "float32"
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.text_tower.encoder.encoder.layers[1].mlp.fc1.bias[3] += 1e-4
    with pytest.raises(UserError, match="text_model.encoder.layers.1.mlp.fc1.bias differs from the model's"):
        verify(source_of_model(other, TOWERS["rn50"]), folder)
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    weights = load_file(changed / "model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="model.safetensors was changed or damaged"):
        verify(source, changed)
    (changed / "config.json").unlink()
    with pytest.raises(UserError, match="config.json is missing"):
        verify(source, changed)


def test_a_full_folder_is_not_touched(exports, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty"):
        written(exports["open_clip", "demo"][0], TOWERS["demo"], "transformers", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_towers_open_clip_cannot_express_are_told(tmp_path):
    assert all(check_layout(layout, TOWERS[name]) == [] for layout, name in CASES)
    for layout in LAYOUTS:
        (reason,) = check_layout(layout, recipe_of(16, {"name": "test_resnet", "size": 32}, DEMO_TEXT | {"causal": False}).model)
        assert "model.text.causal false" in reason and "set it to true" in reason
    small_vit = recipe_of(16, {"name": "test_vit", "size": 64}, DEMO_TEXT).model
    (reason,) = check_layout("open_clip", small_vit)
    assert reason == "open_clip builds test_vit for 160 pixels only: set model.image.size 160 or choose a convolutional tower"
    model = build_model(recipe_of(16, {"name": "test_vit", "size": 64}, DEMO_TEXT), frozenset({"image", "text", "logit_scale"}), 0)
    with pytest.raises(UserError, match="open_clip cannot express this model: open_clip builds test_vit for 160 pixels only"):
        written(model, small_vit, "open_clip", tmp_path / "out")
    assert load_export(written(model, small_vit, "transformers", tmp_path / "out"))[0].image.size == 64  # transformers can
    BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64).save_pretrained(tmp_path / "bert")
    (reason,) = check_layout("open_clip", recipe_of(16, {"name": "test_resnet", "size": 32}, {"name": str(tmp_path / "bert")}).model)
    assert "is a folder of this machine: give the encoder's hub name" in reason
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tower_that_another_library_computes_otherwise_is_not_published(layout, tmp_path):
    settings = recipe_of(16, {"name": "test_resnet", "size": 32}, DEMO_TEXT | {"layers": 1}).model
    model = build_model(recipe_of(16, {"name": "test_resnet", "size": 32}, DEMO_TEXT | {"layers": 1}), frozenset({"image", "text", "logit_scale"}), 0)
    model.image_tower.trunk.act1 = torch.nn.Tanh()  # the same weights, another function
    with pytest.raises(UserError, match=f"{layout} computes other embeddings"):
        written(model, settings, layout, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- text encoders of transformers, and the cards' lines of code

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "two", "chairs", "in", "the", "snow", "cat", "car"]


def tiny_bert(folder, pooling: str | None = None):
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)).save_pretrained(folder)
    if pooling:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({pooling: True}))
    return str(folder)


SNIPPETS = """
import json, os, sys
for folder, code in json.loads(sys.argv[1]):
    os.chdir(folder)
    exec(compile(code, folder, "exec"), {})
assert not any(name.split(".")[0] == "protoclip_scale" for name in sys.modules)
"""


@pytest.mark.slow
def test_the_lines_of_code_of_every_card_run(exports, tmp_path):
    """In the export's folder, in a process without this package: the similarities that the live model gives, for all forms of both layouts."""
    cases = {name: (exports[layout, name][0], TOWERS[name], layout) for layout, name in (("open_clip", "demo"), ("transformers", "rn50"))}
    for pooling in ("pooling_mode_mean_tokens", "pooling_mode_cls_token"):
        recipe = recipe_of(16, {"name": "test_resnet", "size": 32}, {"name": tiny_bert(tmp_path / f"hub-{pooling}", pooling), "pretrained": True, "context_length": 16})
        cases[pooling] = (build_model(recipe, frozenset({"image", "text", "logit_scale"}), 0).eval(), recipe.model, "transformers")
    jobs, expected = [], []
    for name, (model, settings, layout) in cases.items():
        facts = Facts(name, "apache-2.0", settings, "live", [], {}, {}, {}, ("clip",), {"steps": "1"}, "name: x", None)
        folder = written(model, settings, layout, tmp_path / name, card=lambda layout, draft, facts=facts: write_card(facts, layout, draft))
        pairs()[0][5].save(folder / "photo.jpg", quality=95)
        assert not [path for path in folder.rglob("*") if path.suffix in (".json", ".md") and str(tmp_path) in path.read_text()]  # nor of the encoder's folder
        theirs, ours = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        jobs.append((str(folder), theirs))
        live = protoclip_scale.Encoder(settings, model)
        expected.append((live.encode_image(folder / "photo.jpg") @ live.encode_text(["a cat", "a red car"]).T)[0].tolist())
        printed = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
            exec(compile(ours, name, "exec"), {})
        assert eval(printed.getvalue()) == pytest.approx(dict(zip(["a cat", "a red car"], expected[-1], strict=True)), abs=1e-5)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", SNIPPETS, json.dumps(jobs)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for name, line, similarities in zip(cases, done.stdout.strip().splitlines(), expected, strict=True):
        assert eval(line) == pytest.approx(dict(zip(["a cat", "a red car"], similarities, strict=True)), abs=0.01), name  # other libraries resize otherwise


@pytest.mark.slow
def test_an_encoder_of_the_hub_exports_with_its_tokenizer(tmp_path):
    """The hub is its local cache here, laid out as huggingface_hub does."""
    cached = tmp_path / "hub" / "models--someone--tiny-bert"
    tiny_bert(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    script = """
import sys
import open_clip
import torch
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.export.source import source_of_model
from protoclip_scale.export.writing import export
from protoclip_scale.models.build import build_model
from tests.exports import recipe_of
recipe = recipe_of(16, {"name": "test_resnet", "size": 32}, {"name": "someone/tiny-bert", "pretrained": True, "context_length": 16})
model = build_model(recipe, frozenset({"image", "text", "logit_scale"}), 0).eval()
export(source_of_model(model, recipe.model), "open_clip", sys.argv[1])
tokens = tokenizer_for(recipe.model.text)(["a red fox", "two chairs in the snow"])
theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{sys.argv[1]}")
ids = open_clip.get_tokenizer(f"local-dir:{sys.argv[1]}")(["a red fox", "two chairs in the snow"])
assert torch.equal(ids, tokens.ids)
with torch.no_grad():
    live, loaded = model.encode_text(*tokens), theirs.eval().encode_text(ids, normalize=True)
print((live - loaded).abs().max().item(), live.std(0).mean().item())
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", script, str(tmp_path / "export")], env=environment, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    difference, spread = map(float, process.stdout.split()[-2:])
    assert difference <= 1e-5 and spread > 1e-3


# --- large towers, and what training under ZeRO leaves


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tower_of_the_shipped_recipes(layout, tmp_path):
    """At the recipes' own sizes, random weights; a vision transformer of CLIP's becomes a CLIPModel. And one whose own classifier has a layer of its own."""
    towers: dict[tuple, schema.Model] = {("own classifier",): OWN_CLASSIFIER}
    for name in SHIPPED:
        model = load_recipe(RECIPES / name, []).model
        image, text = model.image.model_copy(update={"pretrained": False}), model.text.model_copy(update={"pretrained": False})
        towers[model.embed_dim, image.name, image.size, text.activation, text.causal, text.mask_token] = schema.Model(embed_dim=model.embed_dim, image=image.model_dump(), text=text.model_dump())
    assert len(towers) >= 4
    found = {}
    for number, (key, settings) in enumerate(towers.items()):
        model = trained_looking(settings)
        folder = written(model, settings, layout, tmp_path / str(number))
        (theirs,) = computed_elsewhere([(layout, folder)], tmp_path)
        found[key] = differences(model, settings, theirs)
        assert found[key]["image"] <= 1e-5 and found[key]["text"] <= 1e-5 and found[key]["spread"] > 1e-4, (key, found[key])
        if layout == "transformers" and "clip_224" in settings.image.name:
            assert json.loads((folder / "config.json").read_text())["architectures"] == ["CLIPModel"]
            assert load_export(folder)[0].image == settings.image
        shutil.rmtree(folder)
        (tmp_path / f"{number}.out").unlink()


@pytest.mark.slow
def test_exports_of_a_run_under_zero_2(tmp_path):
    """Two processes train; each layout, in float32 and bfloat16, is the checkpoint's model, with prototypes and a card; another run's is refused."""
    import runpy

    from protoclip_scale.engine.saved_model import load_model

    run = tmp_path / "run"
    env = zero_environment(2, 2)
    assert pretrain(run, "demo.yaml", (*TINY_PROTOTYPES, "schedule.total=2 episodes"), ranks=2, env=env) == [0, 0], output(run)
    main = runpy.run_path(str(ROOT / "launch" / "export.py"), run_name="export")["main"]
    recipe, model, _ = load_model(run)
    jobs = [(layout, dtype, tmp_path / f"{layout}-{dtype}") for layout in LAYOUTS for dtype in ("float32", "bfloat16")]
    for layout, dtype, folder in jobs:
        assert main(["--run", str(run), "--layout", layout, "--dtype", dtype, "--out", str(folder), "--prototypes"]) == 0
        assert main(["--run", str(run), "--out", str(folder), "--verify"]) == 0
        assert {name.split(".")[0] for name in load_file(folder / "prototypes.safetensors")} == {"centroids", "image_prototype_head", "text_prototype_head", "prototype_logit_scale"}
        assert "4,949" in (folder / "README.md").read_text()
    for (_, dtype, folder), theirs in zip(jobs, computed_elsewhere([(layout, folder) for layout, _, folder in jobs], tmp_path), strict=True):
        live = copy.deepcopy(model)
        round_weights(live, getattr(torch, dtype))
        found = differences(live, recipe.model, theirs)
        assert found["image"] <= 1e-5 and found["text"] <= 1e-5, (folder, found)
    assert pretrain(tmp_path / "other", "demo.yaml", (*TINY_PROTOTYPES, "schedule.total=2 episodes", "run.seed=1")) == [0]
    assert main(["--run", str(tmp_path / "other"), "--out", str(jobs[0][2]), "--verify"]) == 1
