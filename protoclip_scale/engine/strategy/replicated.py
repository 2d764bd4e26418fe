"""Every rank holds the whole model and optimiser: one process, or DDP over several."""

import inspect
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from protoclip_scale import collectives
from protoclip_scale.engine.checkpoint.pieces import Piece, replicated_pieces, replicated_views
from protoclip_scale.engine.optimizer import Groups, adamw_settings
from protoclip_scale.engine.strategy.base import MOMENTS, Strategy, Update, spoilt_if_not_finite
from protoclip_scale.recipe.schema import Optim

if TYPE_CHECKING:
    from protoclip_scale.engine.checkpoint.reading import Reader


def distributed(model: nn.Module, device: torch.device) -> nn.parallel.DistributedDataParallel:
    """DDP that leaves buffers alone, since ``GroupBatchNorm`` keeps its own equal on all ranks, and inputs where they are: token lengths on the CPU, with
    which the text tower cuts its batch without waiting for the GPU."""
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    no_sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the name changed in torch 2.15
    # Convolutions in channels_last give 1 x 1 weights gradients of other strides but the same memory.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, **{no_sync: False})


class Replicated(Strategy):
    """One process, or DDP, which averages gradients while the backward pass runs."""

    @property
    def title(self) -> str:
        return "DDP" if self.accelerator.num_processes > 1 else "single process"

    def prepare(self, model: nn.Module, groups: Groups, settings: Optim) -> None:
        self.max_norm = settings.max_norm
        self.bare_model = model
        model.compute_dtype = self.precision.dtype
        self.optimizer = torch.optim.AdamW(groups, **adamw_settings(settings), fused=True)
        self.wrapped = distributed(model, self.device) if self.accelerator.num_processes > 1 else model

    def release(self) -> None:
        super().release()
        self.wrapped = None

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.wrapped(*inputs, **options)

    def backward(self, loss: torch.Tensor) -> None:
        spoilt_if_not_finite(loss * self.precision.scale.value if self.precision.scale else loss).backward()

    def update(self, stop: bool = False) -> Update:
        parameters, scale = [parameter for group in self.optimizer.param_groups for parameter in group["params"]], self.precision.scale
        gradients = [parameter.grad for parameter in parameters]
        norm = nn.utils.get_total_norm(gradients)
        if scale:
            norm = norm / scale.value
        # The norm is the same on all ranks; that it is finite is agreed all the same, since nothing may ever part them.
        flags = collectives.all_reduce(torch.stack([torch.full_like(norm, stop), (~norm.isfinite()).to(norm.dtype)]), "max")
        stop, lost, norm_here = collectives.host_values(torch.cat([flags, norm[None]]))
        taken = not lost
        if taken:
            if scale:
                torch._foreach_mul_(gradients, 1 / scale.value)
            if self.max_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
            self.optimizer.step()
        if scale:
            scale.update(overflowed=not taken)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm_here, taken, bool(stop))

    def gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for name, parameter in self.bare_model.named_parameters():
            yield name, parameter.grad

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.bare_model.state_dict().items()

    def weight_pieces(self) -> Iterator[Piece]:
        yield from replicated_views({f"model/{name}": tensor for name, tensor in self.bare_model.state_dict().items()})

    def optimizer_pieces(self) -> Iterator[Piece]:
        tensors = {}
        for name, parameter in self._named_parameters():
            tensors |= {f"optimizer/{name}/{moment}": value for moment, value in self.optimizer.state.get(parameter, {}).items()}
        yield from replicated_pieces(tensors)

    def _named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for group in self.optimizer.param_groups:
            yield from zip(group["names"], group["params"], strict=True)

    def load(self, reader: "Reader") -> None:
        for name, parameter in self._named_parameters():
            key = f"optimizer/{name}"
            if f"{key}/step" in reader:
                # whatever they are stored as: a model may train in float64
                moments = {moment: reader.tensor(f"{key}/{moment}").to(parameter) for moment in MOMENTS}
                self.optimizer.state[parameter] = {"step": reader.tensor(f"{key}/step").to(parameter.device), **moments}
