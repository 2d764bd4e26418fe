"""The state of training as tensors with names that do not depend on the strategy, the world size or any wrapper: ``model/NAME`` for weights and buffers,
``ema/NAME`` for their averages,
``optimizer/NAME/MOMENT`` for the optimiser's moments and its steps, parameter by parameter, ``objective/NAME/KEY`` for what objectives remember."""

import torch
from torch import nn

from protoclip_scale.engine.checkpoint import Reader
from protoclip_scale.engine.checkpoint.pieces import WEIGHTS
from protoclip_scale.objectives import Objective, used

OBJECTIVE = "objective/"


def load_weights(model: nn.Module, reader: Reader) -> None:
    """Weights and buffers into an unwrapped model, one tensor after the other; every name must match."""
    own = {f"{WEIGHTS['live']}{name}": tensor for name, tensor in model.state_dict().items()}
    saved = set(reader.names(WEIGHTS["live"]))
    assert own.keys() == saved, f"the checkpoint's tensors are not the model's: {sorted(own.keys() ^ saved)[:5]}"
    for name, tensor in own.items():
        tensor.copy_(reader.tensor(name))


def of_objectives(objectives: dict[str, Objective]) -> dict[str, torch.Tensor]:
    """What the objectives of a run remember, by name in a checkpoint: the tensors themselves."""
    return {f"{OBJECTIVE}{name}/{key}": tensor for name, objective in used(objectives).items() for key, tensor in objective.state().items()}


@torch.no_grad()
def begin_objectives(objectives: dict[str, Objective], device: torch.device, reader: Reader | None) -> None:
    """Make it as a run starts with it, or as a checkpoint has it."""
    for objective in used(objectives).values():
        objective.prepare(device)
    own = of_objectives(objectives)
    if reader:
        saved = set(reader.names(OBJECTIVE))
        assert own.keys() == saved, f"the checkpoint's states of objectives are not the recipe's: {sorted(own.keys() ^ saved)[:5]}"
        for name, tensor in own.items():
            tensor.copy_(reader.tensor(name))
