"""FSDP2 (experimental): torch's fully_shard, as accelerate's fsdp_config asks for it on GPUs. Parameters are DTensors cut along their first dimension.

Blocks of the towers are sharded each by itself and the rest as one: what is gathered at once is a block.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from protoclip_scale import collectives
from protoclip_scale.engine.checkpoint.pieces import Piece, replicated_pieces, replicated_views
from protoclip_scale.engine.optimizer import Groups, adamw_settings
from protoclip_scale.engine.strategy.base import MOMENTS, Held, Strategy, Update, spoilt_if_not_finite
from protoclip_scale.errors import UserError
from protoclip_scale.models.blocks import blocks
from protoclip_scale.recipe.schema import Optim

if TYPE_CHECKING:
    from protoclip_scale.engine.checkpoint.reading import Reader

RECOMPUTES_SINCE = (2, 15)  # of torch: what runs again in a backward pass there finds its weights whole (law 2 is tested with this one)


class FullySharded(Strategy):
    """Weights, gradients and moments of a rank are its rows of every parameter."""

    title = "FSDP2"
    whole = False

    def prepare(self, model: nn.Module, groups: Groups, settings: Optim) -> None:
        if settings.microbatch and torch.__version__ < RECOMPUTES_SINCE:
            raise UserError(f"optim.microbatch {settings.microbatch} under FSDP2 needs torch {'.'.join(map(str, RECOMPUTES_SINCE))}, this is {torch.__version__}; set it to null, or launch with launch/accelerate/zero3.yaml")
        self.max_norm = settings.max_norm
        self.bare_model = model
        model.compute_dtype = self.precision.dtype
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        again = bool(getattr(plugin, "reshard_after_forward", True))
        for block in blocks(model):
            fully_shard(block, reshard_after_forward=again)
        fully_shard(model)  # what blocks leave stays until the backward pass, which needs it at once
        sharded = dict(model.named_parameters())
        for group in groups:
            group["params"] = [sharded[name] for name in group["names"]]
        self.optimizer = torch.optim.AdamW(groups, **adamw_settings(settings))

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.bare_model(*inputs, **options)

    def backward(self, loss: torch.Tensor) -> None:
        spoilt_if_not_finite(loss * self.precision.scale.value if self.precision.scale else loss).backward()

    def update(self, stop: bool = False) -> Update:
        scale = self.precision.scale
        gradients = [_local(parameter.grad) for _, parameter in self._named_parameters()]
        squares = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
        squares, stops = collectives.host_values(collectives.all_reduce(torch.stack([squares, torch.full_like(squares, stop)])))
        norm = squares**0.5 / (scale.value if scale else 1)
        taken = norm < float("inf")
        if taken:
            clipped = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (norm + 1e-6))
            coefficient = clipped / (scale.value if scale else 1)
            if coefficient != 1:
                torch._foreach_mul_(gradients, coefficient)
            self.optimizer.step()
        if scale:
            scale.update(overflowed=not taken)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm, taken, stops > 0)

    def _named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for group in self.optimizer.param_groups:
            yield from zip(group["names"], group["params"], strict=True)

    def gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for name, parameter in self.bare_model.named_parameters():
            yield name, None if parameter.grad is None else _whole(parameter.grad)

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.bare_model.state_dict().items():
            yield name, _whole(tensor)

    def weight_pieces(self) -> Iterator[Piece]:
        replicated = {}
        for name, tensor in self.bare_model.state_dict().items():
            if isinstance(tensor, DTensor):
                yield from _piece(f"model/{name}", tensor)
            else:
                replicated[f"model/{name}"] = tensor
        yield from replicated_views(replicated)

    def _held(self) -> dict[str, Held]:
        tensors = self.bare_model.state_dict()
        return {name: Held(_local(tensor).detach().view(-1) if isinstance(tensor, DTensor) else tensor, isinstance(tensor, DTensor)) for name, tensor in tensors.items()}

    def optimizer_pieces(self) -> Iterator[Piece]:
        replicated = {}
        for name, parameter in self._named_parameters():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, DTensor):
                    yield from _piece(f"optimizer/{name}/{moment}", value)
                else:
                    replicated[f"optimizer/{name}/{moment}"] = value
        yield from replicated_pieces(replicated)

    def load(self, reader: "Reader") -> None:
        for name, parameter in self._named_parameters():
            key = f"optimizer/{name}"
            if f"{key}/step" not in reader:
                continue
            state = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            start, numel = _range_of_rank(parameter)
            for moment, value in state.items():
                _local(value).view(-1).copy_(reader.slice(f"{key}/{moment}", start, start + numel))
            self.optimizer.state[parameter] = {"step": reader.tensor(f"{key}/step"), **state}  # AdamW keeps it on the CPU


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _piece(name: str, tensor: DTensor) -> Iterator[Piece]:
    start, numel = _range_of_rank(tensor)
    if numel:
        yield Piece(name, start, tensor.to_local().detach().view(-1), tuple(tensor.shape))


def _range_of_rank(tensor: DTensor) -> tuple[int, int]:
    """First value and number of values of this rank's rows, which are torch.chunk's."""
    assert tensor.placements == (Shard(0),)
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    per_rank = -(-rows // mesh.size())
    first = min(mesh.get_local_rank() * per_rank, rows)
    numel = _local(tensor).numel()
    width = tensor.numel() // rows
    assert numel == (min(first + per_rank, rows) - first) * width
    return first * width, numel
