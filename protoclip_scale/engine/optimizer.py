"""AdamW over the reference's parameter groups: {visual, other} x {decay, no decay} (methods 6.1), and each part that enters training later by itself."""

from typing import TYPE_CHECKING, Any

from protoclip_scale.recipe.schema import Optim

if TYPE_CHECKING:
    from protoclip_scale.models.dual_encoder import DualEncoder

Groups = list[dict[str, Any]]  # a group's params, their names, its side, by which the schedule sets its learning rate, and its weight_decay


def parameter_groups(model: "DualEncoder", settings: Optim) -> Groups:
    """Groups of the parameters that train. All of a group have taken the same number of steps: sharded strategies count them per group."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grouped: dict[tuple[str, bool, str], list[str]] = {}
    for name, (side, decays, later) in model.parameter_groups().items():
        if name in named:
            grouped.setdefault((side, decays, later), []).append(name)
    groups = [
        {"params": [named[name] for name in names], "names": names, "side": side, "weight_decay": settings.weight_decay if decays else 0.0}
        for (side, decays, _), names in sorted(grouped.items())
    ]
    assert sum(len(group["names"]) for group in groups) == len(named)
    return groups


def adamw_settings(settings: Optim) -> dict[str, Any]:
    """The keyword arguments of AdamW that are not a group's."""
    return {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
