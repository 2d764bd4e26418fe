"""What every tower returns, so that token-level objectives need no towers of their own. A tuple: the hooks of sharded strategies look for tensors in those."""

from typing import NamedTuple

import torch


class TowerOutput(NamedTuple):
    """``pooled`` [B, D] before any projection; ``tokens`` [B, T, D'] after the last norm, class token first if there is one;
    ``mask`` [B, T] true where a token counts; ``layers`` the states after each block [B, T_l, D_l], on request."""

    pooled: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    layers: tuple[torch.Tensor, ...] | None = None
