"""The dual encoder: temperatures, heads, idle parts, freezing, optimiser groups."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from protoclip_scale.models.dual_encoder import FEATURES, DualEncoder, ParameterGroup
from protoclip_scale.models.heads import MlpHead
from protoclip_scale.models.scale import LogitScale
from protoclip_scale.recipe import schema

CLIP = frozenset({"image", "text", "logit_scale"})
SETTINGS = schema.Model(
    embed_dim=16,
    image={"name": "test_resnet", "size": 32},
    text={"width": 32, "heads": 2, "layers": 1, "context_length": 12},
    prototype_heads={"dim": 8, "hidden_dim": 24},
)


def build(features=FEATURES, settings=SETTINGS) -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(settings, features)


def batch(rows: int = 6):
    draws = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 13, (rows,), generator=draws)
    return torch.randint(0, 256, (rows, 3, 32, 32), generator=draws, dtype=torch.uint8), torch.randint(1, 49_000, (rows, 12), generator=draws), lengths


# --- temperature


@pytest.mark.parametrize(
    ("log", "value", "inside_gradient", "outside_gradient"),
    [(6.0, 100.0, 100.0, 0.0), (-1.0, 1.0, 0.0, -1.0), (2.0, math.exp(2), math.exp(2), -math.exp(2)), (math.log(100), 100.0, 100.0, -100.0)],
)
def test_scale_is_bounded_and_only_gradients_back_inside_pass(log, value, inside_gradient, outside_gradient):
    """Columns: gradient at the logarithm of a loss that wants a smaller scale, and of one that wants a larger one."""
    for sign, expected in ((1.0, inside_gradient), (-1.0, outside_gradient)):
        scale = LogitScale(schema.LogitScale())
        with torch.no_grad():
            scale.log.fill_(log)
        output = scale()
        (sign * output).sum().backward()
        assert output.shape == scale.log.shape == (1,) and output.item() == pytest.approx(value, rel=1e-6)
        assert scale.log.grad.item() == pytest.approx(expected, rel=1e-6)


def test_scale_comes_back_from_outside_by_descent():
    scale = LogitScale(schema.LogitScale())
    with torch.no_grad():
        scale.log.fill_(6.0)
    optimizer = torch.optim.SGD(scale.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        scale().sum().backward()
        optimizer.step()
    assert scale.log.item() < math.log(100)


# --- features


def test_features_are_unit_fp32_rows_also_under_autocast():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(*batch(), wants=FEATURES)
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "image": (6, 16), "text": (6, 16), "image_prototype": (6, 8), "text_prototype": (6, 8), "logit_scale": (1,), "prototype_scale": (1,),
    }  # fmt: skip
    for name in ("image", "text", "image_prototype", "text_prototype"):
        assert outputs[name].dtype == torch.float32
        torch.testing.assert_close(outputs[name].norm(dim=-1), torch.ones(6), rtol=1e-6, atol=1e-6)


def test_forward_equals_the_slow_twin_and_the_encode_functions():
    model = build().double().eval()
    images, ids, lengths = batch()
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (images.double() / 255 - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)
    image = model.image_tower.trunk(pixels) @ model.image_projection.weight.T
    text = model.text_tower(ids, lengths).pooled @ model.text_projection.weight.T
    expected = {
        "image": image / image.norm(dim=1, keepdim=True),
        "text": text / text.norm(dim=1, keepdim=True),
        "image_prototype": F.normalize(model.image_prototype_head(image), dim=1),  # of the un-normalised outputs
        "text_prototype": F.normalize(model.text_prototype_head(text), dim=1),
    }
    outputs = model(images, ids, lengths, wants=FEATURES)
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, rtol=1e-5, atol=1e-7)  # the statistics are fp32 constants
    assert torch.equal(model.encode_image(images), outputs["image"]) and torch.equal(model.encode_text(ids, lengths), outputs["text"])
    assert torch.equal(model.encode_image(model.normalize_images(images)), outputs["image"])  # floats are normalised already


def test_heads_start_alike_and_towers_do_not_depend_on_them():
    with_heads, without = build(), build(CLIP)
    twin = with_heads.text_prototype_head.state_dict()
    assert all(torch.equal(value, twin[name]) for name, value in with_heads.image_prototype_head.state_dict().items())
    assert with_heads.image_prototype_head.layers[0].weight is not with_heads.text_prototype_head.layers[0].weight
    state = with_heads.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in without.state_dict().items())
    assert not any("prototype" in name for name in without.state_dict())


@pytest.mark.parametrize(("hidden_layers", "shapes"), [(0, [(8, 16)]), (1, [(24, 16), (24,), (8, 24)]), (2, [(24, 16), (24,), (24, 24), (24,), (8, 24)])])
def test_head_layers(hidden_layers, shapes):
    head = MlpHead(16, 24, hidden_layers, 8, groups=2)
    assert [tuple(value.shape) for name, value in head.named_parameters() if name.endswith("weight")] == shapes
    assert [layer.groups for layer in head.layers if hasattr(layer, "groups")] == [2] * hidden_layers


# --- parts that are not wanted


def test_idle_parts_get_no_gradient_and_change_no_other():
    model = build()
    idle = set(model.head_parameters({"image_prototype", "text_prototype", "prototype_scale"}))
    assert idle and all(("prototype" in name) == (name in idle) for name, _ in model.named_parameters())
    model.train_only(frozenset(name for name, _ in model.named_parameters()) - idle)
    outputs = model(*batch(), wants=CLIP, records=frozenset({"image_prototype"}))  # recorded, though its head does not train
    bare = build(CLIP)
    expected = bare(*batch(), wants=CLIP)
    for pair in (outputs, expected):
        (pair["logit_scale"] * (pair["image"] * pair["text"]).sum()).backward()
    gradients = dict(bare.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None if name in idle else torch.equal(parameter.grad, gradients[name].grad)
    assert all(torch.equal(outputs[name], expected[name]) for name in CLIP)
    assert outputs["image_prototype"].shape == (len(outputs["image"]), 8) and not outputs["image_prototype"].requires_grad


def test_head_parameters_are_those_no_other_feature_uses():
    model = build()
    assert model.head_parameters({"image"}) == [] and model.head_parameters({"prototype_scale"}) == ["prototype_logit_scale.log"]
    image_side = {name for name, _ in model.named_parameters() if name.startswith(("image_tower", "image_projection", "image_prototype_head"))}
    assert set(model.head_parameters({"image", "image_prototype"})) == image_side


# --- freezing


def test_frozen_image_side_stays_locked_through_train_and_steps():
    model = build()
    model.train_only(frozenset(name for name, _ in model.named_parameters() if not name.startswith(("image_tower", "image_projection"))))
    model.train()
    assert model.training and not model.image_tower.training and model.text_tower.training and model.image_prototype_head.training
    before = copy.deepcopy(model.state_dict())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    outputs = model(*batch(), wants=FEATURES)
    sum(output.square().sum() * (index + 1) + output.sum() for index, output in enumerate(outputs.values())).backward()
    optimizer.step()
    after = model.state_dict()
    locked = [name for name in before if name.startswith(("image_tower", "image_projection"))]
    assert any("running_mean" in name for name in locked)
    assert all(torch.equal(before[name], after[name]) for name in locked)
    assert not torch.equal(before["text_projection.weight"], after["text_projection.weight"])
    assert not torch.equal(before["image_prototype_head.layers.0.weight"], after["image_prototype_head.layers.0.weight"])
    assert not outputs["image"].requires_grad and outputs["text"].requires_grad


# --- optimiser groups


def test_parameter_groups_follow_the_reference():
    groups = build(settings=SETTINGS.model_copy(update={"image": schema.ImageTower(name="test_vit", size=160)})).parameter_groups()
    visual, other = "visual", "other"
    expected = {
        "image_tower.trunk.patch_embed.proj.weight": (visual, True, ""),
        "image_tower.trunk.patch_embed.proj.bias": (visual, False, ""),
        "image_tower.trunk.norm.weight": (visual, False, ""),
        "image_tower.trunk.cls_token": (visual, False, ""),
        "image_projection.weight": (visual, True, ""),
        "text_tower.encoder.embeddings.token_embedding.weight": (other, True, ""),
        "text_tower.encoder.final_layer_norm.weight": (other, False, ""),
        "text_projection.weight": (other, True, ""),
        "image_prototype_head.layers.0.weight": (other, False, "image_prototype_head"),
        "text_prototype_head.layers.3.weight": (other, False, "text_prototype_head"),
        "logit_scale.log": (other, False, ""),
        "prototype_logit_scale.log": (other, False, "prototype_logit_scale"),
    }
    assert {name: groups[name] for name in expected} == {name: ParameterGroup(*rule) for name, rule in expected.items()}


def test_norm_groups_reach_towers_and_heads():
    model = build(settings=SETTINGS.model_copy(update={"norm_groups": 3}))
    layers = [layer for layer in model.modules() if hasattr(layer, "groups") and hasattr(layer, "running_mean")]
    assert len(layers) > 4 and {layer.groups for layer in layers} == {3}
    assert not any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in model.modules())
