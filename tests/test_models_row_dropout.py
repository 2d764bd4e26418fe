"""Dropout by row: shares and values as torch's, and the same masks however a batch is split over ranks and micro-batches."""

import copy

import pytest
import timm
import torch
from torch import nn

from protoclip_scale.engine.compilation import num_graphs
from protoclip_scale.errors import UserError
from protoclip_scale.models.blocks import blocks
from protoclip_scale.models.build import build_model
from protoclip_scale.models.image import ImageTower
from protoclip_scale.models.row_dropout import Draws, RowDropout, key_by_row, of_view, row_keys
from protoclip_scale.recipe import schema
from tests.exports import Settings
from tests.support import TINY, metrics, output, pretrain

ROWS = torch.arange(1000) * (1 << 33) + 7
TOWER = {"name": "test_vit", "size": 160, "drop_path": 0.5}


def dropped(whole_rows: bool, keys: torch.Tensor, values: torch.Tensor, scale: bool = True, number: int = 0) -> torch.Tensor:
    draws = Draws()
    draws.keys_B = keys
    return RowDropout(0.3, whole_rows, scale, draws, number)(values)


def test_shares_and_values():
    keys = row_keys(ROWS, 12345)
    numbers = dropped(False, keys, torch.ones(1000, 50))
    assert numbers.unique().tolist() == pytest.approx([0, 1 / 0.7]) and numbers.mean().item() == pytest.approx(1, abs=0.02)
    assert (numbers == 0).float().mean(0).sub(0.3).abs().max() < 0.07 and (numbers == 0).float().mean(1).std() < 0.1, "by place and by row"
    rows = dropped(True, keys, torch.ones(1000, 5, 4), scale=False)
    assert torch.equal(rows, rows[:, :1, :1].expand_as(rows)) and (rows == 0).float().mean().item() == pytest.approx(0.3, abs=0.05)
    kept = [dropped(True, each, torch.ones(1000, 1), number=number)[:, 0] > 0 for each, number in ((keys, 0), (keys, 1), (row_keys(ROWS, 12346), 0), (of_view(keys, "image@second"), 0))]
    agreements = [(one == other).float().mean().item() for place, one in enumerate(kept) for other in kept[:place]]
    assert agreements == [pytest.approx(0.7**2 + 0.3**2, abs=0.06)] * 6, "layers, steps and views draw for themselves"


@pytest.mark.parametrize("whole_rows", [False, True])
def test_a_row_is_dropped_alike_in_any_split_memory_format_and_with_windows(whole_rows):
    keys, values = row_keys(ROWS[:12], 5), torch.randn(12, 3, 4, 4)
    whole = dropped(whole_rows, keys, values)
    assert torch.equal(whole, torch.cat([dropped(whole_rows, keys[part], values[part]) for part in (slice(0, 5), slice(5, 12))]))
    assert torch.equal(whole, dropped(whole_rows, keys, values.contiguous(memory_format=torch.channels_last)))
    windows = dropped(whole_rows, keys, values.reshape(24, 3, 8))  # two consecutive parts of each row
    assert torch.equal(windows == 0, whole.reshape(24, 3, 8) == 0)


def test_gradients_of_parts_and_of_micro_batches_are_those_of_the_whole_batch():
    model = build_model(Settings(schema.Model(embed_dim=16, image=TOWER, text={"width": 64, "heads": 1, "layers": 1, "context_length": 8})), frozenset({"image", "text", "logit_scale"}), 0).double().train()
    images = torch.randint(0, 256, (6, 3, 160, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    keys, weights = row_keys(ROWS[:6], 9), torch.randn(6, 16, dtype=torch.float64)

    def gradients(parts: list[slice], microbatch: int | None, **given) -> dict[str, torch.Tensor]:
        own = copy.deepcopy(model)
        for part in parts:
            found = own(images[part], wants=frozenset({"image", "image@second"}), microbatch=microbatch, views={"image@second": (images[part],)}, **{name: value[part] for name, value in given.items()})
            ((found["image"] + 2 * found["image@second"]) * weights[part]).sum().backward()
        return {name: each.grad for name, each in own.named_parameters() if each.grad is not None}

    whole = gradients([slice(0, 6)], None, row_keys=keys)
    for parts, microbatch in (([slice(0, 2), slice(2, 6)], None), ([slice(0, 6)], 4), ([slice(0, 3), slice(3, 6)], 2)):
        for name, gradient in gradients(parts, microbatch, row_keys=keys).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-9 * whole[name].abs().max().item(), msg=name)
    for other in (gradients([slice(0, 6)], None), gradients([slice(0, 6)], None, row_keys=keys.flip(0))):
        assert max((other[name] - whole[name]).abs().max() / whole[name].abs().max() for name in whole) > 0.01, "without keys nothing is dropped; other rows, other masks"
    with torch.no_grad():
        evaluated = [copy.deepcopy(model).eval()(images, wants=frozenset({"image"}), **given)["image"] for given in ({"row_keys": keys}, {})]
    assert torch.equal(*evaluated)


def test_everything_that_drops_is_keyed_or_refused():
    assert key_by_row(timm.create_model("test_vit"), "test_vit") is None
    trunk = timm.create_model("test_vit", proj_drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3)
    assert key_by_row(trunk, "test_vit") and not [each for each in trunk.modules() if isinstance(each, nn.Dropout) and each.p > 0]
    kinds = [(each.probability, each.whole_rows) for each in trunk.modules() if isinstance(each, RowDropout)]
    assert {(round(probability, 3), whole_rows) for probability, whole_rows in kinds} >= {(0.2, False), (0.1, False), (0.3, True)} and len({each.number.item() for each in trunk.modules() if isinstance(each, RowDropout)}) == len(kinds)
    assert not any(block.attn.fused_attn for block in trunk.blocks)
    with pytest.raises(UserError, match="its PatchDropout drops by chance"):
        key_by_row(timm.create_model("test_vit", patch_drop_rate=0.5), "test_vit")
    with pytest.raises(UserError, match=r"recomputed blocks .* use optim.microbatch"):
        ImageTower(schema.ImageTower(**TOWER, grad_checkpointing=True))
    with pytest.raises(UserError, match=r"^model.image.drop_path 0.1 has no effect: vgg11 has no stochastic depth; remove it$"):
        ImageTower(schema.ImageTower(name="vgg11", drop_path=0.1))


def compiled_graphs(drop_path: float) -> int:
    """Of a transformer's six blocks, forward and backward, in three steps with keys of their own."""
    torch._dynamo.reset()
    before = num_graphs()
    tower = ImageTower(schema.ImageTower(name="test_vit", size=160, drop_path=drop_path)).train()
    for block in blocks(tower):
        block.compile(backend="eager")
    for step in range(3):
        tower(torch.randn(2, 3, 160, 160), row_keys=row_keys(ROWS[:2], step)).pooled.sum().backward()
    return num_graphs() - before


def test_blocks_that_drop_share_a_compiled_graph():
    """But for the first block, which never drops, and so is another computation."""
    assert (compiled_graphs(0), compiled_graphs(0.5)) == (1, 2)


def test_what_differs_from_block_to_block_is_in_no_checkpoint_and_survives_copies_and_casts():
    tower, plain = ImageTower(schema.ImageTower(**TOWER)).train(), ImageTower(schema.ImageTower(name="test_vit", size=160))
    assert tower.state_dict().keys() == plain.state_dict().keys()
    own = next(each for each in tower.modules() if isinstance(each, RowDropout))
    assert repr(own) == f"RowDropout(probability={own.probability}, whole_rows=True)" and own.probability == pytest.approx(0.1)
    tower.draws.keys_B, values = row_keys(ROWS, 3), torch.ones(1000, 2)
    expected = own(values)
    assert 0 < (expected == 0).sum() < 400 and expected.max().item() == pytest.approx(1 / 0.9, rel=1e-6)
    copied = copy.deepcopy(tower)
    copied.draws.keys_B = row_keys(ROWS, 4)  # which the tower's own layers do not see
    assert torch.equal(own(values), expected)
    for cast in (copy.deepcopy(own).double, copy.deepcopy(own).half, copy.deepcopy(own).bfloat16):
        assert torch.equal(cast()(values), expected)
    assert own(values.double()).max().item() == 1 / (1 - own.probability) and torch.equal(own(values.bfloat16()), expected.bfloat16())
    with torch.device("meta"):
        shaped = ImageTower(schema.ImageTower(**TOWER)).train()
        assert shaped(torch.zeros(2, 3, 160, 160), row_keys=torch.zeros(2, dtype=torch.int64)).pooled.shape == (2, 64)


@pytest.mark.slow
def test_two_ranks_drop_what_one_drops(tmp_path):
    """Law 1 in real runs."""
    values = (*TINY, "model.image={name: test_vit, size: 160, drop_path: 0.5}", "data.plan.global_batch=32", "data.plan.episode_size=128", "schedule.total=3 steps")
    losses = {}
    for ranks in (1, 2):
        assert pretrain(tmp_path / str(ranks), "demo_clip.yaml", values, ranks=ranks) == [0] * ranks, output(tmp_path / str(ranks))
        losses[ranks] = [line["loss"] for line in metrics(tmp_path / str(ranks), "train")]
    assert pretrain(tmp_path / "none", "demo_clip.yaml", [value.replace(", drop_path: 0.5", "") for value in values]) == [0]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert [line["loss"] for line in metrics(tmp_path / "none", "train")] != pytest.approx(losses[1], rel=1e-4)
