"""The side file of an export: what FILIP's heads make of towers in a fresh load, the card that says so, and damage that is told."""

import contextlib
import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast, T5Config

import protoclip_scale
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.engine.trainer import Trainer
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.models import load_any
from protoclip_scale.export.card import Facts, write_card
from protoclip_scale.export.source import source_of_model
from protoclip_scale.export.token_heads import FILE, TokenFacts, read_facts, token_heads_of
from protoclip_scale.export.writing import Extras, export, verify
from protoclip_scale.models.build import build_model
from protoclip_scale.objectives import build_objectives, features_of, heads_of
from protoclip_scale.objectives.compared import Compared, compared_by
from protoclip_scale.recipe import dump, load_recipe
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
    source = source_of_model(model, recipe.model, tokens=token_heads_of(recipe))
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
    assert loaded.late_interaction(images, loaded.encode_text_tokens([])).shape == (70, 0) and loaded.late_interaction(loaded.encode_image_tokens([]), texts).shape == (0, 70)
    row, text = images[2], texts[5][(texts[5] != 0).any(-1)]
    assert of_images[2, 5].item() == pytest.approx((row @ text.T).amax(1).mean().item(), abs=1e-6)
    assert of_texts[5, 2].item() == pytest.approx((text @ row.T).amax(1).mean().item(), abs=1e-6)
    assert loaded.compared == Compared(False, KINDS) == next(load_any(str(folder))).compared


def started(recipe, folder, *values):
    """The model of a trainer with ``model.init_from`` an export."""
    (file := folder.parent / "again.yaml").write_text(dump(recipe))
    recipe = load_recipe(file, ("run.seed=9", f"model.init_from={folder}", *values))
    strategy = SimpleNamespace(release=lambda: None, whole=True, device=torch.device("cpu"), optimizers=(recipe.optim.name,))
    strategy.prepare = lambda model, *_: setattr(strategy, "bare_model", model)
    Trainer(recipe, strategy, build_objectives(recipe), None).build(0)
    return strategy.bare_model


def assert_starts_alike(recipe, model, folder):
    found, expected = started(recipe, folder).state_dict(), model.state_dict()
    names = [name for name in expected if name.startswith("filip_")]
    assert len(names) == 5 and all(torch.equal(found[name], expected[name]) for name in names if name != "filip_scale_head.log")
    assert found["filip_scale_head.log"].tolist() == pytest.approx([4.60517])  # as it was used


def test_a_run_that_starts_from_an_export_goes_on_with_its_heads(exported):
    recipe, model, folder = exported
    assert_starts_alike(recipe, model, folder)
    with pytest.raises(UserError, match=r"filip_image_head.linear.weight is \[16, 96\] there and \[8, 96\] here \(4 such\); give that head the widths of the source") as caught:
        started(recipe, folder, "objectives.filip.dim=8")
    assert "\n" not in str(caught.value)


def test_heads_that_a_run_has_not_are_not_read(exported, tmp_path):
    recipe, _, folder = exported
    (tmp_path / "export").mkdir()
    for path in folder.iterdir():
        (tmp_path / "export" / path.name).symlink_to(path)
    (tmp_path / "export" / FILE).unlink()
    (tmp_path / "export" / FILE).write_text("damaged")
    started(recipe, tmp_path / "export", "objectives={clip: {}}")
    with pytest.raises(UserError, match="is no file of token heads"):
        started(recipe, tmp_path / "export")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_in_either_layout_with_other_settings(tmp_path, layout):
    recipe, model, folder = written(tmp_path, "objectives.clip.weight=1", "objectives.filip.special_tokens=false", "model.text.mask_token=true", layout=layout)
    loaded, (_, texts) = assert_loads_alike(recipe, model, folder)
    assert loaded.compared == Compared(True, KINDS) == next(load_any(str(folder))).compared
    assert not texts[:, 0].any()  # the start token
    assert_starts_alike(recipe, model, folder)
    assert "by tokens" in (folder / "README.md").read_text() and "not trained" not in (folder / "README.md").read_text()


def without_a_start(folder, config):
    """A text encoder whose texts have an end and no start, as T5's."""
    backend = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "[END]": 2, "a": 3, "red": 4, "car": 5}, "[UNK]"))
    backend.pre_tokenizer, backend.post_processor = Whitespace(), TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 2)])
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]", model_max_length=8).save_pretrained(folder)
    AutoModel.from_config(config).save_pretrained(folder)
    return f"model.text={{name: {folder}, context_length: 8}}"


def assert_counts(recipe, model, special_tokens):
    tokens = model(None, *tokenizer_for(recipe.text)(["a red car", "car", ""]), wants=frozenset(KINDS[1:]))["filip_text"]
    assert (tokens != 0).any(-1).sum(1).tolist() == ([4, 2, 1] if special_tokens else [3, 1, 1]) and tokens[:, 0].any(-1).all()


@pytest.mark.parametrize("special_tokens", [False, True])
def test_an_encoder_without_a_start_token_keeps_its_first_word(tmp_path, special_tokens):
    values = "model.image.size=64", f"objectives.filip.special_tokens={str(special_tokens).lower()}"
    sizes = {"vocab_size": 6, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    recipe = load_recipe(RECIPES / "demo_filip.yaml", (*TINY, *values, without_a_start(tmp_path / "t5", T5Config(**sizes))))
    objectives = build_objectives(recipe)
    assert_counts(recipe.model, build_model(recipe, features_of(objectives), 3, heads=heads_of(objectives)).eval(), special_tokens)
    bert = BertConfig(vocab_size=6, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_position_embeddings=8)
    _, _, folder = written(tmp_path, *values, without_a_start(tmp_path / "bert", bert), layout="transformers")
    loaded = protoclip_scale.load(folder)
    assert_counts(loaded.settings, loaded.model, special_tokens)


def test_the_file_is_listed_and_compared_and_says_what_it_is(exported, tmp_path):
    recipe, model, folder = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"][FILE]["bytes"] == (folder / FILE).stat().st_size
    with safe_open(folder / FILE, "pt") as file:
        assert file.metadata() == {"format": "pt", "special_tokens": "true", "embeddings": "false"}
        assert set(file.keys()) == {"image.weight", "image.bias", "text.weight", "text.bias", "logit_scale"}
    assert read_facts(folder / FILE) == TokenFacts(special_tokens=True, embeddings=False)
    source = source_of_model(model, recipe.model, tokens=token_heads_of(recipe))
    verify(source, folder)
    bias = model.filip_text_head.linear.bias.detach().clone()
    with torch.no_grad():
        model.filip_text_head.linear.bias[3] += 1
    with pytest.raises(UserError, match=r"token_heads.safetensors: text.bias differs from the model's"):
        verify(source, folder)
    with torch.no_grad():
        model.filip_text_head.linear.bias.copy_(bias)
    with pytest.raises(UserError, match="what it says of its tokens is not so in the model"):
        verify(source._replace(tokens=source.tokens._replace(facts=TokenFacts(False, False))), folder)


def test_the_card_warns_of_embeddings_and_its_code_runs(exported):
    """A model of tokens alone: no line for libraries that would compare its embeddings."""
    _, _, folder = exported
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "were not trained and mean nothing" in card and "late interaction" in card
    assert "library_name: protoclip-scale" in card and "pipeline_tag" not in card
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
        (lambda tensors, about: tensors.update({"image.bias": torch.tensor(0.0)}), r"image.bias is float32 \[\], not a vector of floats"),
        (lambda tensors, about: tensors.update({"text.weight": torch.zeros(16)}), r"text.weight is float32 \[16\], not a matrix of floats"),
        (lambda tensors, about: tensors.update({"image.weight": torch.zeros(16, 96, dtype=torch.int64)}), r"image.weight is int64 \[16, 96\], not a matrix of floats"),
        (lambda tensors, about: tensors.update({"logit_scale": torch.zeros(2)}), r"logit_scale is float32 \[2\], not a float"),
        (lambda tensors, about: tensors.update({"logit_scale": torch.tensor(torch.nan)}), "logit_scale holds what is no finite number"),
        (lambda tensors, about: tensors.update({"logit_scale": torch.tensor(1e30)}), "logit_scale holds what is no finite number"),
        (lambda tensors, about: tensors["text.bias"].fill_(torch.inf), "text.bias holds what is no finite number"),
        (lambda tensors, about: tensors.update({"image.bias": torch.zeros(10**6)}), r"image.weight has 16, image.bias has 1000000, text.weight has 16, text.bias has 16 rows"),
        (lambda tensors, about: tensors.update({name: tensor[:8] for name, tensor in tensors.items() if name.startswith("text.")}), r"image.bias has 16, text.weight has 8, text.bias has 8 rows"),
        (lambda tensors, about: tensors.update({name: tensor[:0] for name, tensor in tensors.items() if tensor.dim()}), r"image.weight is float32 \[0, 96\], not a matrix"),
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
