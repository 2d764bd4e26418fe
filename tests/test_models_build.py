"""Building from a recipe: seeds, and every kind of ``model.init_from`` with weights made here, offline."""

import json
from types import SimpleNamespace

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.errors import UserError
from protoclip_scale.models.build import build_model, load_open_clip_export
from protoclip_scale.models.dual_encoder import FEATURES, DualEncoder
from protoclip_scale.recipe import schema

CLIP = frozenset({"image", "text", "logit_scale"})
SMALL_TEXT = {"width": 32, "heads": 2, "layers": 2, "context_length": 16}
SMALL = {"embed_dim": 16, "image": {"name": "test_resnet", "size": 32}, "text": SMALL_TEXT}
RN50 = {"embed_dim": 24, "image": {"name": "resnet50_clip", "size": 224}, "text": SMALL_TEXT | {"activation": "quick_gelu"}}
VIT = {"embed_dim": 24, "image": {"name": "vit_xsmall_patch16_clip_224", "size": 224}, "text": SMALL_TEXT}
CAPTIONS = ["a red fox in the snow", "two chairs", "a flag"]


def recipe_of(settings: dict, **more) -> SimpleNamespace:
    return SimpleNamespace(model=schema.Model.model_validate(settings | more))


def build(settings: dict, features=CLIP, seed: int = 0, **more) -> DualEncoder:
    return build_model(recipe_of(settings, **more), features, seed).eval()


def noise(model: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """Small random weights everywhere, so that nothing (zero gains, zero biases) is left out by chance."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.02)
    return model.eval()


def assert_same_embeddings(ours: DualEncoder, their_image, their_text, size: int, settings: dict):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    tokens = tokenizer_for(schema.TextTower.model_validate(settings["text"]))(CAPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(images), F.normalize(their_image(images), dim=-1), rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.encode_text(*tokens), F.normalize(their_text(tokens.ids), dim=-1), rtol=0, atol=1e-5)


# --- seeds


def test_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(11)
    expected_next = torch.rand(3)
    torch.manual_seed(11)
    first = build(SMALL, FEATURES, seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected_next), "the global random state moved"
    again, other, fewer = (build(SMALL, features, seed).state_dict() for features, seed in ((FEATURES, 1), (FEATURES, 2), (CLIP, 1)))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert all(torch.equal(value, first[name]) for name, value in fewer.items())
    assert not torch.equal(first["image_projection.weight"], other["image_projection.weight"])


def test_a_model_that_will_be_overwritten_loads_nothing():
    build_model(recipe_of(SMALL, init_from="open_clip:RN50/there-is-no-such-tag"), CLIP, 0, fresh=False)


# --- open_clip


def write_open_clip(folder, vision: dict, **more):
    """An open_clip folder with random weights, and the live model."""
    text = {"context_length": 16, "vocab_size": 49_408, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **more}
    model = noise(open_clip.CLIP(**config))
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


@pytest.mark.parametrize(
    ("settings", "vision", "quick_gelu"),
    [
        (RN50, {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None}, True),
        (VIT, {"image_size": 224, "layers": 10, "width": 256, "head_width": 64, "patch_size": 16}, False),
    ],
    ids=["ModifiedResNet", "VisionTransformer"],
)
def test_init_from_an_open_clip_folder_with_openais_towers(tmp_path, settings, vision, quick_gelu):
    theirs = write_open_clip(tmp_path / "weights", vision, quick_gelu=quick_gelu)
    ours = build(settings, init_from=str(tmp_path / "weights"))
    assert_same_embeddings(ours, theirs.encode_image, theirs.encode_text, 224, settings)
    assert ours.logit_scale.log.item() == 3.0
    used, other = ("quick_gelu", "gelu") if quick_gelu else ("gelu", "quick_gelu")
    with pytest.raises(UserError, match=f"was trained with {used}, model.text.activation is {other}"):
        build(settings | {"text": SMALL_TEXT | {"activation": other}}, init_from=str(tmp_path / "weights"))


def test_init_from_an_open_clip_name_with_a_weights_file(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    theirs = write_open_clip(folder, {"timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear", "image_size": 32})
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", json.loads((folder / "open_clip_config.json").read_text())["model_cfg"])
    settings = SMALL | {"embed_dim": 24}
    ours = build(settings, init_from=f"open_clip:Tiny/{folder / 'open_clip_model.safetensors'}")
    assert_same_embeddings(ours, theirs.encode_image, theirs.encode_text, 32, settings)
    with pytest.raises(UserError, match="open_clip cannot load Tiny with laion9b") as error:
        build(settings, init_from="open_clip:Tiny/laion9b")
    assert "\n" not in str(error.value)


# --- transformers


def test_init_from_a_transformers_clip(tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
    vision = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 4, "image_size": 224, "patch_size": 16}
    text, vision = text | {"hidden_act": "gelu"}, vision | {"hidden_act": "gelu"}
    theirs = noise(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)))
    theirs.save_pretrained(tmp_path)
    ours = build(VIT, init_from=str(tmp_path))
    their_image = lambda images: theirs.visual_projection(theirs.vision_model(pixel_values=images).pooler_output)  # noqa: E731
    their_text = lambda ids: theirs.text_projection(theirs.text_model(input_ids=ids).pooler_output)  # noqa: E731
    assert_same_embeddings(ours, their_image, their_text, 224, VIT)
    with pytest.raises(UserError, match="it needs model.image.name vit_"):
        build(SMALL, init_from=str(tmp_path))
    with pytest.raises(UserError, match=r"image_projection.weight is \[24, 256\] there and \[16, 256\] here"):
        build(VIT | {"embed_dim": 16}, init_from=str(tmp_path))


def test_init_from_tells_another_activation_of_the_image_tower(tmp_path):
    vision = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 224, "patch_size": 16}
    text = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"hidden_act": "quick_gelu"}, projection_dim=24)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="was trained with quick_gelu in the image tower"):
        build(VIT, init_from=str(tmp_path))


# --- runs, and what is none of these


def test_init_from_a_run_takes_heads_and_bounded_scales_too(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    source = noise(build(SMALL, FEATURES, seed=3))
    with torch.no_grad():
        source.logit_scale.log.fill_(9.0)
    read = lambda folder: source.state_dict() if folder == tmp_path else None  # noqa: E731
    recipe = recipe_of(SMALL, init_from=str(tmp_path))
    model = build_model(recipe, FEATURES, 0, read_run=read)
    expected = source.state_dict() | {"logit_scale.log": torch.tensor([schema.LN_100])}
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    without_heads = build_model(recipe, CLIP, 0, read_run=read).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in without_heads.items())
    source = noise(build(SMALL, CLIP, seed=3))
    model, fresh = build_model(recipe, FEATURES, 0, read_run=read).state_dict(), build(SMALL, FEATURES, 0).state_dict()
    assert all(torch.equal(value, (fresh if "prototype" in name else source.state_dict())[name]) for name, value in model.items())
    with pytest.raises(UserError, match=r"image_projection.weight is \[16, 96\] there and \[24, 96\] here"):
        build_model(recipe_of(SMALL, embed_dim=24, init_from=str(tmp_path)), CLIP, 0, read_run=read)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{here}/nothing", "there is no such folder"),
        ("{here}", "it has no checkpoints, open_clip_config.json or config.json"),
        ("open_clip:RN50", "write open_clip:NAME/TAG"),
        ("open_clip:RN51/openai", "names no open_clip model"),
    ],
)
def test_unusable_sources_are_told_in_one_line(tmp_path, source, message):
    with pytest.raises(UserError, match=message) as error:
        build(SMALL, init_from=source.format(here=tmp_path))
    assert "\n" not in str(error.value) and "model.init_from" in str(error.value)


def test_damaged_export_folders_are_told(tmp_path):
    folder = tmp_path / "weights"
    write_open_clip(folder, {"timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear", "image_size": 32})
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="open_clip_model.safetensors cannot be read"):
        build(SMALL, init_from=str(folder))
    weights.unlink()
    with pytest.raises(UserError, match=r"no \.safetensors weights"):
        load_open_clip_export(folder)
    (folder / "open_clip_config.json").write_text("{")
    with pytest.raises(UserError, match="is no open_clip configuration"):
        build(SMALL, init_from=str(folder))
