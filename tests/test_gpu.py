"""What needs a GPU: ``make test-gpu``. The demo recipe in small, in every precision, beside the same run on the CPU."""

import numpy as np
import pytest
import torch

from tests.support import TINY_PROTOTYPES, fsdp2_environment, metrics, output, pretrain, zero_environment

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu") / "run"
    assert pretrain(folder, "demo.yaml", TINY_PROTOTYPES, env={"CUDA_VISIBLE_DEVICES": ""}) == [0], output(folder)
    return [line["loss/clip"] for line in metrics(folder, "train")]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.02), ("bf16", 0.05), ("fp16", 0.05)])
def test_a_run_on_a_gpu(tmp_path, on_cpu, precision, tolerance):
    assert pretrain(tmp_path / "run", "demo.yaml", (*TINY_PROTOTYPES, f"optim.precision={precision}")) == [0], output(tmp_path / "run")
    assert "device         cuda" in output(tmp_path / "run")
    found = [line["loss/clip"] for line in metrics(tmp_path / "run", "train")]
    assert np.allclose(found, on_cpu, rtol=tolerance)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.02), ("fp16", 0.05)])
def test_sharded_strategies_on_gpus(tmp_path, on_cpu, ranks, strategy, precision, tolerance):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    env = fsdp2_environment(ranks) if strategy == "fsdp2" else zero_environment(int(strategy[-1]), ranks)
    folder, settings = tmp_path / "run", (*TINY_PROTOTYPES, f"optim.precision={precision}")
    assert pretrain(folder, "demo.yaml", settings, ranks=ranks, env=env) == [0] * ranks, output(folder)
    found = [line["loss/clip"] for line in metrics(folder, "train")]
    assert np.allclose(found, on_cpu, rtol=tolerance)
    more = (*(each for each in settings if not each.startswith("schedule.total")), "schedule.total=4 episodes")
    assert pretrain(folder, "demo.yaml", more, "--extend", ranks=ranks, env={"ACCELERATE_USE_CPU": "false"}) == [0] * ranks, output(folder)  # on under DDP
    assert len(metrics(folder, "train")) == len(found) * 4 // 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_on_gpus(tmp_path, ranks):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = (*TINY_PROTOTYPES, "run.checkpoint_steps=2")
    env = {"ACCELERATE_USE_CPU": "false"}
    assert pretrain(whole, "demo.yaml", settings, ranks=ranks, env=env) == [0] * ranks, output(whole)
    for event in ("train.step:3", "extract.block:2", "cluster.iteration:3"):
        assert pretrain(killed, "demo.yaml", settings, ranks=ranks, env=env | {"PROTOCLIP_KILL_AT": event})[0] == -9
    assert pretrain(killed, "demo.yaml", settings, ranks=ranks, env=env) == [0] * ranks, output(killed)
    expected, found = ([line["loss"] for line in metrics(folder, "train")] for folder in (whole, killed))
    assert np.allclose(found, expected, rtol=1e-4)
