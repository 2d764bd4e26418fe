"""Saving a checkpoint: every rank streams its pieces into files of bounded size, and rank 0 publishes them by one atomic rename.

Nothing is visible under the final name before all files of all ranks are seen, sized and known to hold every value exactly once.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from protoclip_scale import collectives, standing
from protoclip_scale.engine.checkpoint.manifest import SCHEMA, WHOLE, write_manifest
from protoclip_scale.engine.checkpoint.pieces import WEIGHTS, Piece
from protoclip_scale.engine.checkpoint.reading import Reader
from protoclip_scale.engine.checkpoint.retention import remove
from protoclip_scale.engine.disk import disk_problem
from protoclip_scale.engine.faults import event
from protoclip_scale.errors import UserError
from protoclip_scale.files import sync
from protoclip_scale.shared_files import wait_for
from protoclip_scale.tensor_files import Entry, Shard, write_shard

FILE_BYTES = 512 * 2**20  # a rank's memory while it saves, where its tensors are on a GPU
SEEN_SECONDS = 120.0  # how long rank 0 looks for the files of the others: shared file systems lag
_WRITING = ".writing-"


def save(
    final: Path,
    pieces: Iterable[Piece],
    about: dict[str, Any],
    may_publish: Callable[[], None],
    weights: bool = False,
    file_bytes: int = FILE_BYTES,
    seen_seconds: float = SEEN_SECONDS,
) -> None:
    """Write and publish a checkpoint directory; a collective.

    ``pieces``: this rank's; those of all ranks together hold every value of every tensor once. ``about`` (JSON, with the ``attempt``) goes into the
    manifest. ``may_publish`` is called on rank 0 (before the first file, after the last, and before the rename) and raises if a newer attempt owns the run. ``weights``
    also writes the model's whole weights, and the averaged ones where there are any, under their plain names, which any safetensors reader loads; rank 0 does
    that alone, parameter by parameter.

    Raises:
        UserError: a file cannot be written, or one of another rank is not seen, naming both. What was published before stays.
    """
    rank, world = collectives.rank(), collectives.world_size()
    # Of this attempt alone: an older one that wakes up writes into its own.
    writing = final.with_name(f"{_WRITING}{about.get('attempt', 0):04d}-{final.name}")

    def begin() -> bool:
        may_publish()
        with _told(final, writing):
            _clear(final.parent, about.get("attempt", 0))
            writing.mkdir(parents=True)

        return final.is_dir()

    saved_before = collectives.from_rank_zero(begin)
    files, problem = [], None
    try:
        wait_for(writing)
        for entry in _write_files(writing, pieces, f"shard-{rank + 1:05d}-of-{world:05d}", file_bytes):
            files.append(entry)
            standing.got_on()
            event("checkpoint.shard")
    except OSError as error:
        problem = _unwritten(final, writing, error)
    gathered = collectives.all_gather_objects((files, problem))
    event("checkpoint.written")

    def publish() -> None:
        try:
            may_publish()
            for _, problem in gathered:
                if problem:
                    raise UserError(problem)
            written = {name: (rank, facts) for rank, (files, _) in enumerate(gathered) for name, facts in files}
            with _told(final, writing):
                _wait_until_seen(final, writing, written, seen_seconds)
                manifest = {**about, "files": {name: facts for name, (_, facts) in written.items()}, "tensors": _covered(writing, list(written))}
                reader = Reader(writing, {"schema": SCHEMA, **manifest})
                for key, kind in WHOLE.items() if weights else ():
                    if reader.names(WEIGHTS[kind]):
                        manifest[key] = write_weights(reader, writing / f"{key}.safetensors", WEIGHTS[kind])
                write_manifest(writing, manifest)
                sync(writing)
                may_publish()
                if saved_before:  # else an attempt that was frozen here would remove what its successor has published
                    remove(final)
                os.rename(writing, final)
                sync(final.parent)
        except UserError:
            shutil.rmtree(writing, ignore_errors=True)  # a full disk has room again
            raise

    collectives.from_rank_zero_patiently(publish, meanwhile=lambda: None)  # whole weights, and files that are late, take longer than a collective may
    event("checkpoint.published")


def write_weights(reader: Reader, path: Path, prefix: str) -> dict[str, Any]:
    """The whole weights and buffers of a model under their plain names, one after the other; {name, bytes, sha256}."""
    names = sorted(reader.names(prefix), key=lambda name: (-reader.dtype(name).itemsize, name))
    entries = [Entry(name.removeprefix(prefix), reader.dtype(name), reader.shape(name)) for name in names]

    def values() -> Iterator[torch.Tensor]:
        for name in names:
            standing.got_on()
            yield reader.tensor(name)

    digest = write_shard(path, entries, values(), about={"format": "pt"})
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def _write_files(folder: Path, pieces: Iterable[Piece], name: str, file_bytes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write pieces in files of about ``file_bytes`` each; (name, {bytes, sha256}) of each file once it is on the disk."""
    held: list[Piece] = []
    held_bytes, number = 0, 1
    for piece in _cut(pieces, file_bytes):
        size = piece.values.numel() * piece.values.element_size()
        if held and held_bytes + size > file_bytes:
            yield _write_file(folder / f"{name}-part-{number:04d}.safetensors", held)
            held, held_bytes, number = [], 0, number + 1
        held.append(Piece(piece.name, piece.start, piece.values.detach().cpu(), piece.shape))
        held_bytes += size
    if held:
        yield _write_file(folder / f"{name}-part-{number:04d}.safetensors", held)


def _cut(pieces: Iterable[Piece], file_bytes: int) -> Iterator[Piece]:
    for piece in pieces:
        values = max(1, file_bytes // piece.values.element_size())
        for first in range(0, max(1, piece.values.numel()), values):
            yield Piece(piece.name, piece.start + first, piece.values[first : first + values], piece.shape)


def _write_file(path: Path, pieces: list[Piece]) -> tuple[str, dict[str, Any]]:
    pieces = sorted(pieces, key=lambda piece: -piece.values.element_size())
    entries = [Entry(f"{piece.name}@{piece.start}", piece.values.dtype, (piece.values.numel(),)) for piece in pieces]
    shapes = {piece.name: piece.shape for piece in pieces}
    digest = write_shard(path, entries, (piece.values for piece in pieces), about={"shapes": json.dumps(shapes)})
    return path.name, {"bytes": path.stat().st_size, "sha256": digest}


def _wait_until_seen(final: Path, writing: Path, written: dict[str, tuple[int, dict[str, Any]]], seconds: float) -> None:
    """Until this machine sees every file with its size; UserError naming the first it does not see."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while True:
        seen = {entry.name: entry.stat().st_size for entry in os.scandir(writing)}
        missing = [(name, rank, facts["bytes"]) for name, (rank, facts) in written.items() if seen.get(name) != facts["bytes"]]
        if not missing:
            standing.got_on()
            return
        if time.monotonic() > deadline:
            name, rank, size = missing[0]
            found = f"{seen[name]} of {size} bytes" if name in seen else "nothing"
            raise UserError(
                f"checkpoint {final}: {name} of rank {rank} is not seen by rank 0 after {seconds:g} s ({found}); "
                "the run directory must be on a file system that all machines share (docs/launching.md)"
            )
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _covered(folder: Path, files: list[str]) -> dict[str, dict[str, Any]]:
    """{name: {shape, dtype, pieces}} of all tensors in the files, each piece as [number of the file, start, stop] in the flattened tensor."""
    tensors: dict[str, dict[str, Any]] = {}
    for number, file in enumerate(files):
        shard = Shard(folder / file)
        shapes = json.loads(shard.about["shapes"])
        for key, dtype, (length,) in shard.entries():
            name, _, start = key.rpartition("@")
            facts = {"shape": shapes[name], "dtype": str(dtype).removeprefix("torch.")}
            known = tensors.setdefault(name, {**facts, "pieces": []})
            assert {**facts, "pieces": known["pieces"]} == known, f"{name} is {facts} in {file} and {known} elsewhere"
            known["pieces"].append([number, int(start), int(start) + length])
    for name, facts in tensors.items():
        facts["pieces"].sort(key=lambda piece: piece[1:])
        end = 0
        for _, start, stop in facts["pieces"]:
            assert start == end, f"{name}: values {min(start, end)} to {max(start, end)} are given {'twice' if start < end else 'by no rank'}"
            end = stop
        assert end == prod(facts["shape"]), f"{name}: the ranks give {end} of {prod(facts['shape'])} values"
    return dict(sorted(tensors.items()))


def _clear(folder: Path, attempt: int) -> None:
    """Remove what this attempt and older ones have left half-written."""
    for left in folder.glob(f"{_WRITING}*"):
        number = left.name.removeprefix(_WRITING)[:4]
        if not number.isdigit() or int(number) <= attempt:
            shutil.rmtree(left, ignore_errors=True)


def _unwritten(final: Path, writing: Path, error: OSError) -> str:
    """One line on what this rank could not write."""
    told = disk_problem(error, writing) or f"{error.filename or writing} could not be written ({error.strerror or error}); start the same command again"
    return f"checkpoint {final.name}: rank {collectives.rank()}: {told}"


@contextlib.contextmanager
def _told(final: Path, writing: Path) -> Iterator[None]:
    """An OSError as one line."""
    try:
        yield
    except OSError as error:
        raise UserError(_unwritten(final, writing, error)) from None
