"""Law 8: open_clip, in a process of its own and without this package, gives the live model's embeddings of real pairs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizerFast

from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.errors import UserError
from protoclip_scale.export.open_clip_layout import check_open_clip, export_open_clip
from protoclip_scale.models.build import build_model, load_open_clip_export
from protoclip_scale.recipe import schema

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 256
FEATURES = frozenset({"image", "text", "logit_scale", "image_prototype", "text_prototype", "prototype_scale"})
DEMO_TEXT = {"width": 192, "heads": 3, "layers": 3, "context_length": 32}

# What a user of open_clip does; it prepares the pictures itself, and hands them over for the live model to see the same.
READER = """
import io, sys
import open_clip, torch
import pyarrow.parquet as pq
from PIL import Image
from safetensors.torch import save_file

corpus, rows, *folders = sys.argv[1:]
table = pq.read_table(corpus, columns=["image", "caption"]).slice(0, int(rows))
pictures = [Image.open(io.BytesIO(image["bytes"])) for image in table["image"].to_pylist()]
captions = [caption[0] for caption in table["caption"].to_pylist()]
torch.set_num_threads(1)
for folder in folders:
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        images, ids = torch.stack([preprocess(picture) for picture in pictures]), tokenizer(captions)
        image = torch.cat([model.encode_image(part, normalize=True) for part in images.split(64)])
        text = torch.cat([model.encode_text(part, normalize=True) for part in ids.split(64)])
    saved = {"images": images, "ids": ids, "image": image, "text": text, "logit_scale": model.logit_scale.detach().clone()}
    save_file({name: tensor.contiguous() for name, tensor in saved.items()}, f"{folder}.out")
assert not any(name.split(".")[0] == "protoclip_scale" for name in sys.modules)
"""


def recipe_of(embed_dim: int, image: dict, text: dict) -> SimpleNamespace:
    return SimpleNamespace(model=schema.Model(embed_dim=embed_dim, image=image, text=text))


def trained_looking(recipe):
    """A model whose weights and running statistics are none of their initial values."""
    model = build_model(recipe, FEATURES, 0)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.01)
        model.logit_scale.log.fill_(7.0)
        size = recipe.model.image.size
        model.train()(torch.randint(0, 256, (8, 3, size, size), generator=draws, dtype=torch.uint8), torch.full((8, 8), 49_407), torch.full((8,), 3), wants=FEATURES)
    return model.eval()


TOWERS = {
    "demo": recipe_of(128, {"name": "resnet10t", "size": 48}, DEMO_TEXT),
    "other_demo": recipe_of(128, {"name": "mobilenetv3_small_050", "size": 48, "normalization": "imagenet"}, DEMO_TEXT),  # timm's own classifier layer
    "rn50": recipe_of(64, {"name": "resnet50_clip", "size": 64}, DEMO_TEXT | {"activation": "quick_gelu"}),
    "vit": recipe_of(64, {"name": "test_vit", "size": 160}, DEMO_TEXT),
}
LARGE = {"clip_vit": recipe_of(64, {"name": "vit_base_patch32_clip_224", "size": 224}, DEMO_TEXT)}


def exported(towers: dict, folder: Path) -> dict:
    """Every tower's live model, export folder, and what the other process computed."""
    models = {name: trained_looking(recipe) for name, recipe in towers.items()}
    folders = [export_open_clip(models[name], recipe, folder / name) for name, recipe in towers.items()]
    corpus = ROOT / "recipes" / "demo_corpus" / "eval_seen_concept-00000-of-00002.parquet"
    assert pq.read_metadata(corpus).num_rows >= PAIRS
    # in a folder from which the package cannot be imported by accident
    subprocess.run([sys.executable, "-c", READER, str(corpus), str(PAIRS), *map(str, folders)], cwd=folder, check=True, timeout=280)
    return {name: (models[name], folder / name, load_file(f"{folder / name}.out")) for name in towers}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return exported(TOWERS, tmp_path_factory.mktemp("exports"))


@pytest.mark.parametrize("name", TOWERS)
def test_open_clip_gives_the_live_models_embeddings(exports, name):
    assert_same_embeddings(TOWERS[name], *exports[name])


@pytest.mark.slow
def test_open_clip_gives_the_embeddings_of_a_clip_vit(tmp_path):
    assert_same_embeddings(LARGE["clip_vit"], *exported(LARGE, tmp_path)["clip_vit"])


def assert_same_embeddings(recipe, model, _, theirs):
    assert len(theirs["image"]) == len(theirs["text"]) == PAIRS
    corpus = pq.read_table(ROOT / "recipes" / "demo_corpus" / "eval_seen_concept-00000-of-00002.parquet", columns=["caption"]).slice(0, PAIRS)
    tokens = tokenizer_for(recipe.model.text)([caption[0] for caption in corpus["caption"].to_pylist()])
    assert torch.equal(tokens.ids, theirs["ids"])
    with torch.no_grad():
        image = torch.cat([model.encode_image(part) for part in theirs["images"].split(64)])
        text = model.encode_text(tokens.ids, tokens.lengths)
    assert (image - theirs["image"]).abs().max() <= 1e-5
    assert (text - theirs["text"]).abs().max() <= 1e-5
    assert image.std(0).mean() > 1e-3 and text.std(0).mean() > 1e-3  # not all rows alike
    assert theirs["logit_scale"].shape == () and theirs["logit_scale"].item() == pytest.approx(schema.LN_100)  # bounded


@pytest.mark.parametrize("name", ["other_demo", "rn50"])
def test_an_export_comes_back(exports, name):
    model, folder, _ = exports[name]
    settings, again = load_open_clip_export(folder)
    assert settings.model_copy(update={"init_from": None}) == TOWERS[name].model
    state = model.state_dict() | {"logit_scale.log": torch.tensor([schema.LN_100])}
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


def test_an_export_holds_nothing_but_the_two_towers(exports):
    _, folder, _ = exports["demo"]
    assert sorted(path.name for path in folder.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert str(folder.parent) not in json.dumps(config) and config["model_cfg"]["vision_cfg"]["timm_model_pretrained"] is False
    assert {name.split(".")[0] for name in load_file(folder / "open_clip_model.safetensors")} == {
        "visual", "token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection", "logit_scale",
    }  # fmt: skip


def test_a_full_folder_is_not_touched(exports, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty"):
        export_open_clip(exports["demo"][0], TOWERS["demo"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_towers_open_clip_cannot_express_are_told(tmp_path):
    assert all(check_open_clip(recipe) == [] for recipe in TOWERS.values())
    small_vit = recipe_of(16, {"name": "test_vit", "size": 64}, DEMO_TEXT)
    (reason,) = check_open_clip(small_vit)
    assert reason == "open_clip builds test_vit for 160 pixels only: set model.image.size 160 or choose a convolutional tower"
    with pytest.raises(UserError, match="open_clip cannot express this model: open_clip builds test_vit for 160 pixels only"):
        export_open_clip(build_model(small_vit, frozenset({"image", "text"}), 0), small_vit, tmp_path / "out")
    BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64).save_pretrained(tmp_path / "bert")
    (reason,) = check_open_clip(recipe_of(16, {"name": "test_resnet", "size": 32}, {"name": str(tmp_path / "bert")}))
    assert "is a folder of this machine: give the encoder's hub name" in reason
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_tower_that_open_clip_computes_otherwise_is_not_published(tmp_path):
    recipe = TOWERS["demo"]
    model = build_model(recipe, frozenset({"image", "text", "logit_scale"}), 0)
    model.image_tower.trunk.act1 = torch.nn.Tanh()  # the same weights, another function
    with pytest.raises(UserError, match="open_clip computes other embeddings"):
        export_open_clip(model, recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_of_the_hub_exports_with_its_tokenizer(tmp_path):
    """The hub is its local cache here, laid out as huggingface_hub does."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "two", "chairs", "in", "the", "snow"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    cached = tmp_path / "hub" / "models--someone--tiny-bert"
    snapshot = cached / "snapshots" / ("0" * 40)
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), model_max_length=16).save_pretrained(snapshot)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    script = """
import sys
from types import SimpleNamespace
import open_clip
import torch
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.export.open_clip_layout import export_open_clip
from protoclip_scale.models.build import build_model
from protoclip_scale.recipe import schema
recipe = SimpleNamespace(model=schema.Model(embed_dim=16, image={"name": "test_resnet", "size": 32}, text={"name": "someone/tiny-bert", "pretrained": True, "context_length": 16}))
model = build_model(recipe, frozenset({"image", "text", "logit_scale"}), 0).eval()
export_open_clip(model, recipe, sys.argv[1])
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
