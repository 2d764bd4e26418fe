"""Damaged checkpoints: each a line that names the file, passed over for an older sound one; what a kill leaves; which ones stay."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from protoclip_scale.engine import checkpoint
from protoclip_scale.engine.checkpoint import manifest as manifests
from protoclip_scale.engine.checkpoint.retention import outdated, prune, remove
from protoclip_scale.errors import UserError
from tests.test_engine_checkpoint_files import TENSORS, about, equal, saved

SHARD = "shard-00001-of-00001-part-0001.safetensors"


def truncate(folder: Path) -> None:
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-100])


def flip(folder: Path) -> None:
    shard = folder / SHARD
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def flip_a_digit_of_the_manifest(folder: Path) -> None:
    """Readable JSON all the same: the cursor would be another one."""
    path = folder / "manifest.json"
    changed = path.read_text().replace('"step_in_episode": 2', '"step_in_episode": 3')
    assert changed != path.read_text()
    path.write_text(changed)


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def lose_a_file(folder: Path) -> None:
    (folder / SHARD).unlink()


def half_a_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        saved(folder, {name: tensor + step if tensor.dtype == torch.float32 else tensor for name, tensor in TENSORS.items()}, step, weights=True)
    return folder


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, f"{SHARD} has "),
        (flip, f"{SHARD} was changed or damaged (sha256 differs)"),
        (lose_a_file, f"{SHARD} is missing"),
        (lose_the_manifest, "manifest.json cannot be read"),
        (half_a_manifest, "manifest.json cannot be read"),
        (flip_a_digit_of_the_manifest, "manifest.json was changed or damaged"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_checkpoint_is_passed_over_and_named(run, tmp_path, damage, said):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    damage(checkpoint.folder_of(copy, 2))
    folder, _, warnings = checkpoint.find(copy, "latest")
    assert folder.name == "step-00000001" and len(warnings) == 1 and said in warnings[0] and "step-00000002" in warnings[0] and "\n" not in warnings[0]
    with pytest.raises(UserError) as caught:
        checkpoint.find(copy, "2")
    assert str(caught.value) == warnings[0]
    assert checkpoint.folder_of(copy, 2).is_dir()  # nothing is thrown away
    damage(checkpoint.folder_of(copy, 1)) if damage is not flip_a_digit_of_the_manifest else truncate(checkpoint.folder_of(copy, 1))
    with pytest.raises(UserError, match="step-00000002"):
        checkpoint.find(copy, "latest")


def test_a_shard_without_its_tensor_is_one_line(run, tmp_path):
    """Digests are right; what was written was not."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    folder = checkpoint.folder_of(copy, 2)
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes().replace(b"model/number@0", b"model/nomber@0"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][SHARD]["sha256"] = manifests.sha256_of(shard)
    manifests.write_manifest(folder, manifest)
    found, manifest, _ = checkpoint.find(copy, "latest")
    reader = checkpoint.Reader(found, manifest)
    with pytest.raises(UserError, match=f"{SHARD} cannot be read .it holds no model/number@0."):
        reader.tensor("model/number")
    assert torch.equal(reader.tensor("model/a"), TENSORS["model/a"] + 2)


def test_a_file_that_shrinks_while_it_is_read_is_one_line(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    found, manifest, _ = checkpoint.find(copy, "latest")
    reader = checkpoint.Reader(found, manifest)
    reader.tensor("model/flags")
    with (found / SHARD).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="it ends inside"):
        reader.tensor("model/a")


@pytest.mark.parametrize(
    ("steps", "keep", "keep_every", "gone"),
    [
        ([1, 2, 3], 0, 0, []),
        ([1, 2, 3], 1, 0, [1, 2]),
        ([1, 2, 3], 5, 0, []),
        ([2, 4, 6, 8, 9], 2, 4, [2, 6]),
        ([4, 8, 12], 1, 4, []),
    ],
)
def test_which_checkpoints_stay(steps, keep, keep_every, gone):
    assert sorted(outdated(steps, keep, keep_every)) == gone


def test_pruning_spares_what_is_being_copied_and_clears_what_a_kill_left(tmp_path):
    for step in (1, 2, 3, 4):
        saved(tmp_path, {"model/a": torch.ones(3)}, step)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".leaving-step-00000000").mkdir()
    shutil.copytree(checkpoints / "step-00000001", checkpoints / "step-00000001.prototypes")
    prune(tmp_path, keep=1, in_use={"step-00000002"})
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000004"]
    prune(tmp_path, keep=1)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000004"]


def test_a_checkpoint_may_go_twice_under_one_name(tmp_path):
    """A kill came while its folder was deleted, then training saved the step again."""
    folder = saved(tmp_path, {"model/a": torch.ones(3)})
    shutil.copytree(folder, folder.with_name(f".leaving-{folder.name}"))
    remove(folder)
    assert not list(folder.parent.iterdir())


def test_what_a_kill_left_half_written_goes_and_a_newer_attempt_s_stays(tmp_path):
    folder = tmp_path / "checkpoints"
    for left in (".writing-0001-step-00000001", ".writing-step-00000001", ".writing-0003-step-00000001"):
        (folder / left).mkdir(parents=True)
        (folder / left / "half").write_bytes(b"x")
    checkpoint.save(folder / "step-00000001", checkpoint.replicated_pieces(TENSORS), about(attempt=2), lambda: None)
    assert sorted(path.name for path in folder.iterdir()) == [".writing-0003-step-00000001", "step-00000001"]
    found, manifest, _ = checkpoint.find(tmp_path, "latest")
    assert equal(checkpoint.read_tensors(found, manifest), TENSORS)
