"""Arithmetic of the towers, and loss scaling for fp16: the same under every strategy."""

from typing import Any

import torch

from protoclip_scale.errors import UserError


class LossScale:
    """Dynamic loss scaling by torch.amp.GradScaler's rule: halved when a gradient overflows, doubled after ``INTERVAL`` steps without."""

    START, INTERVAL = 2.0**16, 2000

    def __init__(self, value: float = START):
        self.value = value
        self.good_steps = 0

    def update(self, overflowed: bool) -> None:
        """After each step, taken or skipped."""
        if overflowed:
            self.value, self.good_steps = self.value / 2, 0
            return
        self.good_steps += 1
        if self.good_steps == self.INTERVAL:
            self.value, self.good_steps = self.value * 2, 0


class Precision:
    """``dtype``: what autocast runs the towers in, None for fp32; weights, gradients and their reductions are fp32 always. ``scale``: for fp16.

    Raises UserError for fp16 on a CPU, where autocast leaves everything as it is.
    """

    def __init__(self, name: str, device: torch.device):
        if name == "fp16" and device.type == "cpu":
            raise UserError("optim.precision fp16 needs a GPU: on a CPU it is slower and scales nothing; use bf16 or fp32")
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scale = LossScale() if name == "fp16" else None

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale.value, "_growth_tracker": self.scale.good_steps} if self.scale else {}  # GradScaler's names, as older checkpoints have them

    def load(self, state: dict[str, Any]) -> None:
        if self.scale and state:
            self.scale.value, self.scale.good_steps = state["scale"], state["_growth_tracker"]
