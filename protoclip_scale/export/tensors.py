"""Files of an export's weights: planned by name, written and compared one tensor at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import safe_open

from protoclip_scale.errors import UserError
from protoclip_scale.export.source import stays_float32
from protoclip_scale.models.open_clip_keys import Made
from protoclip_scale.tensor_files import Entry, write_shard

Plan = Mapping[str, Made]  # a file's names -> what they are made of
Read = Callable[[str], torch.Tensor]


def planned_shapes(plan: Plan, structure: Mapping[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a file. ``structure``: the model's state dict, whose values are not looked at."""
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in structure.items()}
    made = {name: each.make(*(empty[source] for source in each.sources)) for name, each in plan.items()}
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}


def write_tensors(path: Path, plan: Plan, structure: Mapping[str, torch.Tensor], read: Read, dtype: torch.dtype, metadata: Mapping[str, str] = MappingProxyType({"format": "pt"})) -> str:
    """Write a file of floats in ``dtype`` (see ``stays_float32``); its sha256. Holds one parameter at a time."""
    entries = [Entry(name, _stored(plan[name], own, dtype), shape) for name, (shape, own) in planned_shapes(plan, structure).items()]
    entries.sort(key=lambda entry: (-entry.dtype.itemsize, entry.name))  # as the format wants them
    return write_shard(path, entries, (made_of(plan[entry.name], read).to(entry.dtype) for entry in entries), dict(metadata))


def made_of(made: Made, read: Read) -> torch.Tensor:
    return made.make(*(read(source) for source in made.sources))


def _stored(made: Made, own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    if not own.is_floating_point:
        return own
    return torch.float32 if stays_float32(made.sources[0]) else dtype


def compare_tensors(path: Path, plan: Plan, read: Read) -> None:
    """Raises UserError, naming the first, unless the file holds the planned tensors and no others, each with the model's values rounded to its own dtype."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if names != set(plan):
            raise UserError(f"{path}: it lacks or adds {sorted(names ^ set(plan))[0]} ({len(names ^ set(plan))} such); it is not an export of this model, write it again")
        for name, made in plan.items():
            found, expected = file.get_tensor(name), made_of(made, read)
            if found.shape != expected.shape or not torch.equal(found, expected.to("cpu", found.dtype)):
                raise UserError(f"{path}: {name} differs from the model's; it is an export of other weights, or damaged: write it again")
