"""Weights of a TorchScript archive (OpenAI's files are such), without the program inside: its objects are read as folders of named tensors.

An archive of torch.jit.save is a ZIP: PREFIX/data.pkl holds the tree of modules as a pickle, PREFIX/data/N the bytes of storage N, PREFIX/code the program, which is not opened.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

_MODULES = "__torch__."  # how classes of the program inside are named
_KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether a ZIP is an archive of torch.jit.save."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """{'visual.conv1.weight': tensor, ...}: parameters, buffers and other tensors that modules hold, as they were saved.

    Raises pickle.UnpicklingError for any object that is neither a tensor nor a module and for compressed tensors; whatever zipfile and pickle raise for those that are not whole.
    """
    with zipfile.ZipFile(path) as archive:
        pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), "data.pkl")
        with archive.open(_stored(archive, pickled)) as file:
            root = _Reader(file, archive, pickled.removesuffix("data.pkl")).load()
    return dict(_tensors(root, ""))


class _Module:
    """Stands for an object of any class of the program inside; holds what was saved of it and does nothing."""

    def __setstate__(self, state: Any) -> None:
        self.held = state if isinstance(state, dict) else {}


class _Reader(pickle.Unpickler):
    """Knows tensors, modules, and nothing that could run code."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, prefix: str):
        super().__init__(file)
        self._archive, self._prefix, self._storages = archive, prefix, {}

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}".startswith(_MODULES):
            return _Module
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is neither a tensor nor a module")

    def persistent_load(self, place: Any) -> torch.storage.TypedStorage:
        kind, dtype, key, _, size = place
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it holds a {kind}, which is no tensor")
        if key not in self._storages:
            member = f"{self._prefix}data/{key}"
            if (found := _stored(self._archive, member).file_size) != size * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} has {found:,} bytes, not the {size * dtype.itemsize:,} of its tensors")
            untyped = torch.frombuffer(bytearray(self._archive.read(member)), dtype=torch.uint8).untyped_storage() if found else torch.UntypedStorage(0)
            self._storages[key] = torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
        return self._storages[key]


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A member that is as large as it is in the file: torch compresses the program alone, and what is compressed can grow without limit."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"{name} is compressed, which torch does not do")
    return member


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in module.held.items() if isinstance(module, _Module) else ():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value.detach()
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
