"""Tensors out of a checkpoint, whoever wrote which range of them: only what is asked for is read."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from protoclip_scale import collectives
from protoclip_scale.engine.checkpoint.finding import find
from protoclip_scale.engine.checkpoint.pieces import WEIGHTS
from protoclip_scale.errors import UserError
from protoclip_scale.shared_files import once_seen
from protoclip_scale.tensor_files import Shard

_OPEN_FILES = 128


class Reader:
    """The named tensors of a checkpoint, on the CPU.

    Memory is what was asked for. Raises UserError, naming the file, where values cannot be read; ``find`` has compared digests before.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self._tensors: dict[str, dict[str, Any]] = manifest["tensors"]
        self._files = list(manifest["files"])
        self._shards: dict[str, Shard] = {}
        self._old_spans = self._spans_of_files() if manifest["schema"] == 1 else {}

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self._tensors if name.startswith(prefix)]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self._tensors[name]["dtype"])

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        shape = self.shape(name)
        return self.slice(name, 0, torch.Size(shape).numel()).reshape(shape)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Values [start, stop) of the flattened tensor, 1-D."""
        values = torch.empty(stop - start, dtype=self.dtype(name))
        found = 0
        for file, first, end in self._old_spans.get(name) or self._tensors[name].get("pieces", ()):
            low, high = max(first, start), min(end, stop)
            if low < high:
                self._read(values[low - start : high - start], self._files[file], f"{name}@{first}", low - first)
                found += high - low
        if found != stop - start:
            raise UserError(f"checkpoint {self.folder}: {name} has {found} of {stop - start} values; resume from another checkpoint with --resume")
        return values

    def _read(self, out: torch.Tensor, file: str, key: str, start: int) -> None:
        try:
            self._shard(file).read_into(out, key, start)
        except KeyError:
            raise self._unreadable(file, f"it holds no {key}") from None
        except (OSError, ValueError) as error:
            raise self._unreadable(file, error) from None

    def _shard(self, file: str) -> Shard:
        if file not in self._shards:
            if len(self._shards) == _OPEN_FILES:
                self._shards.pop(next(iter(self._shards)))
            self._shards[file] = once_seen(self.folder / file, lambda: Shard(self.folder / file))
        return self._shards[file]

    def _unreadable(self, file: str, why: object) -> UserError:
        return UserError(f"checkpoint {self.folder}: {file} cannot be read ({why}); resume from another checkpoint with --resume")

    def _spans_of_files(self) -> dict[str, list[tuple[int, int, int]]]:
        """(number of the file, start, stop) of every tensor's pieces, as the files themselves say."""
        spans: dict[str, list[tuple[int, int, int]]] = {}
        for number, file in enumerate(self._files):
            try:
                for key, _, (length,) in self._shard(file).entries():
                    name, _, start = key.rpartition("@")
                    spans.setdefault(name, []).append((number, int(start), int(start) + length))
            except (OSError, ValueError) as error:
                raise self._unreadable(file, error) from None
        return spans


def read_tensors(folder: Path, manifest: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors whose names start with ``prefix``."""
    reader = Reader(folder, manifest)
    return {name: reader.tensor(name) for name in reader.names(prefix)}


class Weights(NamedTuple):
    """The weights of a run's model in a checkpoint, unread: whose they are (``live`` or ``ema``), their names, and what reads one of them.
    ``reader``: all that the checkpoint holds; ``manifest``: what is known of it."""

    kind: str
    names: list[str]
    reader: Reader
    manifest: dict[str, Any]

    def read(self, name: str) -> torch.Tensor:
        return self.reader.tensor(WEIGHTS[self.kind] + name)


def open_weights(run_dir: Path | str, chosen: str = "latest", kind: str | None = None) -> Weights:
    """``kind``: whose weights; None takes the averaged ones if there are any.

    A collective: rank 0 chooses the checkpoint and compares all its digests, for all ranks.

    Raises UserError if there is no checkpoint, or none with averages where they are asked for.
    """
    folder, manifest, _ = collectives.from_rank_zero(lambda: find(Path(run_dir), chosen))
    reader = Reader(folder, manifest)
    kind = kind or ("ema" if reader.names(WEIGHTS["ema"]) else "live")
    names = [name.removeprefix(WEIGHTS[kind]) for name in reader.names(WEIGHTS[kind])]
    if not names:
        raise UserError(f"--weights {kind}: {folder} holds no averaged weights, its run had no optim.ema; leave --weights away")
    return Weights(kind, names, reader, manifest)


def read_weights(run_dir: Path | str, chosen: str = "latest", kind: str | None = None) -> tuple[str, dict[str, torch.Tensor]]:
    """Whose weights were read, and the state dict of a run's model; see ``open_weights``."""
    weights = open_weights(run_dir, chosen, kind)
    return weights.kind, {name: weights.read(name) for name in weights.names}
