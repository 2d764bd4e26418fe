"""Batch norm whose statistics belong to fixed groups of the global batch, whatever the number of ranks.

The global batch is the ranks' rows one after the other (lanes are in this order), cut into ``groups`` equal contiguous
parts. One group is the whole batch; 8 groups repeat the statistics of the published 8-GPU runs on any number of ranks.
torch's SyncBatchNorm has no groups and refuses CPU.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from protoclip_scale import collectives
from protoclip_scale.errors import UserError

Segment = tuple[int, int, int]  # group, first row, row after the last


def group_segments(rank: int, rows: int, world: int, groups: int) -> list[Segment]:
    """The parts of a rank's ``rows`` rows that lie in one group each, as (group, start, stop) of local rows."""
    if world * rows % groups:
        raise UserError(f"norm_groups {groups} does not divide the batch of {world * rows} rows: use a divisor of data.plan.lanes")
    group_rows = world * rows // groups
    segments, start = [], 0
    while start < rows:
        group = (rank * rows + start) // group_rows
        stop = min(rows, (group + 1) * group_rows - rank * rows)
        segments.append((group, start, stop))
        start = stop
    return segments


def _per_channel(values_C: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values_C.view(1, -1, *[1] * (like.dim() - 2))


@functools.lru_cache(maxsize=256)  # a copy to a GPU waits for it, and each layer of a ResNet would make one in every pass
def _counts(world: int, groups: int, rows: int, spatial: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[W, G, 1]: values per channel that each rank gives to each group."""
    counts = torch.zeros(world, groups, 1, dtype=dtype)
    for rank in range(world):
        for group, start, stop in group_segments(rank, rows, world, groups):
            counts[rank, group] = (stop - start) * spatial
    return counts.to(device)


class _SpreadBatchNorm(torch.autograd.Function):
    """Normalisation with groups that reach over ranks: one gather forward, one all-reduce backward."""

    @staticmethod
    def forward(ctx, input, weight, bias, eps, groups):
        world, rank, rows = collectives.world_size(), collectives.rank(), input.shape[0]
        dims = [0, *range(2, input.dim())]
        spatial = input[0, 0].numel()
        segments = group_segments(rank, rows, world, groups)
        dtype = torch.promote_types(input.dtype, torch.float32)

        local = torch.zeros(1, groups, 2, input.shape[1], dtype=dtype, device=input.device)
        for group, start, stop in segments:
            part = input[start:stop].to(dtype)
            mean = part.mean(dims)
            local[0, group] = torch.stack((mean, (part - _per_channel(mean, part)).square_().sum(dims)))
        means, squares = collectives.all_gather(local).unbind(2)

        counts = _counts(world, groups, rows, spatial, dtype, input.device)
        total = world * rows * spatial // groups
        mean_GC = (counts * means).sum(0) / total
        var_GC = (squares + counts * (means - mean_GC).square()).sum(0) / total
        invstd_GC = (var_GC + eps).rsqrt()

        output = torch.empty_like(input)
        for group, start, stop in segments:
            scale = weight.to(dtype) * invstd_GC[group]
            shift = bias.to(dtype) - mean_GC[group] * scale
            part = input[start:stop].to(dtype)
            output[start:stop] = torch.addcmul(_per_channel(shift, part), part, _per_channel(scale, part))
        ctx.save_for_backward(input, weight, mean_GC, invstd_GC)
        ctx.segments, ctx.total = segments, total
        ctx.mark_non_differentiable(mean_GC, var_GC)
        return output, mean_GC, var_GC

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        input, weight, mean_GC, invstd_GC = ctx.saved_tensors
        dims = [0, *range(2, input.dim())]
        dtype = mean_GC.dtype
        sums = torch.zeros(2, *mean_GC.shape, dtype=dtype, device=input.device)

        def normalised(group, start, stop):
            part = input[start:stop].to(dtype)
            return (part - _per_channel(mean_GC[group], part)) * _per_channel(invstd_GC[group], part)

        for group, start, stop in ctx.segments:
            part = gradient[start:stop].to(dtype)
            sums[0, group] = part.sum(dims)
            sums[1, group] = (part * normalised(group, start, stop)).sum(dims)
        grad_weight, grad_bias = sums[1].sum(0).to(weight.dtype), sums[0].sum(0).to(weight.dtype)

        mean_gradient, mean_product = collectives.all_reduce(sums) / ctx.total
        grad_input = torch.empty_like(input)
        for group, start, stop in ctx.segments:
            part = gradient[start:stop].to(dtype) - _per_channel(mean_gradient[group], input)
            part.addcmul_(normalised(group, start, stop), _per_channel(mean_product[group], input), value=-1)
            grad_input[start:stop] = part * _per_channel(weight.to(dtype) * invstd_GC[group], input)
        return grad_input, grad_weight, grad_bias, None, None


class GroupBatchNorm(nn.Module):
    """Batch norm over ``groups`` equal contiguous parts of the global batch; state dict as torch's BatchNorm.

    Input [B, C, ...] with the same B on every rank. Statistics are fp32 (fp64 for fp64 input), the variance is two-pass.
    Running statistics are the mean over the groups (variance unbiased), equal on all ranks; they move in training mode
    only, and neither inside ``frozen_statistics`` nor while checkpointed activations are recomputed. Cost: torch's own
    kernel where no group reaches over ranks (plus one all-reduce of 2C numbers if there are ranks), otherwise one gather of
    2GC numbers forward and one all-reduce of 2GC backward.

    Raises UserError if ``groups`` does not divide the global batch, or a group holds one value per channel.
    """

    def __init__(self, num_features: int, groups: int = 1, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.num_features, self.groups, self.eps, self.momentum = num_features, groups, eps, momentum
        self.updates = True
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def extra_repr(self) -> str:
        return f"{self.num_features}, groups={self.groups}, eps={self.eps}, momentum={self.momentum}"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            output = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return self.act(self.drop(output))
        world, rows = collectives.world_size(), input.shape[0]
        group_values = world * rows * input[0, 0].numel() // self.groups
        if group_values < 2:
            raise UserError(f"batch norm has {group_values} values per channel in each of norm_groups {self.groups}: raise data.plan.global_batch or lower norm_groups")
        # a checkpointed block runs again inside the backward pass; its first run has updated the statistics
        updates = self.updates and torch._C._current_graph_task_id() == -1
        if world == 1 and self.groups == 1:
            output, mean, var = self._whole(input)
        else:
            segments = group_segments(collectives.rank(), rows, world, self.groups)
            whole_groups = all((stop - start) * world * self.groups == world * world * rows for _, start, stop in segments)
            output, mean, var = self._local(input, segments) if whole_groups else self._spread(input, group_values)
        if updates:
            self._update(mean, var)
        return self.act(self.drop(output))

    def _whole(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, mean and unbiased variance by torch's kernel; with momentum 1 it writes what it found."""
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        return F.batch_norm(input, mean, var, self.weight, self.bias, True, 1.0, self.eps), mean, var

    def _local(self, input: torch.Tensor, segments: list[Segment]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        outputs, statistics = [], self.running_mean.new_zeros(2, self.num_features)
        for _, start, stop in segments:
            output, mean, var = self._whole(input[start:stop])
            outputs.append(output)
            statistics += torch.stack((mean, var))
        mean, var = collectives.all_reduce(statistics) / self.groups
        return torch.cat(outputs), mean, var

    def _spread(self, input: torch.Tensor, group_values: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        output, mean_GC, var_GC = _SpreadBatchNorm.apply(input, self.weight, self.bias, self.eps, self.groups)
        return output, mean_GC.mean(0), var_GC.mean(0) * (group_values / (group_values - 1))

    @torch.no_grad()
    def _update(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        for running, found in ((self.running_mean, mean), (self.running_var, var)):
            # A step whose loss is not finite is skipped after its forward pass: it must not leave its mark here.
            running.lerp_(torch.where(found.isfinite(), found.to(running.dtype), running), self.momentum)
        self.num_batches_tracked += 1


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Forward passes inside leave the running statistics of all group batch norms alone."""
    layers = [(layer, layer.updates) for layer in model.modules() if isinstance(layer, GroupBatchNorm)]
    for layer, _ in layers:
        layer.updates = False
    try:
        yield
    finally:
        for layer, before in layers:
            layer.updates = before


def convert_batch_norm(module: nn.Module, groups: int) -> nn.Module:
    """The module with each BatchNorm1d and 2d (timm's with activation and drop too) replaced, values and names kept."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        assert module.affine and module.track_running_stats and module.momentum is not None, f"{module} has no group form"
        layer = GroupBatchNorm(module.num_features, groups, module.eps, module.momentum)
        layer.drop, layer.act = getattr(module, "drop", layer.drop), getattr(module, "act", layer.act)
        layer.load_state_dict(module.state_dict())
        return layer.train(module.training).to(module.weight.device, module.weight.dtype)
    for name, child in module.named_children():
        setattr(module, name, convert_batch_norm(child, groups))
    return module
