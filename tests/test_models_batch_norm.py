"""GroupBatchNorm against torch's BatchNorm applied to each group in one process: values, gradients, running statistics."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from protoclip_scale.errors import UserError
from protoclip_scale.models.batch_norm import GroupBatchNorm, convert_batch_norm, frozen_statistics
from tests.support import spawn

ROWS, CHANNELS = 24, 5


def given(shape_tail: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input with a large mean (which one-pass variances do not survive in fp32) and a weight for the loss."""
    draws = torch.Generator().manual_seed(7)
    shape = (ROWS, CHANNELS, *shape_tail)
    return torch.randn(shape, generator=draws, dtype=torch.float64) * 2 + 30, torch.randn(shape, generator=draws, dtype=torch.float64)


def affine(layer):
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 1.5, CHANNELS))
        layer.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    return layer


def slow_twin(input, loss_weight, groups, steps):
    """torch's own layer on each group; running statistics are the mean over the groups."""
    layers = [affine((nn.BatchNorm2d if input.dim() == 4 else nn.BatchNorm1d)(CHANNELS).to(input.dtype)) for _ in range(groups)]
    input = input.clone().requires_grad_()
    for _ in range(steps):
        output = torch.cat([layer(part) for layer, part in zip(layers, input.chunk(groups), strict=True)])
    (output * loss_weight).sum().backward()
    return {
        "output": output.detach(),
        "input": input.grad,
        "weight": sum(layer.weight.grad for layer in layers),
        "bias": sum(layer.bias.grad for layer in layers),
        "running_mean": torch.stack([layer.running_mean for layer in layers]).mean(0),
        "running_var": torch.stack([layer.running_var for layer in layers]).mean(0),
    }


def ours(input, loss_weight, groups, steps, layer_class=GroupBatchNorm):
    layer = affine(layer_class(CHANNELS, groups).to(input.dtype))
    input = input.clone().requires_grad_()
    for _ in range(steps):
        output = layer(input)
    (output * loss_weight).sum().backward()
    return {
        "output": output.detach(),
        "input": input.grad,
        "weight": layer.weight.grad,
        "bias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }


def assert_same(found, expected, rtol):
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(found[name]), value, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}")


class AlwaysSpread(GroupBatchNorm):
    """Takes the path for groups that reach over ranks where the quick one would do too."""

    def forward(self, input):
        output, mean, var = self._spread(input, input.numel() // CHANNELS // self.groups)
        self._update(mean, var)
        return output


@pytest.mark.parametrize("layer_class", [GroupBatchNorm, AlwaysSpread])
@pytest.mark.parametrize("tail", [(), (3, 2)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_one_process_equals_the_slow_twin(layer_class, tail, groups):
    input, loss_weight = given(tail)
    assert_same(ours(input, loss_weight, groups, 2, layer_class), slow_twin(input, loss_weight, groups, 2), rtol=1e-9)


def test_channels_last_input_gives_the_same():
    input, loss_weight = given((3, 2))
    expected = ours(input, loss_weight, 2, 1)
    for layer_class in (GroupBatchNorm, AlwaysSpread):
        assert_same(ours(input.contiguous(memory_format=torch.channels_last), loss_weight, 2, 1, layer_class), expected, rtol=1e-9)


def on_a_rank(rank, world):
    """Each case on this rank's half of the batch."""
    dist.init_process_group("gloo")
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    found = {}
    for tail in ((), (3, 2)):
        input, loss_weight = given(tail)
        for groups in (1, 2, 3, 4):
            for name, value in ours(input[mine], loss_weight[mine], groups, 2).items():
                found[f"{len(tail)}/{groups}/{name}"] = value.detach().clone()
    return found


@pytest.fixture(scope="module")
def two_ranks():
    return spawn(on_a_rank, 2)


@pytest.mark.parametrize("tail", [(), (3, 2)])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])  # 3 groups on 2 ranks: one lies on both
def test_two_processes_equal_the_slow_twin(two_ranks, tail, groups):
    first, second = ({name: rank[f"{len(tail)}/{groups}/{name}"] for name in ("output", "input", "weight", "bias", "running_mean", "running_var")} for rank in two_ranks)
    joined = {name: torch.cat((first[name], second[name])) for name in ("output", "input")}
    joined |= {name: first[name] + second[name] for name in ("weight", "bias")}
    for name in ("running_mean", "running_var"):
        assert torch.equal(first[name], second[name]), "running statistics differ between the ranks"
        joined[name] = first[name]
    assert_same(joined, slow_twin(*given(tail), groups, 2), rtol=1e-9)


def test_bf16_input_has_fp32_statistics():
    input, _ = given((8, 8))
    exact = affine(GroupBatchNorm(CHANNELS, 2).double())
    exact(input.bfloat16().double())
    layer = affine(GroupBatchNorm(CHANNELS, 2))
    assert layer(input.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-5, atol=0)


def test_evaluation_uses_running_statistics_and_leaves_them():
    input, _ = given((3, 2))
    layer, torch_layer = GroupBatchNorm(CHANNELS, 2).double(), nn.BatchNorm2d(CHANNELS).double()
    layer(input)
    torch_layer.load_state_dict(layer.state_dict())  # the same keys
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert torch.equal(layer.eval()(input), torch_layer.eval()(input))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("groups", [1, 4])
def test_statistics_stand_still_when_frozen_and_move_once_under_recomputation(groups):
    input, _ = given((3, 2))
    layer, other = GroupBatchNorm(CHANNELS, groups).double(), GroupBatchNorm(CHANNELS, groups).double()
    with frozen_statistics(layer):
        layer(input)
    assert layer.num_batches_tracked == 0 and not layer.running_mean.any()
    checkpoint(layer, input.requires_grad_(), use_reentrant=False).sum().backward()
    other(input)
    assert layer.num_batches_tracked == 1 and torch.equal(layer.running_var, other.running_var)


def test_conversion_keeps_values_names_activations_and_results():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("regnetx_002", num_classes=0)
    images = torch.randn(4, 3, 32, 32)
    expected, keys = copy.deepcopy(model)(images), list(model.state_dict())
    model = convert_batch_norm(model, 1)
    assert list(model.state_dict()) == keys
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    torch.testing.assert_close(model(images), expected, rtol=1e-6, atol=1e-6)
    assert isinstance(convert_batch_norm(nn.BatchNorm1d(3).eval(), 2), GroupBatchNorm) and not convert_batch_norm(nn.BatchNorm1d(3).eval(), 2).training


def test_impossible_groups_are_told():
    with pytest.raises(UserError, match="norm_groups 5 does not divide the batch of 24 rows"):
        GroupBatchNorm(CHANNELS, 5)(torch.zeros(ROWS, CHANNELS))
    with pytest.raises(UserError, match="1 values per channel"):
        GroupBatchNorm(CHANNELS, 4)(torch.zeros(4, CHANNELS))


@pytest.mark.parametrize("layer_class", [GroupBatchNorm, AlwaysSpread])
def test_a_batch_that_is_not_finite_leaves_no_mark(layer_class):
    """Its step is skipped, after the forward pass."""
    input, _ = given((3, 2))
    layer, twin = layer_class(CHANNELS, 1).double(), layer_class(CHANNELS, 1).double()
    broken = input.clone()
    broken[0, 1] = float("nan")
    layer(broken)
    assert layer.running_mean.isfinite().all() and layer.running_var.isfinite().all()
    assert layer.running_mean[1] == 0 and layer.running_mean[0] != 0
    twin(input)
    assert torch.equal(layer.running_mean[[0, 2, 3, 4]], twin.running_mean[[0, 2, 3, 4]])
