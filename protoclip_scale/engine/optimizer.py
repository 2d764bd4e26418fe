"""AdamW over the reference's parameter groups: {visual, other} x {decay, no decay} (methods 6.1)."""

import torch

from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.recipe.schema import Optim


def build_optimizer(model: DualEncoder, settings: Optim) -> torch.optim.AdamW:
    """AdamW over the parameters that train; each group carries its ``side``, by which the schedule sets its learning rate."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grouped: dict[tuple[str, bool], list[str]] = {}
    for name, (side, decays) in model.parameter_groups().items():
        if name in named:
            grouped.setdefault((side, decays), []).append(name)
    groups = [
        {"params": [named[name] for name in names], "names": names, "side": side, "weight_decay": settings.weight_decay if decays else 0.0}
        for (side, decays), names in sorted(grouped.items())
    ]
    assert sum(len(group["names"]) for group in groups) == len(named)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, learning_rates: dict[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rates[group["side"]]


def skip_parameters(optimizer: torch.optim.Optimizer, names: frozenset[str]) -> None:
    """Drop the gradients of parameters that no active objective uses.

    Their gradient is an exact zero, but AdamW would still count the step, decay what decays and follow its momentum; a parameter
    without a gradient is left untouched, so a head enters training after the warm-up as if it had just been made.
    """
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in names:
                parameter.grad = None
