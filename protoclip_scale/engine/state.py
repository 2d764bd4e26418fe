"""The state of training as tensors with names that do not depend on the strategy, the world size or any wrapper: ``model/NAME`` for weights and buffers,
``ema/NAME`` for their averages,
``optimizer/NAME/MOMENT`` for AdamW's moments and its steps, parameter by parameter."""

from torch import nn

from protoclip_scale.engine.checkpoint import Reader
from protoclip_scale.engine.checkpoint.pieces import WEIGHTS


def load_weights(model: nn.Module, reader: Reader) -> None:
    """Weights and buffers into an unwrapped model, one tensor after the other; every name must match."""
    own = {f"{WEIGHTS['live']}{name}": tensor for name, tensor in model.state_dict().items()}
    saved = set(reader.names(WEIGHTS["live"]))
    assert own.keys() == saved, f"the checkpoint's tensors are not the model's: {sorted(own.keys() ^ saved)[:5]}"
    for name, tensor in own.items():
        tensor.copy_(reader.tensor(name))
