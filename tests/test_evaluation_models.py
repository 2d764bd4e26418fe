"""Models of any kind from one name, with their own preprocessing and tokenizer."""

import json

import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel

from protoclip_scale.data.decode import decode_image
from protoclip_scale.data.tokenizers import ClipTokenizer, tokenizer_for
from protoclip_scale.data.transforms import eval_transform
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.models import load_any
from protoclip_scale.evaluation.others import preprocessing_of_open_clip
from protoclip_scale.evaluation.pixels import Preprocessing
from protoclip_scale.export.source import source_of_model
from protoclip_scale.export.writing import export
from protoclip_scale.models.build import build_model
from protoclip_scale.recipe import load_recipe
from tests.support import CORPUS, RECIPES, TINY

TEXTS = ["a photo of a cat.", "two red cars and a very long caption that goes on for more than sixteen tokens, surely it does so now"]
TINY_OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"},
}


def picture():
    import pyarrow.parquet as pq

    return decode_image(pq.read_table(CORPUS / "val-00000-of-00001.parquet").slice(0, 1).to_pylist()[0]["image"]["bytes"])


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    """A folder in open_clip's layout with open_clip's own towers and an unusual preprocessing."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY_OPEN_CLIP["model_cfg"])
    (folder / "open_clip_config.json").write_text(json.dumps(TINY_OPEN_CLIP))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory):
    """A CLIPModel of transformers with a tokenizer, and a crop smaller than its resized image."""
    folder = tmp_path_factory.mktemp("transformers")
    torch.manual_seed(1)
    sides = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(**sides, max_position_embeddings=16, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=CLIPVisionConfig(**sides, image_size=32, patch_size=16).to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    ClipTokenizer(16).save(folder)
    CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, resample=2, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return folder


def embeddings(candidate):
    image = candidate.preprocessing(picture())
    with torch.no_grad():
        return candidate.model.encode_image(image[None]), candidate.model.encode_text(*candidate.tokenizer(TEXTS))


def test_a_model_with_towers_of_open_clip_gives_what_open_clip_gives(open_clip_folder):
    candidate = next(load_any(str(open_clip_folder)))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{open_clip_folder}")
    model.eval()
    assert candidate.preprocessing == Preprocessing(32, None, "bilinear", True, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    with torch.no_grad():
        image = preprocess(Image.fromarray(picture().permute(1, 2, 0).numpy()))[None]
        expected = F.normalize(model.encode_image(image), dim=-1), F.normalize(model.encode_text(open_clip.get_tokenizer(f"local-dir:{open_clip_folder}")(TEXTS)), dim=-1)
    images, texts = embeddings(candidate)
    assert (images - expected[0]).abs().max() < 5e-3  # their resizing rounds otherwise
    assert torch.allclose(texts, expected[1], atol=1e-6)


def test_a_clip_of_transformers_gives_what_transformers_gives(transformers_folder):
    candidate = next(load_any(str(transformers_folder)))
    model, tokenizer = CLIPModel.from_pretrained(transformers_folder).eval(), AutoTokenizer.from_pretrained(transformers_folder)
    assert candidate.preprocessing == Preprocessing(32, 40, "bilinear", False, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    with torch.no_grad():
        pixels = CLIPImageProcessor.from_pretrained(transformers_folder)(picture(), return_tensors="pt")["pixel_values"]
        expected = model.get_image_features(pixel_values=pixels), model.get_text_features(**tokenizer(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt"))
    for ours, theirs, tolerance in zip(embeddings(candidate), expected, (5e-3, 1e-5), strict=True):
        theirs = theirs if isinstance(theirs, torch.Tensor) else theirs.pooler_output
        assert (ours - F.normalize(theirs, dim=-1)).abs().max() < tolerance


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_exports_of_ours_give_what_the_model_gave(layout, tmp_path):
    recipe = load_recipe(RECIPES / "demo_clip.yaml", TINY)
    model = build_model(recipe, frozenset({"image", "text", "logit_scale"}), seed=3).eval()
    candidate = next(load_any(str(export(source_of_model(model, recipe.model), layout, tmp_path / "export"))))
    assert (candidate.preprocessing.size, candidate.preprocessing.as_dict()["resize"], candidate.preprocessing.interpolation, candidate.preprocessing.squash) == (32, 32, "bicubic", False)
    images, texts = embeddings(candidate)
    with torch.no_grad():
        assert torch.allclose(images, model.encode_image(eval_transform(picture(), 32)[None]), atol=1e-5)
        assert torch.allclose(texts, model.encode_text(*tokenizer_for(recipe.model.text)(TEXTS)), atol=1e-5)


def test_a_model_of_open_clip_by_its_name():
    candidate = next(load_any("open_clip:ViT-S-32-alt"))
    assert candidate.name == "ViT-S-32-alt (random weights)" and candidate.preprocessing.size == 224 and candidate.preprocessing.interpolation == "bicubic"
    images, texts = embeddings(candidate)
    assert images.shape == (1, 256) and torch.allclose(texts.norm(dim=1), torch.ones(2))


def test_resize_and_crop_of_a_preprocessing():
    image = picture()
    assert torch.equal(Preprocessing(32)(image), eval_transform(image, 32))
    assert torch.equal(Preprocessing(32, 40)(image), eval_transform(image, 40)[:, 4:36, 4:36])
    wide = image[:, : image.shape[1] // 2]
    assert Preprocessing(32, squash=True)(wide).shape == (3, 32, 32)
    assert not torch.equal(Preprocessing(32, squash=True)(wide), Preprocessing(32)(wide))


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("open_clip:ViT-B-33", {}, "open_clip cannot load ViT-B-33"),
        ("open_clip:RN50:no_such_tag", {}, "open_clip cannot load RN50 with 'no_such_tag'"),
        ("hf:nobody/nothing", {}, "transformers cannot load it"),
        ("{tmp}", {}, "neither a run directory"),
        ("{tmp}/none", {}, "does not exist"),
        ("open_clip:RN50", {"checkpoint": "20"}, "leave --checkpoint away"),
        ("{export}", {"weights": "ema"}, "leave --weights away"),
    ],
)
def test_what_is_no_model_is_one_line(spec, options, message, tmp_path, open_clip_folder):
    with pytest.raises(UserError) as caught:
        next(load_any(spec.replace("{tmp}", str(tmp_path)).replace("{export}", str(open_clip_folder)), **options))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": [32, 48]}, "only square ones"),
        ({"size": 32, "resize_mode": "longest"}, "resize_mode longest is not supported"),
        ({"size": 32, "interpolation": "nearest"}, "resizes by nearest"),
    ],
)
def test_preprocessing_that_ours_cannot_do_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        preprocessing_of_open_clip(config, "it")


def test_other_models_of_transformers_are_refused(tmp_path):
    CLIPVisionModel(CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="neither a run directory|is a clip_vision_model"):
        next(load_any(str(tmp_path)))


def test_pickled_weights_of_transformers_are_refused(transformers_folder, tmp_path):
    for path in transformers_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(CLIPModel.from_pretrained(transformers_folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="transformers cannot load it.*safetensors"):
        next(load_any(str(tmp_path)))
