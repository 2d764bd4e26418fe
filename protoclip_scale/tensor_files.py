"""Files in safetensors' format, written as a stream and read by ranges: neither ever holds a whole file, and a digest falls out of the writing.

The library itself wants all of a file's tensors at once, and reads through a memory map that counts as resident.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}
_LONGEST_HEADER = 100_000_000  # the format's own limit


class Entry(NamedTuple):
    """What a file holds under one name."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def write_shard(path: Path, entries: Sequence[Entry], values: Iterable[torch.Tensor], about: dict[str, str] | None = None) -> str:
    """Write a file and wait until it is on the disk; its sha256. ``values``: those of the entries, in their order, on any device; one is held at a time.

    The format wants the widest types first, so that each value lies at a multiple of its width.
    """
    header: dict[str, Any] = {"__metadata__": about} if about else {}
    offset = 0
    for entry in entries:
        stop = offset + prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (struct.pack("<Q", len(text)), text):
            digest.update(part)
            file.write(part)
        for entry, tensor in zip(entries, values, strict=True):
            assert tensor.dtype == entry.dtype and tensor.numel() == prod(entry.shape), f"{entry} is given {tensor.dtype} {tuple(tensor.shape)}"
            part = memoryview(_bytes_of(tensor.detach().cpu().contiguous()))
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor):
    """A contiguous tensor on the CPU as a NumPy array of bytes in the same memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


class Shard:
    """A file opened for reading. Raises OSError or ValueError if it is not in the format or cut short."""

    def __init__(self, path: Path):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (for as long as the shard lives)
        length = struct.unpack("<Q", self._file.read(8).ljust(8, b"\xff"))[0]
        if length > _LONGEST_HEADER:
            raise ValueError("it is no safetensors file")
        self._first = 8 + length  # byte of the values
        self._header: dict[str, Any] = json.loads(self._file.read(length))
        self.about: dict[str, str] = self._header.pop("__metadata__", {})

    def entries(self) -> list[Entry]:
        return [Entry(name, DTYPES[facts["dtype"]], tuple(facts["shape"])) for name, facts in self._header.items()]

    def read_into(self, out: torch.Tensor, name: str, start: int) -> None:
        """Fill ``out`` (1-D, on the CPU) with the values of ``name`` from its value ``start`` on. Raises KeyError if it holds none of that name."""
        facts = self._header[name]
        assert DTYPES[facts["dtype"]] == out.dtype, f"{name} holds {facts['dtype']}, not {out.dtype}"
        begin, end = facts["data_offsets"]
        wanted = memoryview(_bytes_of(out))
        first = self._first + begin + start * out.element_size()
        if first + len(wanted) > self._first + end:
            raise ValueError(f"{name} is shorter than it should be")
        self._file.seek(first)
        while wanted:
            read = self._file.readinto(wanted)
            if not read:
                raise ValueError(f"it ends inside {name}")
            wanted = wanted[read:]
