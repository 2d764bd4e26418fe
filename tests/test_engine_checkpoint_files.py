"""Shards: safetensors' own format, read by ranges; what the ranks give is whole, or nothing is published."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from protoclip_scale import collectives
from protoclip_scale.engine import checkpoint
from protoclip_scale.engine.checkpoint.pieces import Piece, ranges, replicated_pieces
from protoclip_scale.errors import UserError
from protoclip_scale.tensor_files import Entry, Shard, write_shard
from tests.support import mount_small_disk, needs_small_disk, spawn

TENSORS = {
    "model/a": torch.arange(120_000, dtype=torch.float32).reshape(300, 400),
    "model/empty": torch.zeros(0, 3),
    "model/flags": torch.tensor([True, False, True]),
    "model/half": torch.randn(7, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "model/number": torch.tensor(5),
    "optimizer/a/step": torch.tensor(3.0),
    "prototypes/labels/image": torch.arange(1000, dtype=torch.int32),
}


def about(step: int = 1, attempt: int = 1) -> dict:
    return checkpoint.describe(checkpoint.Cursor(0, "train", step, step), samples=0, attempt=attempt)


def saved(run: Path, tensors: dict[str, torch.Tensor], step: int = 1, **options) -> Path:
    folder = checkpoint.folder_of(run, step)
    checkpoint.save(folder, replicated_pieces(tensors), about(step), lambda: None, **options)
    return folder


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path):
    tensors = dict(sorted(TENSORS.items(), key=lambda item: -item[1].element_size()))
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_shard(ours, [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()], tensors.values())
    assert equal(load_file(ours), TENSORS)
    save_file(TENSORS, theirs)
    shard = Shard(theirs)
    for entry in shard.entries():
        out = torch.empty(TENSORS[entry.name].numel(), dtype=entry.dtype)
        shard.read_into(out, entry.name, 0)
        assert torch.equal(out.reshape(entry.shape), TENSORS[entry.name]), entry.name


def test_files_are_bounded_and_the_whole_weights_stand_beside_them(tmp_path):
    folder = saved(tmp_path, TENSORS, weights=True, file_bytes=100_000)
    manifest = checkpoint.read_manifest(folder)
    sizes = [(folder / name).stat().st_size for name in manifest["files"]]
    assert len(sizes) == 5 and max(sizes) < 101_000
    assert equal(checkpoint.read_tensors(folder, manifest), TENSORS)
    weights = {name.removeprefix("model/"): tensor for name, tensor in TENSORS.items() if name.startswith("model/")}
    assert equal(load_file(folder / "weights.safetensors"), weights)
    (folder / "weights.safetensors").unlink()  # nothing needs it
    assert equal(checkpoint.read_tensors(folder, checkpoint.read_manifest(folder)), TENSORS)


def test_a_slice_reads_no_more_than_itself(tmp_path):
    """Counted by the kernel."""
    folder = saved(tmp_path, {"model/a": torch.arange(4_000_000, dtype=torch.float32)})
    reader = checkpoint.Reader(folder, checkpoint.read_manifest(folder))
    reader.slice("model/a", 0, 1)  # the header
    before = _bytes_read()
    found = reader.slice("model/a", 3_000_000, 3_000_100)
    assert torch.equal(found, torch.arange(3_000_000, 3_000_100, dtype=torch.float32))
    assert _bytes_read() - before < 10_000


def _bytes_read() -> int:
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


@pytest.mark.parametrize("world", [1, 2, 3, 64])
def test_every_value_of_a_replicated_tensor_is_one_rank_s(world):
    given = [0] * world
    for index, numel in enumerate([0, 1, 65_535, 65_536, 1_000_000, 3, 140_000]):
        parts = sorted(part for part in ranges(index, numel, world) if part[1] > part[0])
        assert sum(stop - start for start, stop in parts) == numel and all(a[1] == b[0] for a, b in itertools.pairwise(parts))
        for rank, (start, stop) in enumerate(ranges(index, numel, world)):
            given[rank] += stop - start
    assert world > 3 or max(given) < 1.2 * sum(given) / world


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ([(0, 50), (60, 100)], "values 50 to 60 are given by no rank"),
        ([(0, 60), (50, 100)], "values 50 to 60 are given twice"),
        ([(0, 50)], "the ranks give 50 of 100 values"),
    ],
)
def test_gaps_and_overlaps_are_not_published(tmp_path, cut, said):
    whole = torch.arange(100.0)
    pieces = [Piece("model/a", start, whole[start:stop], (100,)) for start, stop in cut]
    with pytest.raises(AssertionError, match=f"model/a: {said}"):
        checkpoint.save(checkpoint.folder_of(tmp_path, 1), pieces, about(), lambda: None)
    assert not checkpoint.list_checkpoints(tmp_path)


def save_in_ranks(rank: int, world: int, run: str) -> bool:
    """A tensor cut unevenly, as sharded strategies cut it, beside replicated ones; then everybody reads all of it. Weights alone are compared with their digests
    once, for all ranks."""
    _join(rank, world)
    torch.manual_seed(0)
    whole, cuts = torch.randn(1000, 7), [0, 100, 150, 7000][: world + 1]
    cuts[-1] = 7000
    own = Piece("model/sharded", cuts[rank], whole.reshape(-1)[cuts[rank] : cuts[rank + 1]], (1000, 7))
    pieces = itertools.chain([own], replicated_pieces(TENSORS))
    folder = checkpoint.folder_of(Path(run), 1)
    checkpoint.save(folder, pieces, about(), lambda: None, weights=True)
    manifest = checkpoint.read_manifest(folder)
    assert len({name[:11] for name in manifest["files"]}) == world
    assert equal(checkpoint.read_tensors(folder, manifest), TENSORS | {"model/sharded": whole})
    compared, sha256_of = [], checkpoint.manifest.sha256_of
    checkpoint.manifest.sha256_of = lambda path: compared.append(path) or sha256_of(path)
    kind, weights = checkpoint.read_weights(run)
    assert kind == "live" and torch.equal(weights["sharded"], whole) and len(compared) == (0 if rank else len(manifest["files"]))
    return torch.equal(load_file(folder / "weights.safetensors")["sharded"], whole)


@pytest.mark.parametrize("world", [2, 3])
def test_what_several_ranks_give_becomes_whole(tmp_path, world):
    assert spawn(save_in_ranks, world, str(tmp_path)) == [True] * world


def save_on_another_disk(rank: int, world: int, run: str) -> str:
    """Rank 1 has a disk of its own where rank 0 has the folder of checkpoints."""
    folder = checkpoint.folder_of(Path(run), 1)
    if rank == 1:
        mount_small_disk(folder.parent, 16 << 20)
        (folder.parent / f".writing-0001-{folder.name}").mkdir()
    _join(rank, world)
    try:
        checkpoint.save(folder, replicated_pieces({"model/a": torch.ones(1_000_000)}), about(), lambda: None, seen_seconds=0.5)
    except UserError as error:
        return str(error)
    return ""


@needs_small_disk
def test_an_attempt_that_was_frozen_before_its_rename_leaves_its_successors_checkpoint_alone(tmp_path):
    folder, calls = checkpoint.folder_of(tmp_path, 1), []
    of_successor = {"model/a": torch.ones(3)}

    def frozen_before_the_rename() -> None:
        calls.append(None)
        if len(calls) == 3:
            checkpoint.save(folder, replicated_pieces(of_successor), about(attempt=2), lambda: None)

    with pytest.raises(UserError, match="could not be written"):
        checkpoint.save(folder, replicated_pieces({"model/a": torch.zeros(3)}), about(attempt=1), frozen_before_the_rename)
    manifest = checkpoint.read_manifest(folder)
    assert len(calls) == 3 and manifest["attempt"] == 2 and equal(checkpoint.read_tensors(folder, manifest), of_successor)
    checkpoint.save(folder, replicated_pieces(TENSORS), about(attempt=3), lambda: None)  # what was there before goes
    assert equal(checkpoint.read_tensors(folder, checkpoint.read_manifest(folder)), TENSORS)


def test_files_that_rank_0_does_not_see_are_told(tmp_path):
    """A run directory that is not on a shared file system: on rank 1 it is a disk of its own."""
    saved(tmp_path, TENSORS, step=0)
    said = spawn(save_on_another_disk, 2, str(tmp_path))
    assert said[0] == said[1] and "shard-00002-of-00002-part-0001.safetensors of rank 1 is not seen by rank 0" in said[0] and "\n" not in said[0]
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000000"]


def save_on_a_full_disk(rank: int, world: int, run: str) -> str:
    """All ranks on one disk that has room for one checkpoint, not for a second."""
    mount_small_disk(Path(run), 6 << 20)
    tensors = {"model/a": torch.ones(1_000_000)}
    saved(Path(run), tensors, 0)
    try:
        saved(Path(run), tensors, 1)
    except UserError as error:
        left = sorted(path.name for path in (Path(run) / "checkpoints").iterdir())
        folder, manifest, _ = checkpoint.find(Path(run), "latest")
        return f"{error} {left} {equal(checkpoint.read_tensors(folder, manifest), tensors)}"
    return ""


@needs_small_disk
def test_a_full_disk_is_told_and_leaves_room(tmp_path):
    [said] = spawn(save_on_a_full_disk, 1, str(tmp_path / "run"))
    assert said.startswith("checkpoint step-00000001: rank 0: disk full: ") and said.endswith("['step-00000000'] True") and "\n" not in said


def _join(rank: int, world: int) -> None:
    dist.init_process_group("gloo")
    assert (collectives.rank(), collectives.world_size()) == (rank, world)


def old_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], world: int = 2) -> None:
    """As releases before the second schema wrote them: no pieces in the manifest, every tensor cut evenly."""
    folder.mkdir(parents=True)
    files = {}
    for rank in range(world):
        pieces = {}
        for name, tensor in tensors.items():
            numel = tensor.numel()
            start, stop = numel * rank // world, numel * (rank + 1) // world
            if stop > start:
                pieces[f"{name}@{start}"] = tensor.reshape(-1)[start:stop].clone()
        path = folder / f"shard-{rank + 1:05d}-of-{world:05d}.safetensors"
        save_file(pieces, path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": checkpoint.manifest.sha256_of(path)}
    facts = {name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")} for name, tensor in tensors.items()}
    manifest = {"schema": 1, **about(), "files": files, "tensors": facts}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def test_a_checkpoint_of_the_first_schema_loads(tmp_path):
    folder = checkpoint.folder_of(tmp_path, 1)
    old_checkpoint(folder, TENSORS)
    found, manifest, warnings = checkpoint.find(tmp_path, "latest")
    assert found == folder and not warnings
    assert equal(checkpoint.read_tensors(folder, manifest), TENSORS)
    reader = checkpoint.Reader(folder, manifest)
    assert torch.equal(reader.slice("model/a", 59_990, 60_010), torch.arange(59_990, 60_010, dtype=torch.float32))


def test_a_checkpoint_of_a_later_schema_is_one_line(tmp_path):
    folder = saved(tmp_path, TENSORS)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"schema": 3}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="its format is version 3, this release reads versions 1 and 2; use the release that wrote it"):
        checkpoint.find(tmp_path, "1")


