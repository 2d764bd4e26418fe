"""How deep in its tower a parameter lies, counted from the top: for learning rates that fall from layer to layer (``optim.layer_decay``)."""

from types import SimpleNamespace

from timm.models import group_parameters
from torch import nn

from protoclip_scale.errors import UserError
from protoclip_scale.models.image import ImageTower
from protoclip_scale.models.text import TextTower

_TOP = "projection"  # stands where timm has the classifier: a name that is in no layer


def image_depths(tower: ImageTower) -> dict[str, int]:
    """By parameter: 0 for what timm counts to a model's head, 1 for the last block, and so on to the stem.

    Layers are those of timm's ``group_matcher``, as its own optimisers decay them. Raises UserError for a model without any.
    """
    trunk = tower.trunk
    try:
        matcher = trunk.group_matcher(coarse=False)
    except (AttributeError, NotImplementedError, AssertionError):
        matcher = {}
    named = [*trunk.named_parameters(), (_TOP, None)]
    layers = group_parameters(SimpleNamespace(named_parameters=lambda: named), matcher, reverse=True)
    top = layers.pop(_TOP)
    if not top:
        raise UserError(f"optim.layer_decay.image: timm tells no layers of model.image.name {tower.name}; leave image out, or choose another tower")
    return {f"trunk.{name}": top - layer for name, layer in layers.items()}


def text_depths(tower: TextTower) -> dict[str, int]:
    """By parameter: 1 for the last layer, and so on to the embeddings; what follows the layers (a last norm) counts to the last one, as timm counts it.

    Layers are the encoder's largest list of modules. Raises UserError if it has none.
    """
    encoder = tower.encoder
    lists = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise UserError(f"optim.layer_decay.text: the encoder model.text.name {tower.name} has no list of layers; leave text out, or choose another encoder")
    name = max(lists, key=lambda each: sum(parameter.numel() for parameter in lists[each].parameters()))
    blocks, prefix = lists[name], f"{name}."
    tables = {id(module.weight) for module in encoder.modules() if isinstance(module, nn.Embedding)}
    depths, reached = {}, False
    for parameter_name, parameter in encoder.named_parameters():
        if parameter_name.startswith(prefix):
            reached = True
            depth = len(blocks) - int(parameter_name.removeprefix(prefix).split(".")[0])
        else:
            depth = 1 if reached and id(parameter) not in tables else len(blocks) + 1
        depths[f"encoder.{parameter_name}"] = depth
    return depths
