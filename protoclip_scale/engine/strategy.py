"""The one file that knows how a model is spread over ranks: accelerate's process group, DDP, precision, clipping, the step.

On a machine without a GPU accelerate has two silent traps (one process instead of W; a model that is not wrapped), so the
world is checked against the launcher's promise. Arithmetic in the towers is set here, not by accelerate: the recipe owns it.
"""

import contextlib
import inspect
import os
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from protoclip_scale.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


def refuse_foreign_settings() -> None:
    """UserError if accelerate's configuration sets what the recipe owns, or a strategy that this release has not."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "fp32"):
        raise UserError(f"mixed_precision is {asked} in accelerate's configuration, but the recipe's optim.precision owns it; set mixed_precision: 'no'")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError("accelerate's configuration asks for DeepSpeed or FSDP, which this release does not train with; use launch/accelerate/cpu.yaml or ddp.yaml")


def alone() -> bool:
    """Whether this is the only process: it can look at its data before accelerate is imported."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def start(timeout_minutes: float) -> "Accelerator":
    """The process group, on GPUs if there are any, otherwise on CPUs over gloo.

    Raises:
        UserError: the launcher promised more processes than accelerate made, or asks for a precision, which is the recipe's.
    """
    from accelerate import Accelerator  # a second
    from accelerate.utils import InitProcessGroupKwargs

    refuse_foreign_settings()
    use_cpu = not torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=use_cpu,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes))],
    )
    promised = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != promised:
        raise UserError(f"the launcher promised {promised} ranks but {accelerator.num_processes} run; launch with --config_file launch/accelerate/cpu.yaml or ddp.yaml")
    return accelerator


def distributed(model: nn.Module, device: torch.device) -> nn.parallel.DistributedDataParallel:
    """DDP that leaves buffers alone: ``GroupBatchNorm`` keeps its own equal on all ranks."""
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    no_sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the name changed in torch 2.15
    # Convolutions in channels_last give 1 x 1 weights gradients of other strides but the same memory.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return nn.parallel.DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device], **{no_sync: False})


class Precision:
    """Autocast for the towers, and dynamic loss scaling for fp16."""

    def __init__(self, name: str, device: torch.device):
        if name == "fp16" and device.type == "cpu":
            raise UserError("optim.precision fp16 needs a GPU: on a CPU it is slower and scales nothing; use bf16 or fp32")
        self.device = device
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def state(self) -> dict[str, Any]:
        return self.scaler.state_dict() if self.scaler else {}

    def load(self, state: dict[str, Any]) -> None:
        if self.scaler and state:
            self.scaler.load_state_dict(state)


class Strategy:
    """A model and its optimiser as the ranks hold them; DDP when there are several."""

    def __init__(self, accelerator: "Accelerator", precision: Precision):
        self.accelerator = accelerator
        self.precision = precision
        self.device = accelerator.device

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Wrap a model whose weights are final; call again after a change of what is trained."""
        self.bare_model = model
        self.optimizer = optimizer
        self.model = distributed(model, self.device) if self.accelerator.num_processes > 1 else model

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients averaged over ranks, scaled for fp16."""
        (self.precision.scaler.scale(loss) if self.precision.scaler else loss).backward()

    def clip(self, max_norm: float | None) -> torch.Tensor:
        """The total gradient norm before clipping (0-dim)."""
        if self.precision.scaler:
            self.precision.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)

    def step(self) -> bool:
        """Take the optimiser step; False if loss scaling skipped it because gradients overflowed."""
        if not self.precision.scaler:
            self.optimizer.step()
            return True
        before = self.precision.scaler.get_scale()
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        return self.precision.scaler.get_scale() >= before
