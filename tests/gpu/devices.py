"""Where a test runs: on one or two GPUs, or as a twin on the CPU."""

import pytest
import torch

from tests.strategies import environment
from tests.support import fsdp2_environment

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(1200)]
TWIN = [pytest.mark.slow, pytest.mark.timeout(1200)]
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
RANKS = (1, 2)
# Products are of fp32, as the laws are: cuDNN would round factors to TF32. With this work space cuBLAS adds in one order, if determinism is asked for.
EXACT = {"NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
ON_CPU = {"CUDA_VISIBLE_DEVICES": "-1"}
DETERMINISTIC = EXACT | {"TEST_DETERMINISTIC": "true"}

on_devices = pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU), pytest.param("cpu", marks=TWIN)])


def cases(twins: tuple[tuple[str, int], ...], strategies: tuple[str, ...] = STRATEGIES) -> pytest.MarkDecorator:
    """Every strategy on one GPU and on two, and the ``twins`` on the CPU."""
    on_gpus = [pytest.param("cuda", strategy, ranks, marks=GPU) for strategy in strategies for ranks in RANKS]
    return pytest.mark.parametrize(("device", "strategy", "ranks"), on_gpus + [pytest.param("cpu", *twin, marks=TWIN) for twin in twins])


def of(device: str, strategy: str, ranks: int) -> dict[str, str]:
    """The environment of ranks under a strategy. Skips the test if there are fewer GPUs."""
    if device == "cpu":
        return environment(strategy, ranks) | ON_CPU
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    return {"ACCELERATE_USE_CPU": "false"} | (fsdp2_environment(ranks) if strategy == "fsdp2" else environment(strategy, ranks))
