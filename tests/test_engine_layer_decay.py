"""Learning rates that fall from layer to layer: their factors, and what an AdamW step makes of them. tests/test_engine_strategy_state.py has them under every strategy."""

from types import SimpleNamespace

import pytest
import timm
import torch
from transformers import BertConfig, BertModel

from protoclip_scale.engine.optimizer import adamw_settings, parameter_groups, rate_factors
from protoclip_scale.engine.strategy import Strategy
from protoclip_scale.errors import UserError
from protoclip_scale.models.build import build_model
from protoclip_scale.models.layers import image_depths, text_depths
from protoclip_scale.recipe import diff, load_recipe
from tests.support import RECIPES, TINY

VIT = {
    "cls_token": 13, "pos_embed": 13, "patch_embed.proj.weight": 13, "patch_embed.proj.bias": 13,
    "blocks.0.norm1.weight": 12, "blocks.0.mlp.fc2.bias": 12, "blocks.5.attn.qkv.weight": 7, "blocks.11.attn.proj.weight": 1, "norm.weight": 1, "norm.bias": 1,
}  # fmt: skip
RESNET = {
    "conv1.weight": 17, "bn1.weight": 17, "layer1.0.conv1.weight": 16, "layer1.0.downsample.0.weight": 16, "layer1.2.bn3.bias": 14, "layer2.0.conv1.weight": 13,
    "layer3.0.conv2.weight": 9, "layer3.5.conv1.weight": 4, "layer4.0.downsample.1.weight": 3, "layer4.2.conv3.weight": 1,
}  # fmt: skip


@pytest.mark.parametrize(("name", "expected", "count"), [("vit_tiny_patch16_224", VIT, 13), ("resnet50", RESNET, 17)])
def test_image_layers_are_timm_s_with_the_projection_in_the_classifier_s_place(name, expected, count):
    with torch.device("meta"):
        trunk = timm.create_model(name)
    with_classifier = timm.models.group_parameters(trunk, trunk.group_matcher(), reverse=True)
    trunk.reset_classifier(0)
    depths = {key.removeprefix("trunk."): depth for key, depth in image_depths(SimpleNamespace(name=name, trunk=trunk)).items()}
    assert depths.keys() == dict(trunk.named_parameters()).keys()
    assert {key: depths[key] for key in expected} == expected
    assert set(depths.values()) == set(range(1, count + 1))
    assert all(max(with_classifier.values()) - with_classifier[key] == depth for key, depth in depths.items())


def test_a_hidden_layer_in_front_of_the_classifier_is_a_head():
    with torch.device("meta"):
        trunk = timm.create_model("resnet50_clip")
    depths = image_depths(SimpleNamespace(name="resnet50_clip", trunk=trunk))
    assert depths["trunk.head.q.weight"] == 0 and depths["trunk.stages.3.2.conv1_1x1.conv.weight"] == 1


@pytest.mark.parametrize("broken", [SimpleNamespace(), SimpleNamespace(group_matcher=lambda coarse: {"stem": "."})])
def test_a_tower_without_layers_is_refused(broken):
    broken.named_parameters = lambda: [("a", torch.ones(1)), ("b", torch.ones(1))]
    with pytest.raises(UserError, match=r"optim.layer_decay.image: timm tells no layers of model.image.name strange; leave image out"):
        image_depths(SimpleNamespace(name="strange", trunk=broken))
    with pytest.raises(UserError, match="optim.layer_decay.text: the encoder model.text.name odd has no list of layers"):
        text_depths(SimpleNamespace(name="odd", encoder=torch.nn.Linear(2, 2)))


def test_layers_of_a_transformers_encoder():
    encoder = BertModel(BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16), add_pooling_layer=False)
    depths = text_depths(SimpleNamespace(name="bert", encoder=encoder))
    assert {name: depth for name, depth in depths.items() if "embeddings" in name} == {f"encoder.embeddings.{name}": 4 for name in (
        "word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")}  # fmt: skip
    assert [depths[f"encoder.encoder.layer.{number}.output.dense.weight"] for number in range(3)] == [3, 2, 1]
    assert set(depths.values()) == {1, 2, 3, 4}


@pytest.fixture(scope="module")
def recipe():
    more = ["model.image.name=test_vit", "model.image.size=160", "model.text.layers=2", "optim.layer_decay={image: 0.5, text: 0.9}", "optim.weight_decay=0.3"]
    return load_recipe(RECIPES / "demo_clip.yaml", [*TINY, *more])


def test_every_tensor_moves_as_one_of_its_own_rate_would(recipe):
    model = build_model(recipe, frozenset({"image", "text", "logit_scale"}), 0)
    factors, groups = rate_factors(model, recipe.optim), parameter_groups(model, recipe.optim)
    named = {
        "image_tower.trunk.pos_embed": 0.5**7, "image_tower.trunk.blocks.0.attn.qkv.weight": 0.5**6, "image_tower.trunk.blocks.5.mlp.fc1.bias": 0.5,
        "text_tower.encoder.embeddings.token_embedding.weight": 0.9**3, "text_tower.encoder.embeddings.position_embedding.weight": 0.9**3,
        "text_tower.encoder.encoder.layers.0.mlp.fc1.weight": 0.9**2, "text_tower.encoder.encoder.layers.1.mlp.fc1.weight": 0.9,
        "text_tower.encoder.final_layer_norm.weight": 0.9, "image_projection.weight": 1, "text_projection.weight": 1, "logit_scale.log": 1,
    }  # fmt: skip
    assert {name: factors[name] for name in named} == named
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    draws = torch.Generator().manual_seed(1)
    expected = {}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draws)
        alone = parameter.detach().clone().requires_grad_()
        alone.grad = parameter.grad.clone()
        rate = (2e-3 if name.startswith("image") else 1e-3) * factors[name]
        torch.optim.AdamW([alone], lr=rate, betas=recipe.optim.betas, eps=recipe.optim.eps, weight_decay=decays[name]).step()
        expected[name] = alone.detach()
    optimizer = torch.optim.AdamW(groups, **adamw_settings(recipe.optim), fused=True)
    Strategy.set_learning_rates(SimpleNamespace(optimizer=optimizer), {"visual": 2e-3, "other": 1e-3})
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-8, msg=name)


def test_without_it_groups_are_as_before(recipe):
    plain = recipe.optim.model_copy(update={"layer_decay": None})
    model = build_model(recipe, frozenset({"image", "text", "logit_scale"}), 0)
    assert [(group["side"], group["factor"]) for group in parameter_groups(model, plain)] == [("other", 1.0)] * 2 + [("visual", 1.0)] * 2


def test_it_may_not_change_on_resume_and_must_decay(recipe):
    changed = diff(recipe, load_recipe(RECIPES / "demo_clip.yaml", TINY))
    assert any(line.startswith("optim.layer_decay: {image: 0.5, text: 0.9} -> null") for line in changed)
    with pytest.raises(UserError, match="optim.layer_decay has no effect: image and text are 1"):
        load_recipe(RECIPES / "demo_clip.yaml", [*TINY, "optim.layer_decay={}"])
