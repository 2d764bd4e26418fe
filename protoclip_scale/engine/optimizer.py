"""AdamW over the reference's parameter groups: {visual, other} x {decay, no decay} (methods 6.1), each part that enters training later by itself, and
each layer by itself where learning rates fall from layer to layer."""

from typing import TYPE_CHECKING, Any

from protoclip_scale.models.layers import image_depths, text_depths
from protoclip_scale.recipe.schema import Optim

if TYPE_CHECKING:
    from protoclip_scale.models.dual_encoder import DualEncoder

Groups = list[dict[str, Any]]  # a group's params, their names, its side, by which the schedule sets its learning rate, a factor of that, and its weight_decay


def parameter_groups(model: "DualEncoder", settings: Optim) -> Groups:
    """Groups of the parameters that train. All of a group have taken the same number of steps: sharded strategies count them per group."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = rate_factors(model, settings)
    grouped: dict[tuple[str, bool, str, float], list[str]] = {}
    for name, (side, decays, later) in model.parameter_groups().items():
        if name in named:
            grouped.setdefault((side, decays, later, factors[name]), []).append(name)
    groups = [
        {"params": [named[name] for name in names], "names": names, "side": side, "factor": factor, "weight_decay": settings.weight_decay if decays else 0.0}
        for (side, decays, _, factor), names in sorted(grouped.items())
    ]
    assert sum(len(group["names"]) for group in groups) == len(named)
    return groups


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
