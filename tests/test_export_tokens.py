"""The side file of an export: what FILIP's heads make of towers in a fresh load, the card that says so, and damage that is told."""

import contextlib
import io
import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import protoclip_scale
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.models import load_any
from protoclip_scale.export.card import Facts, write_card
from protoclip_scale.export.source import source_of_model
from protoclip_scale.export.writing import Extras, export, verify
from protoclip_scale.models.build import build_model
from protoclip_scale.objectives import build_objectives, features_of, heads_of
from protoclip_scale.objectives.compared import Compared, compared_by
from protoclip_scale.objectives.token_heads import FILE, TokenHeads, read_facts, token_heads_of
from protoclip_scale.recipe import load_recipe
from tests.exports import pairs
from tests.support import RECIPES, TINY

KINDS = ("filip_image", "filip_text")


def written(folder, *values, layout="open_clip", dtype="float32"):
    """A recipe, its model with weights that nobody draws, and their export with a card."""
    recipe = load_recipe(RECIPES / "demo_filip.yaml", (*TINY, "model.image.size=64", "objectives.filip.dim=16", *values))
    objectives = build_objectives(recipe)
    model = build_model(recipe, features_of(objectives), 3, heads=heads_of(objectives)).eval()
    with torch.no_grad():
        model.filip_scale_head.log.fill_(7.0)  # beyond its bound
    facts = Facts("filip", "mit", recipe.model, "live", [], {}, {}, {}, ("filip",), {}, "", None, compared_by(recipe))
    source = source_of_model(model, recipe.model, token_heads_of(recipe))
    return recipe, model, export(source, layout, folder / "export", dtype, Extras(lambda name, draft: write_card(facts, name, draft)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return written(tmp_path_factory.mktemp("tokens"))


@torch.no_grad()
def assert_loads_alike(recipe, model, folder, tolerance=1e-5):
    loaded, (pictures, captions) = protoclip_scale.load(folder), pairs()
    pictures, captions = pictures[:70], captions[:70]  # more than a batch
    images = model(torch.stack([loaded.preprocess(each) for each in pictures]), wants=frozenset(KINDS[:1]))["filip_image"]
    texts = model(None, *tokenizer_for(recipe.model.text)(captions), wants=frozenset(KINDS[1:]))["filip_text"]
    found = loaded.encode_image_tokens(pictures), loaded.encode_text_tokens(captions)
    assert found[0].shape == (70, 4, 16) and found[1].shape == (70, 16, 16) and images.std(0).mean() > 1e-3 and texts[:, 1:3].std(0).mean() > 1e-3
    assert max((one - other).abs().max().item() for one, other in zip(found, (images, texts), strict=True)) <= tolerance
    assert loaded.token_scale == pytest.approx(100) and loaded.encode_image_tokens([]).shape == (0, 1, 16)
    return loaded, found


def test_a_fresh_load_gives_the_live_models_tokens(exported):
    recipe, model, folder = exported
    loaded, (images, texts) = assert_loads_alike(recipe, model, folder)
    of_images, of_texts = loaded.late_interaction(images, texts), loaded.late_interaction(texts, images)
    row, text = images[2], texts[5][(texts[5] != 0).any(-1)]
    assert of_images[2, 5].item() == pytest.approx((row @ text.T).amax(1).mean().item(), abs=1e-6)
    assert of_texts[5, 2].item() == pytest.approx((text @ row.T).amax(1).mean().item(), abs=1e-6)
    assert loaded.compared == Compared(False, KINDS) == next(load_any(str(folder))).compared


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_in_either_layout_with_other_settings(tmp_path, layout):
    recipe, model, folder = written(tmp_path, "objectives.clip.weight=1", "objectives.filip.special_tokens=false", "model.text.mask_token=true", layout=layout)
    loaded, (_, texts) = assert_loads_alike(recipe, model, folder)
    assert loaded.compared == Compared(True, KINDS) == next(load_any(str(folder))).compared
    assert not texts[:, 0].any()  # the start token
    assert "by tokens" in (folder / "README.md").read_text() and "not trained" not in (folder / "README.md").read_text()


def test_the_file_is_listed_and_compared_and_says_what_it_is(exported, tmp_path):
    recipe, model, folder = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"][FILE]["bytes"] == (folder / FILE).stat().st_size
    with safe_open(folder / FILE, "pt") as file:
        assert file.metadata() == {"format": "pt", "special_tokens": "true", "embeddings": "false"}
        assert set(file.keys()) == {"image.weight", "image.bias", "text.weight", "text.bias", "logit_scale"}
    assert read_facts(folder / FILE) == TokenHeads(special_tokens=True, embeddings=False)
    source = source_of_model(model, recipe.model, token_heads_of(recipe))
    verify(source, folder)
    bias = model.filip_text_head.linear.bias.detach().clone()
    with torch.no_grad():
        model.filip_text_head.linear.bias[3] += 1
    with pytest.raises(UserError, match=r"token_heads.safetensors: text.bias differs from the model's"):
        verify(source, folder)
    with torch.no_grad():
        model.filip_text_head.linear.bias.copy_(bias)
    with pytest.raises(UserError, match="what it says of its tokens is not so in the model"):
        verify(source._replace(tokens=TokenHeads(False, False)), folder)


def test_the_card_warns_of_embeddings_and_its_code_runs(exported):
    """A model of tokens alone: no line for libraries that would compare its embeddings."""
    _, _, folder = exported
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "were not trained and mean nothing" in card and "late interaction" in card
    pairs()[0][5].save(folder.parent / "photo.jpg", quality=95)
    loaded = protoclip_scale.load(folder)
    expected = loaded.late_interaction(loaded.encode_image_tokens(folder.parent / "photo.jpg"), loaded.encode_text_tokens(["a cat", "a red car"]))[0].tolist()
    printed = io.StringIO()
    with contextlib.chdir(folder.parent), contextlib.redirect_stdout(printed):
        exec(compile(code.replace('folder = "."', 'folder = "export"'), "card", "exec"), {})
    assert eval(printed.getvalue()) == pytest.approx(dict(zip(["a cat", "a red car"], expected, strict=True)), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, about: tensors.pop("image.bias"), "is no file of token heads"),
        (lambda tensors, about: about.pop("special_tokens"), "is no file of token heads"),
        (lambda tensors, about: about.update(embeddings="perhaps"), "is no file of token heads"),
        (lambda tensors, about: tensors.update({"text.weight": torch.zeros(16, 5)}), r"text.weight is \[16, 5\], but these towers need \[16, 32\]"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(exported, tmp_path, change, message):
    folder = exported[2]
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    tensors, about = load_file(folder / FILE), {"format": "pt", "special_tokens": "true", "embeddings": "false"}
    change(tensors, about)
    (tmp_path / FILE).unlink()
    save_file(tensors, tmp_path / FILE, metadata=about)
    with pytest.raises(UserError, match=message) as caught:
        protoclip_scale.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_without_tokens_says_so(exported, tmp_path):
    folder = exported[2]
    for path in folder.iterdir():
        if path.name != FILE:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match="no token features"):
        protoclip_scale.load(tmp_path).encode_text_tokens("a cat")
