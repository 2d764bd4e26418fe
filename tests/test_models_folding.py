"""Batch norm folded into the layer before it: the same features of real images, and no folding where it would change them."""

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from protoclip_scale.data.decode import Limits, decode_image
from protoclip_scale.data.transforms import eval_transform
from protoclip_scale.models.batch_norm import GroupBatchNorm, convert_batch_norm
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.folding import Pair, foldable, folded
from protoclip_scale.models.image import ImageTower
from protoclip_scale.recipe import schema
from tests.support import CORPUS
from tests.test_models_dual_encoder import SETTINGS

ROWS, SIZE = 16, 64


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """float32 [16, 3, 64, 64] in [-1, 1]."""
    column = pq.read_table(CORPUS / "val-00000-of-00001.parquet").column("image").slice(0, ROWS).to_pylist()
    images = [eval_transform(decode_image(each["bytes"], Limits(10**6, 10**6)), SIZE) for each in column]
    return torch.stack(images).float() / 127.5 - 1


def with_statistics(module: nn.Module, pictures: torch.Tensor) -> nn.Module:
    """The module in evaluation mode, with running statistics of real images and gains and shifts that are not 1 and 0."""
    draws = torch.Generator().manual_seed(3)
    for layer in module.modules():
        if isinstance(layer, GroupBatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator=draws)
            nn.init.uniform_(layer.bias, -0.5, 0.5, generator=draws)
    module.train()
    with torch.no_grad():
        module(pictures)
    return module.eval()


def num_norms(module: nn.Module) -> int:
    return sum(isinstance(layer, GroupBatchNorm) for layer in module.modules())


# All norms of resnets, regnets, byobnets and mobile nets stand behind a convolution; where a norm stands before one, some have another neighbour.
@pytest.mark.parametrize(
    ("name", "share"),
    [("test_resnet", 1), ("regnetx_002", 1), ("test_byobnet", 1), ("mobilenetv3_small_050", 1), ("test_efficientnet", 1), ("resnetv2_18", 0.4), ("test_convnext", 0)],
)
def test_towers_give_the_same_features(name, share, pictures):
    torch.manual_seed(0)
    tower = with_statistics(convert_batch_norm(ImageTower(schema.ImageTower(name=name, size=SIZE)), groups=1), pictures)
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    pairs = foldable(tower, pictures[:2])
    assert len(pairs) >= share * num_norms(tower)
    fast = folded(tower, pairs)
    assert num_norms(fast) == num_norms(tower) - len(pairs)
    with torch.no_grad():
        expected, found = tower(pictures).pooled, fast(pictures).pooled
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(torch.equal(before[key], value) for key, value in tower.state_dict().items())  # the trained model is as it was


def test_the_dual_encoder_with_its_heads_and_without_a_copy_of_the_rest(pictures):
    torch.manual_seed(0)
    model = DualEncoder(SETTINGS, frozenset({"image_prototype", "text_prototype"}))
    inputs = (pictures[:, :, ::2, ::2], torch.randint(1, 49_000, (ROWS, 12)), torch.randint(3, 13, (ROWS,)))
    wants = frozenset({"image_prototype", "text_prototype"})
    model.train()
    for _ in range(3):
        model(*inputs, wants=wants)
    model.eval()
    pairs = foldable(model, *(each[:2] for each in inputs), wants=wants)
    assert len(pairs) == num_norms(model) and Pair("text_prototype_head.layers.0", "text_prototype_head.layers.1") in pairs
    fast = folded(model, pairs)
    with torch.no_grad():
        expected, found = model(*inputs, wants=wants), fast(*inputs, wants=wants)
    for name in wants:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    shared = {parameter.data_ptr() for parameter in model.text_tower.parameters()}
    assert {parameter.data_ptr() for parameter in fast.text_tower.parameters()} == shared


class Odd(nn.Module):
    """Layers whose norms must stay: an output read twice, a layer that runs twice, a norm that runs twice."""

    def __init__(self):
        super().__init__()
        self.read_twice, self.run_twice, self.plain, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(GroupBatchNorm(4) for _ in range(5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        made = self.read_twice(images)
        images = made + self.norms[0](made)
        images = self.run_twice(self.norms[1](self.run_twice(images)))
        images = self.norms[2](self.plain(images))
        return self.norms[4](self.norms[3](self.last(self.norms[3](images))))


def test_only_what_can_be_folded_is(pictures):
    torch.manual_seed(0)
    module = with_statistics(Odd(), pictures := torch.cat([pictures, pictures[:, :1]], dim=1))
    pairs = foldable(module, pictures[:2])
    assert pairs == [Pair("plain", "norms.2")]
    with torch.no_grad():
        torch.testing.assert_close(folded(module, pairs)(pictures), module(pictures), rtol=1e-5, atol=1e-5)
        wrong = folded(module, [Pair("read_twice", "norms.0")])
        assert (wrong(pictures) - module(pictures)).abs().max() > 1e-2  # such a fold would have been found out here
