"""The state of training as tensors with names that do not depend on the strategy, the world size or any wrapper."""

import torch
from torch import nn

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {name: p for group in optimizer.param_groups for name, p in zip(group["names"], group["params"], strict=True)}


def collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """``model/NAME`` for weights and buffers, ``optimizer/NAME/MOMENT`` for AdamW's moments and per-parameter step."""
    tensors = {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for name, parameter in _named_parameters(optimizer).items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{moment}"] = value.detach()
    return tensors


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Weights and buffers into an unwrapped model; every name must match."""
    model.load_state_dict({name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}, strict=True)


def load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """AdamW's moments; a parameter that never trained has none and starts fresh, a frozen one's are dropped."""
    for name, parameter in _named_parameters(optimizer).items():
        moments = {m: tensors[f"optimizer/{name}/{m}"] for m in _MOMENTS if f"optimizer/{name}/{m}" in tensors}
        if moments:
            optimizer.state[parameter] = {
                m: (t if m == "step" else t.to(parameter.dtype)).clone().to(parameter.device) for m, t in moments.items()
            }
