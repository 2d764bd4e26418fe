"""State dicts out of files that others wrote, without running what such files can hold: safetensors, torch's files by ``weights_only``, and TorchScript archives."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from protoclip_scale.errors import UserError
from protoclip_scale.models.torchscript_weights import is_torchscript, read_torchscript

_ALLOWED = [argparse.Namespace]  # a bag of plain values: what training scripts keep their arguments in
_STATES = ("state_dict", "model", "model_state_dict")  # where checkpoints keep the weights
_PREFIX = "module."  # of DistributedDataParallel


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, floats as float32, without the prefix of DistributedDataParallel.

    Raises UserError for files that would run code, and for what holds no weights.
    """
    found = _content(path)
    state = next((found[key] for key in _STATES if isinstance(found.get(key), Mapping)), found)
    tensors = {str(name).removeprefix(_PREFIX): tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no weights: it has {', '.join(map(str, list(found)[:5])) or 'nothing'}; name a checkpoint with a state dict")
    return {name: tensor.detach().float() if tensor.is_floating_point() else tensor.detach() for name, tensor in tensors.items()}


def _content(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the file of a checkpoint")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:
            raise UserError(f"{path} is no whole safetensors file ({_one_line(error)}); download it again") from error
    is_zip = zipfile.is_zipfile(path)
    if is_zip and is_torchscript(path):
        try:
            return read_torchscript(path)
        except Exception as error:  # what a torn or made-up pickle raises has no bounds
            raise UserError(f"{path} is a TorchScript archive that cannot be read ({_one_line(error)}); download it again") from error
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        needs = re.search(r"GLOBAL ([\w.]+)", str(error))
        if needs:
            raise UserError(f"{path} holds objects of {needs[1]}, which are not read, since loading them runs code; where you trust it, save its weights alone: torch.save(torch.load(FILE, map_location='cpu', weights_only=False)['state_dict'], 'weights.pt')") from error
        raise UserError(f"{path} cannot be read ({_one_line(error)}); it must be a file of torch.save or safetensors, whole") from error
    if not isinstance(found, Mapping):
        raise UserError(f"{path} holds a {type(found).__name__}, not a state dict; name a checkpoint with one")
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
