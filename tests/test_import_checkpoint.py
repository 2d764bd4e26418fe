"""tools/import_checkpoint.py on generated files of the published layouts: the export gives what the original model computes."""

import argparse
import pickle
import runpy
import zipfile
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import protoclip_scale
from protoclip_scale.data.tokenizers import ClipTokenizer
from protoclip_scale.models import published
from tests.support import ROOT

TEXT = {"context_length": 16, "vocab_size": 49_408, "width": 64, "heads": 1, "layers": 2}
CAPTIONS = ["a red fox in the snow", "two chairs", "a flag"]
VIT = {"image_size": 224, "layers": 10, "width": 256, "head_width": 64, "patch_size": 16}  # timm's vit_xsmall_patch16_clip_224
RESNET = {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None}


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(ROOT / "tools" / "import_checkpoint.py"), run_name="tool")["main"]


def noise(model: torch.nn.Module) -> torch.nn.Module:
    """Small random weights everywhere, so that nothing (zero gains, zero biases) is left out by chance."""
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.02)
    return model.eval()


def clip(vision: dict, quick_gelu: bool, embed_dim: int = 24) -> torch.nn.Module:
    """OpenAI's model definition as open_clip keeps it: the names are the same."""
    model = noise(open_clip.CLIP(embed_dim, vision, TEXT, quick_gelu=quick_gelu))
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0  # statistics of one batch, else a random ResNet sees all images alike
    with torch.no_grad():
        model.train().encode_image(torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(3)))
        model.logit_scale.fill_(3.0)
    return model.eval()


def save_archive(module: torch.nn.Module, path: Path) -> None:
    """As OpenAI published: a traced program with weights in float16."""
    traced = torch.jit.trace(module, (torch.zeros(1, 3, 224, 224), torch.zeros(1, 16, dtype=torch.long)), check_trace=False)
    torch.jit.save(traced.half(), path)


def distributed(state: dict) -> dict:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def assert_imported(out: Path, their_image, their_text, size: int, normalization: str) -> protoclip_scale.Encoder:
    model = protoclip_scale.load(out)
    assert model.settings.image.size == size and model.settings.image.normalization == normalization
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_image, expected_text = F.normalize(their_image(images), dim=-1), F.normalize(their_text(ClipTokenizer(16)(CAPTIONS).ids), dim=-1)
        torch.testing.assert_close(model.model.encode_image(images), expected_image, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.encode_text(CAPTIONS), expected_text, rtol=0, atol=1e-5)
    assert expected_image.std(0).mean() > 1e-3 and expected_text.std(0).mean() > 1e-3
    return model


def test_openai_and_open_clip(tool, tmp_path):
    """A TorchScript archive with weights in float16, as OpenAI's are; and open_clip's training checkpoint, as safetensors. CLIP's ResNet has a bias behind its pool."""
    theirs = clip(RESNET, quick_gelu=True)
    for name, number in (("input_resolution", 224), ("context_length", 16), ("vocab_size", 49_408)):
        vars(theirs).pop(name, None)  # a plain number of open_clip's
        theirs.register_buffer(name, torch.tensor(number))
    save_archive(theirs, tmp_path / "RN50.pt")
    theirs.half().float()
    assert tool([str(tmp_path / "RN50.pt"), "--family", "openai", "--out", str(tmp_path / "rn50")]) == 0
    model = assert_imported(tmp_path / "rn50", theirs.encode_image, theirs.encode_text, 224, "clip")
    assert model.settings.image.name == "resnet50_clip" and model.settings.text.activation == "quick_gelu"
    assert model.model.image_projection.bias is None and theirs.visual.attnpool.c_proj.bias.abs().max() > 0.01
    theirs = clip(VIT, quick_gelu=False)
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    assert tool([str(tmp_path / "vit.safetensors"), "--family", "open_clip", "--out", str(tmp_path / "vit"), "--layout", "transformers", "--license", "mit"]) == 0
    model = assert_imported(tmp_path / "vit", theirs.encode_image, theirs.encode_text, 224, "clip")
    assert model.settings.image.name == "vit_xsmall_patch16_clip_224" and '"CLIPModel"' in (tmp_path / "vit" / "config.json").read_text()
    assert "license: mit" in (tmp_path / "vit" / "README.md").read_text()


def test_protoclip(tool, tmp_path):
    theirs = clip(VIT, quick_gelu=False)
    heads = {f"{side}_projection_head.{layer}.weight": torch.randn(8, 8) for side in ("image", "text") for layer in (0, 1, 3)}
    state = distributed(theirs.state_dict() | heads | {"logit_scale_proto": torch.tensor(2.0)})
    torch.save({"epoch": 8, "name": "x", "state_dict": state, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}}, tmp_path / "epoch_8.pt")
    assert tool([str(tmp_path / "epoch_8.pt"), "--family", "protoclip", "--activation", "gelu", "--out", str(tmp_path / "out")]) == 0
    assert_imported(tmp_path / "out", theirs.encode_image, theirs.encode_text, 224, "clip")


def test_slip(tool, tmp_path, monkeypatch):
    """timm's plain vision transformer with a projection of its own; heads of the self-supervised part; arguments as a Namespace."""
    trunk, text = noise(timm.create_model("test_vit", num_classes=0)), clip({**VIT, "layers": 1}, quick_gelu=True)
    projection = torch.randn(trunk.num_features, 24, generator=torch.Generator().manual_seed(1))
    own = {name: tensor for name, tensor in text.state_dict().items() if not name.startswith("visual.")}
    state = own | {f"visual.{name}": tensor for name, tensor in trunk.state_dict().items()} | {"image_projection": projection, "image_mlp.layer1.weight": torch.ones(2, 2)}
    torch.save({"epoch": 25, "state_dict": distributed(state), "args": argparse.Namespace(model="SLIP_VITB16", lr=3e-3)}, tmp_path / "slip.pt")
    assert tool([str(tmp_path / "slip.pt"), "--family", "slip", "--out", str(tmp_path / "refused")]) == 1  # the table has SLIP's own sizes
    monkeypatch.setitem(published._SLIP_VITS, (trunk.embed_dim, len(trunk.blocks)), "test_vit")
    assert tool([str(tmp_path / "slip.pt"), "--family", "slip", "--out", str(tmp_path / "out")]) == 0
    model = assert_imported(tmp_path / "out", lambda images: trunk(images) @ projection, text.encode_text, 160, "imagenet")
    assert model.settings.text.activation == "quick_gelu"


def test_declip(tool, tmp_path, capsys):
    """Text below encode_text, a vocabulary with a mask token, a text projection with a bias, a temperature of shape (1,)."""
    theirs = clip(VIT, quick_gelu=False)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(2)) * 0.3
    state = {}
    for name, tensor in theirs.state_dict().items():
        place = name if name.startswith("visual.") or name == "logit_scale" else f"encode_text.{name}"
        state[place] = tensor
    table = state.pop("encode_text.token_embedding.weight")
    state["encode_text.token_embedding.weight"] = torch.cat((table[:-2], torch.ones(1, table.shape[1]), table[-2:]))
    state["encode_text.text_projection.weight"], state["encode_text.text_projection.bias"] = state.pop("encode_text.text_projection").T, bias
    state |= {"logit_scale": torch.tensor([3.0]), "projector.linear1.weight": torch.ones(2, 2), "predictor_text.layer2.bias": torch.ones(2), "nn_replacer_img.bank": torch.ones(2)}
    torch.save({"model": distributed(state), "optimizer": {}, "last_iter": 5}, tmp_path / "declip.pth.tar")
    arguments = [str(tmp_path / "declip.pth.tar"), "--family", "declip", "--activation", "gelu"]
    assert tool([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert_imported(tmp_path / "out", theirs.encode_image, lambda ids: theirs.encode_text(ids) + bias, 224, "imagenet")
    # where the embedding is wider than the tower, no change of its inputs gives the bias
    wide = clip(VIT, quick_gelu=False, embed_dim=80)
    state["visual.proj"], state["encode_text.text_projection.weight"], state["encode_text.text_projection.bias"] = wide.visual.proj.data, wide.text_projection.data.T, torch.randn(80)
    torch.save({"model": distributed(state)}, tmp_path / "declip.pth.tar")
    capsys.readouterr()
    assert tool([*arguments, "--out", str(tmp_path / "wide")]) == 1
    assert "has a bias that 64 inputs cannot replace" in capsys.readouterr().err


def test_what_cannot_be_read_is_told_in_one_line(tool, tmp_path, capsys):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "archive.pt"))
    with zipfile.ZipFile(tmp_path / "archive.pt") as whole, zipfile.ZipFile(tmp_path / "program.pt", "w") as changed:
        for name in whole.namelist():
            changed.writestr(name, pickle.dumps(Path("x")) if name.endswith("/data.pkl") else whole.read(name))
    with zipfile.ZipFile(tmp_path / "archive.pt") as whole, zipfile.ZipFile(tmp_path / "lacking.pt", "w") as lacking, zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
            if not name.endswith("/data.pkl"):
                lacking.writestr(name, whole.read(name))
    torch.save({"state_dict": {}, "path": Path("x")}, tmp_path / "objects.pt")
    torch.save({"state_dict": {"weight": torch.ones(2)}}, tmp_path / "other.pt")
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:300])
    cases = {
        "archive.pt": ("openai", "the image tower is neither CLIP's vision transformer nor its ResNet"),
        "lacking.pt": ("openai", "TorchScript archive that cannot be read ("),
        "packed.pt": ("openai", "data.pkl is compressed, which torch does not do"),
        "program.pt": ("openai", "TorchScript archive that cannot be read (it holds pathlib."),
        "objects.pt": ("slip", "holds objects of pathlib."),
        "other.pt": ("openai", "the image tower is neither CLIP's vision transformer nor its ResNet"),
        "empty.pt": ("declip", "holds no weights: it has epoch"),
        "torn.pt": ("declip", "cannot be read"),
        "missing.pt": ("declip", "does not exist"),
    }
    for name, (family, words) in cases.items():
        assert tool([str(tmp_path / name), "--family", family, "--out", str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and words in said, said
    assert not (tmp_path / "out").exists()
