"""What tests of pure losses share: points on a circle, gradients of several tensors, and a batch split among simulated ranks."""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F


def angles(*degrees: float) -> torch.Tensor:
    """float64 [n, 2] unit rows."""
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=-1)


def number(value: float) -> torch.Tensor:
    """float64 (1,), as temperatures come."""
    return torch.tensor([value], dtype=torch.float64)


def unit_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def gradients(loss_of: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The loss and its gradient in each tensor, zeros where none arrives; a factor makes sure that the incoming gradient is used."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = loss_of(*leaves)
    found = torch.autograd.grad(2.5 * loss, leaves, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves, found, strict=True))]


def difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference, relative to each expected tensor's largest value."""
    assert [each.shape for each in found] == [each.shape for each in expected]
    return max(((one - other).abs().max() / other.abs().max().clamp(min=1e-12)).item() for one, other in zip(found, expected, strict=True))


def over_ranks(loss_of_rank: Callable[..., torch.Tensor], world: int, gather: Callable[[torch.Tensor], torch.Tensor] = lambda whole: whole) -> Callable[..., torch.Tensor]:
    """The mean over ``world`` ranks of ``loss_of_rank(columns_B, local, gathered, scales)``, a function of tensors [N, ...] and scales (1,).

    ``local`` and ``gathered`` hold the rank's rows and all rows of each tensor [N, ...], N > 1; ``gather`` makes a wrong gather, such as one without gradient.
    """

    def loss_of(*tensors: torch.Tensor) -> torch.Tensor:
        rows, scales = [each for each in tensors if len(each) > 1], [each for each in tensors if len(each) == 1]
        parts = torch.arange(len(rows[0])).chunk(world)
        return torch.stack([loss_of_rank(part, [each[part] for each in rows], [gather(each) for each in rows], scales) for part in parts]).mean()

    return loss_of


def assert_law_1(loss_of_rank: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
    """2 and 4 ranks give the loss and the gradients of one; a gather without gradient, SLIP's mistake, does not (methods 0.2)."""
    whole = gradients(over_ranks(loss_of_rank, 1), tensors)
    for world in (2, 4):
        assert difference(gradients(over_ranks(loss_of_rank, world), tensors), whole) <= 1e-9
    assert difference(gradients(over_ranks(loss_of_rank, 2, torch.Tensor.detach), tensors), whole) > 1e-3
