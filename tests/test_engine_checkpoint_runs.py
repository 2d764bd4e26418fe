"""Checkpoints of real runs: lost directories, twins that wake up, towers with dropout, what is kept."""

import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from protoclip_scale.engine import checkpoint
from tests.runs import check_equal
from tests.support import TINY, final_tensors, metrics, output, pretrain

SETTINGS = (*TINY, "run.checkpoint_steps=2", "run.keep_checkpoints=0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was never killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert pretrain(folder, "demo_clip.yaml", SETTINGS) == [0], output(folder)
    return folder


def test_the_whole_weights_stand_in_every_checkpoint(whole):
    for folder in checkpoint.list_checkpoints(whole):
        manifest = checkpoint.read_manifest(folder)
        saved = {name.removeprefix("model/"): tensor for name, tensor in checkpoint.read_tensors(folder, manifest, "model/").items()}
        weights = load_file(folder / "weights.safetensors")
        assert weights.keys() == saved.keys() and all(torch.equal(weights[name], saved[name]) for name in saved)


def test_a_run_whose_directory_is_lost_goes_on_from_its_copies(tmp_path, whole):
    """Killed as soon as the third checkpoint has been copied, that of the first episode's end the second; on another machine with nothing but the copies."""
    run, values = tmp_path / "run", (*SETTINGS, f"run.copy_to={tmp_path}/{{name}}")
    codes = pretrain(run, "demo_clip.yaml", values, env={"PROTOCLIP_KILL_AT": "checkpoint.copied:3"})
    assert codes == [-9], output(run)
    copied = [path.name for path in checkpoint.list_checkpoints(tmp_path / "demo_clip")]
    assert copied == ["step-00000002", "step-00000004", "step-00000006"]
    traces = tmp_path / "traces"
    shutil.move(run / "trace", traces)
    shutil.rmtree(run)
    assert pretrain(run, "demo_clip.yaml", values) == [0], output(run)
    assert "went on from the copy of checkpoints/step-00000006" in output(run)
    for path in traces.iterdir():
        shutil.copy(path, run / "trace")
    check_equal(run, whole)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "demo_clip")] == [f"step-{step:08d}" for step in range(2, 13, 2)]
    assert [line["step"] for line in metrics(run, "checkpoint")] == list(range(2, 13, 2))  # the history came with the copies


@pytest.mark.parametrize("event", ["checkpoint.shard:2", "checkpoint.written:2", "checkpoint.published:2"])
def test_a_twin_that_wakes_up_publishes_nothing(tmp_path, whole, event):
    """A rank on a lost machine: frozen while it saves, it wakes up when the next attempt has finished the run."""
    run, codes = tmp_path / "run", []
    twin = threading.Thread(target=lambda: codes.append(pretrain(run, "demo_clip.yaml", SETTINGS, env={"PROTOCLIP_HANG_AT": event})))
    twin.start()
    frozen = _frozen_process()
    assert pretrain(run, "demo_clip.yaml", SETTINGS) == [0], output(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    frozen.resume()
    twin.join()
    assert codes == [[1]] and "attempt 2 has taken this run over; attempt 1 stops without saving" in output(run)
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    changed = {path.relative_to(run).parts[0] for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {"trace", "log.txt"}, changed
    found, wanted = final_tensors(run), final_tensors(whole)
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert (run / "checkpoints/latest").read_text() == "step-00000012\n"
    assert [path.name for path in (run / "checkpoints").glob(".*")] == []


def _frozen_process(seconds: float = 120) -> psutil.Process:
    """The descendant of ours that was stopped by a signal, as soon as there is one."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            try:
                if process.status() == psutil.STATUS_STOPPED:
                    return process
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.05)
    raise AssertionError("nothing was stopped")


@pytest.mark.slow
def test_a_tower_with_dropout_draws_again_what_it_drew(tmp_path):
    """Killed inside an episode, one step after a checkpoint: the draws of a step do not depend on those before it in the process."""
    values = (*SETTINGS, "model.image={name: test_vit_relpos, size: 160}", "data.plan.global_batch=32", "data.plan.episode_size=128", "schedule.total=6 steps")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert pretrain(whole, "demo_clip.yaml", values) == [0], output(whole)
    assert pretrain(killed, "demo_clip.yaml", values, env={"PROTOCLIP_KILL_AT": "train.step:3"}) == [-9]
    assert pretrain(killed, "demo_clip.yaml", values) == [0], output(killed)
    check_equal(killed, whole)


def test_what_is_kept(tmp_path):
    values = (*TINY, "run.checkpoint_steps=2", "run.keep_checkpoints=1", "run.keep_every_steps=4", "run.weights=false", "schedule.total=10 steps")
    run = tmp_path / "run"
    assert pretrain(run, "demo_clip.yaml", values) == [0], output(run)
    assert [path.name for path in checkpoint.list_checkpoints(run)] == ["step-00000004", "step-00000008", "step-00000010"]
    assert not list(run.rglob("weights.safetensors"))
