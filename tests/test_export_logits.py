"""Temperature and bias of an export are those that the losses train."""

import json

import open_clip
import pytest
import torch

import protoclip_scale
from protoclip_scale import classify
from protoclip_scale.errors import UserError
from protoclip_scale.export.logits import Logits, logits_of
from protoclip_scale.export.source import source_of_model
from protoclip_scale.export.writing import export, verify
from protoclip_scale.models.build import build_model
from protoclip_scale.objectives import build_objectives, features_of, heads_of
from protoclip_scale.recipe import load_recipe
from tests.exports import pairs
from tests.support import RECIPES, TINY


def trained(*values):
    """A recipe and its model, with temperatures and a bias that nobody starts with."""
    recipe = load_recipe(RECIPES / "demo_siglip.yaml", (*TINY, *values))
    objectives = build_objectives(recipe)
    model = build_model(recipe, features_of(objectives), 3, heads=heads_of(objectives)).eval()
    with torch.no_grad():
        model.siglip_scale_head.log.fill_(4.0)
        model.siglip_bias_head.value.fill_(-7.25)
        model.logit_scale.log.fill_(3.0)
    return recipe, model


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_open_clip_has_the_sigmoid_losss_temperature_and_bias(tmp_path, dtype):
    recipe, model = trained()
    source = source_of_model(model, recipe.model, logits_of(recipe))
    folder = export(source, "open_clip", tmp_path / "export", dtype)
    verify(source, folder)
    theirs = open_clip.create_model(f"local-dir:{folder}")
    assert (theirs.logit_scale.item(), theirs.logit_bias.item()) == (4.0, -7.25)
    ours = protoclip_scale.load(folder)
    assert (ours.logit_scale, ours.logit_bias) == (pytest.approx(54.59815), -7.25)
    with pytest.raises(UserError, match="logit_bias in manifest.json is not the model's"):
        verify(source._replace(logits=Logits(source.logits.scale)), folder)


def test_transformers_has_the_temperature_and_the_manifest_the_bias(tmp_path, capsys):
    recipe, model = trained()
    folder = export(source_of_model(model, recipe.model, logits_of(recipe)), "transformers", tmp_path / "export")
    ours, (pictures, captions) = protoclip_scale.load(folder), pairs()
    assert (ours.logit_scale, ours.logit_bias) == (pytest.approx(54.59815), -7.25)
    pictures[3].save(tmp_path / "photo.png")
    assert classify.main([str(folder), str(tmp_path / "photo.png"), "--classes", ",".join(captions[:2])]) == 0
    expected = (54.59815 * ours.encode_image(tmp_path / "photo.png") @ ours.encode_text(captions[:2]).T - 7.25).sigmoid()[0]
    shown = sorted(float(line.split("%")[0]) for line in capsys.readouterr().out.splitlines()[1:])
    assert shown == pytest.approx(sorted((100 * expected).tolist()), abs=0.06)


def test_clips_own_where_it_trains_too(tmp_path):
    recipe, model = trained("objectives.clip.weight=1")
    folder = export(source_of_model(model, recipe.model, logits_of(recipe)), "open_clip", tmp_path / "export")
    ours = protoclip_scale.load(folder)
    assert (ours.logit_scale, ours.logit_bias) == (pytest.approx(20.0855, rel=1e-5), None)
    assert "init_logit_bias" not in json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
