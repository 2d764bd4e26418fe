"""``protoclip_scale.load`` on runs, and ``python -m protoclip_scale.classify``."""

import io
import json
import subprocess
import sys

import pytest
import torch

import protoclip_scale
from protoclip_scale import classify
from protoclip_scale.engine import checkpoint
from protoclip_scale.errors import UserError
from protoclip_scale.export.source import source_of_model
from protoclip_scale.export.writing import export
from protoclip_scale.models.build import build_model
from protoclip_scale.recipe import dump, load_recipe
from tests.exports import pairs
from tests.support import RECIPES, ROOT, TINY

TEXTS = ["a red heart", "a dog", "a flag of France"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with two checkpoints, and an export of the second one's model."""
    recipe = load_recipe(RECIPES / "demo_clip.yaml", TINY)
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(dump(recipe))
    for step in (4, 8):
        model = build_model(recipe, frozenset({"image", "text", "logit_scale"}), seed=step).eval()
        about = checkpoint.describe(checkpoint.Cursor(0, "train", 0, step), samples=0, attempt=1)
        tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        checkpoint.save(checkpoint.folder_of(folder, step), checkpoint.replicated_pieces(tensors), about, lambda: None)
    export(source_of_model(model, recipe.model), "open_clip", folder / "export")
    return folder, model


def test_runs_and_exports_are_loaded_alike(run):
    folder, live = run
    model, exported, older = protoclip_scale.load(folder), protoclip_scale.load(folder / "export"), protoclip_scale.load(folder, "4")
    pictures = pairs()[0][:70]  # more than a batch
    with torch.no_grad():
        expected = live.encode_image(torch.stack([model.preprocess(picture) for picture in pictures]))
        ids, lengths = model.tokenize(TEXTS)
        expected_text = live.encode_text(ids, lengths)
    assert ids.shape == (3, 16) and lengths.tolist() == [5, 4, 6]
    for each in (model, exported):
        assert (each.encode_image(pictures) - expected).abs().max() < 1e-6 and (each.encode_text(TEXTS) - expected_text).abs().max() < 1e-6
    assert (older.encode_text(TEXTS) - expected_text).abs().max() > 1e-3
    assert model.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)


def test_every_kind_of_picture_gives_the_same(run, tmp_path):
    model = protoclip_scale.load(run[0] / "export")
    picture = pairs()[0][3]
    picture.save(tmp_path / "photo.png")
    data = (tmp_path / "photo.png").read_bytes()
    expected = model.encode_image(picture)
    assert expected.shape == (1, 32) and expected.norm().item() == pytest.approx(1, abs=1e-5)
    for same in (tmp_path / "photo.png", str(tmp_path / "photo.png"), data, model.preprocess(data), [picture], model.preprocess(picture)[None]):
        assert torch.equal(model.encode_image(same), expected)
    assert model.encode_image([]).shape == (0, 32) and model.encode_text("one text").shape == (1, 32)
    with pytest.raises(UserError, match="cannot be read as a picture"):
        model.encode_image(b"no picture")


def test_classify_prints_the_most_similar_labels(run, tmp_path, capsys):
    folder = run[0] / "export"
    pairs()[0][3].save(tmp_path / "photo.png")
    model = protoclip_scale.load(folder)
    templates = ["a photo of a {}.", "{}"]
    labels = ["red heart", "dog", "flag"]
    texts = torch.stack([model.encode_text([template.replace("{}", label) for template in templates]).mean(0) for label in labels])
    cosines = (model.encode_image(tmp_path / "photo.png") @ (texts / texts.norm(dim=-1, keepdim=True)).T)[0]
    template_arguments = [argument for template in templates for argument in ("--template", template)]
    assert classify.main([str(folder), str(tmp_path / "photo.png"), "--classes", "red heart, dog,flag,dog", *template_arguments, "--top", "2"]) == 0
    name, *lines = capsys.readouterr().out.splitlines()
    assert name.endswith("photo.png") and len(lines) == 2
    order = cosines.argsort(descending=True).tolist()
    assert [line.split(maxsplit=2)[2] for line in lines] == [labels[place] for place in order[:2]]
    shares = (cosines * model.logit_scale).softmax(0)
    assert [line.split()[0] for line in lines] == [f"{shares[place]:.1%}" for place in order[:2]]
    (tmp_path / "labels.txt").write_text("red heart\n\ndog\nflag\n")
    assert classify.main([str(folder), str(tmp_path / "photo.png"), "--classes", str(tmp_path / "labels.txt")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}/nothing", "photo.png", "--classes", "a,b"], "does not exist; name a folder"),
        (["{run}/checkpoints", "photo.png", "--classes", "a,b"], "is neither an export nor a run directory"),
        (["{run}/export", "missing.png", "--classes", "a,b"], "missing.png cannot be read as a picture"),
        (["{run}/export", "photo.png", "--classes", " , "], "it names no label"),
        (["{run}/export", "photo.png", "--classes", "a", "--template", "a photo"], "has no {} for the label"),
        (["{run}/export", "photo.png", "--classes", "a", "--top", "0"], "must be at least 1"),
    ],
)
def test_mistakes_are_told_in_one_line(run, capsys, arguments, words):
    assert classify.main([argument.replace("{run}", str(run[0])) for argument in arguments]) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_importing_the_package_is_light():
    code = "import sys, protoclip_scale; print(json.dumps([name for name in ('torch', 'transformers', 'timm', 'PIL', 'numpy') if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"import json; {code}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.load(io.StringIO(done.stdout)) == []
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        protoclip_scale.nothing  # noqa: B018
