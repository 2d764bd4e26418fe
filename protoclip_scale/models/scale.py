"""The learned inverse temperature."""

import torch
from torch import nn

from protoclip_scale.recipe import schema


class _Bound(torch.autograd.Function):
    """Clamp whose backward stops only a gradient that would push the value further out.

    A plain clamp has no gradient outside the bounds, so a parameter that left them would never come back.
    """

    @staticmethod
    def forward(ctx, value, minimum, maximum):
        ctx.save_for_backward(value)
        ctx.bounds = minimum, maximum
        return value.clamp(minimum, maximum)

    @staticmethod
    def backward(ctx, gradient):
        (value,) = ctx.saved_tensors
        minimum, maximum = ctx.bounds
        # descent moves against the gradient: outwards is a negative gradient above, a positive one below
        outwards = ((value > maximum) & (gradient < 0)) | ((value < minimum) & (gradient > 0))
        return gradient.masked_fill(outwards, 0), None, None


class LogitScale(nn.Module):
    """exp of a learned logarithm bounded to [minimum, maximum]; shape (1,), since 0-dim parameters break ZeRO."""

    def __init__(self, settings: schema.LogitScale):
        super().__init__()
        self.minimum, self.maximum = settings.minimum, settings.maximum
        self.log = nn.Parameter(torch.full((1,), settings.init))

    def bounded_log(self) -> torch.Tensor:
        """The logarithm as used, inside its bounds, shape (1,)."""
        return _Bound.apply(self.log, self.minimum, self.maximum)

    def forward(self) -> torch.Tensor:
        return self.bounded_log().exp()
