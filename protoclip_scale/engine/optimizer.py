"""Optimisers over the reference's parameter groups: {visual, other} x {decay, no decay} (methods 6.1), each part that enters training later by itself, and
each layer by itself where learning rates fall from layer to layer.

AdamW everywhere, or AdamW with SGD for the text side (DeCLIP's paper, methods 3.3), or LAMB. What they remember has one form in checkpoints: a tensor per parameter and key of ``STATE``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from timm.optim import Lamb

from protoclip_scale.models.layers import image_depths, text_depths
from protoclip_scale.models.passes import side_of
from protoclip_scale.recipe.schema import Optim

if TYPE_CHECKING:
    from protoclip_scale.models.dual_encoder import DualEncoder

Groups = list[dict[str, Any]]  # a group's params, their names, its side, by which the schedule sets its learning rate, a factor of that, its weight_decay, and whether SGD steps on it
TITLES = {"adamw": "AdamW", "adamw_sgd": "AdamW and SGD", "lamb": "LAMB"}  # by optim.name
STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")


def parameter_groups(model: "DualEncoder", settings: Optim) -> Groups:
    """Groups of the parameters that train. All of a group have taken the same number of steps: sharded strategies count them per group."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors, sgd = rate_factors(model, settings), settings.sgd
    with_sgd = text_parts(model) if sgd else frozenset()
    grouped: dict[tuple[str, bool, str, float, bool], list[str]] = {}
    for name, (side, decays, later) in model.parameter_groups().items():
        if name in named:
            grouped.setdefault((side, decays, later, factors[name], name.split(".")[0] in with_sgd), []).append(name)
    groups = []
    for (side, decays, _, factor, by_sgd), names in sorted(grouped.items()):
        own = sgd if by_sgd else settings  # SGD's rate keeps its proportion to AdamW's at every step of the schedule
        groups.append(
            {
                "params": [named[name] for name in names],
                "names": names,
                "side": side,
                "factor": factor * own.lr / settings.lr,
                "weight_decay": own.weight_decay if decays else 0.0,
                "sgd": by_sgd,
            }
        )
    assert sum(len(group["names"]) for group in groups) == len(named)
    return groups


def text_parts(model: "DualEncoder") -> frozenset[str]:
    """The parts of the model that belong to the text tower alone; temperatures belong to none."""
    return frozenset({"text_tower", "text_projection"} | {head.part(kind) for kind, head in model.heads.items() if side_of(kind, model.heads) == "text"})


def rate_factors(model: "DualEncoder", settings: Optim) -> dict[str, float]:
    """What every parameter's learning rate is multiplied with: ``optim.layer_decay`` to the power of its depth in its tower; 1 in projections, heads, temperatures.

    Raises UserError for a tower that is to have falling rates and has no layers.
    """
    factors = {name: 1.0 for name, _ in model.named_parameters()}
    for side, depths_of in (("image", image_depths), ("text", text_depths)):
        decay = getattr(settings.layer_decay, side, 1.0)
        if decay < 1:
            tower = f"{side}_tower"
            factors |= {f"{tower}.{name}": decay**depth for name, depth in depths_of(getattr(model, tower)).items()}
    return factors


def adamw_settings(settings: Optim) -> dict[str, Any]:
    """The keyword arguments of AdamW that are not a group's."""
    return {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}


class AdamWAndSgd(torch.optim.Optimizer):
    """SGD with momentum for the groups that say so, AdamW for the others; both step on the same groups and state as this one shows."""

    def __init__(self, groups: Groups, settings: Optim):
        super().__init__(groups, {})
        sgd = settings.sgd
        adamw_groups, sgd_groups = ([group for group in self.param_groups if group["sgd"] is by_sgd] for by_sgd in (False, True))
        self._both = []
        if adamw_groups:
            self._both.append(torch.optim.AdamW(adamw_groups, **adamw_settings(settings), fused=True))
        if sgd_groups:
            self._both.append(torch.optim.SGD(sgd_groups, lr=sgd.lr, momentum=sgd.momentum, nesterov=sgd.nesterov))
        for each in self._both:
            each.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for each in self._both:
            each.step()


def _lamb(groups: Groups, settings: Optim) -> torch.optim.Optimizer:
    return Lamb(groups, **adamw_settings(settings), max_grad_norm=None)  # the strategy clips


OPTIMIZERS: dict[str, Callable[[Groups, Optim], torch.optim.Optimizer]] = {
    "adamw": lambda groups, settings: torch.optim.AdamW(groups, **adamw_settings(settings), fused=True),
    "adamw_sgd": AdamWAndSgd,
    "lamb": _lamb,
}


def make_optimizer(groups: Groups, settings: Optim) -> torch.optim.Optimizer:
    """``optim.name`` over whole parameters."""
    return OPTIMIZERS[settings.name](groups, settings)


def remembered(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What it remembers, by ``NAME/KEY``; nothing of parameters that have taken no step. LAMB counts the steps of a group, which are those of each of its parameters."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = {key: value for key, value in optimizer.state.get(parameter, {}).items() if value is not None}
            if state and "step" in group:
                state["step"] = torch.as_tensor(group["step"], dtype=torch.float32)
            tensors |= {f"{name}/{key}": value for key, value in state.items()}
    return tensors


def remember(optimizer: torch.optim.Optimizer, read: Callable[[str], torch.Tensor | None]) -> None:
    """Put back what ``read`` gives for ``NAME/KEY``, None where there is nothing; whatever it is stored as, since a model may train in float64."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = {key: value for key in STATE if (value := read(f"{name}/{key}")) is not None}
            if state and isinstance(optimizer, Lamb):
                group["step"] = state.pop("step")
            if state:
                optimizer.state[parameter] = {key: value.to(parameter.device) if key == "step" else value.to(parameter) for key, value in state.items()}
