"""Law 6 on GPUs: the torch engine and faiss's GPU build find the clusters that a CPU finds."""

import faiss
import numpy as np
import pytest
import torch

from protoclip_scale.prototypes.assign import assign
from tests.gpu.devices import ON_CPU, of, on_devices
from tests.support import spawn
from tests.test_law6_kmeans import LANES, clustering, lanes, real_rows

SAME_LABELS, SAME_OBJECTIVE = 1e-4, 1e-6
DISTANCES = {"cuda": ("fp32", "tf32", "bf16"), "cpu": ("fp32", "bf16")}


def found(rank: int, world: int, rows: torch.Tensor, engines: tuple[str, ...], distances: tuple[str, ...]) -> dict:
    """Of each engine a clustering of a rank's lanes, and of the torch engine the nearest of 500 rows in each kind of products."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(rank)
    parts, positions = lanes(rows.numpy(), range(rank * LANES // world, (rank + 1) * LANES // world))
    each = {engine: {name: value for name, value in clustering(engine, parts, positions).items() if name in ("labels", "objective")} for engine in engines}
    near = {kind: torch.from_numpy(assign(rows.numpy(), rows.numpy()[:500], "torch", kind)[0]) for kind in distances}
    return {"clusters": each, "nearest": near, "gpus of faiss": faiss.get_num_gpus()}


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.from_numpy(real_rows())


@pytest.fixture(scope="module")
def on_cpu(rows):
    return spawn(found, 1, rows, ("faiss", "torch"), ("fp32",), env=ON_CPU)[0]


def compare(figure, name: str, ranks: int, device: str, expected: dict, each: list[dict]) -> None:
    labels = torch.cat([found["labels"] for found in each])
    figure(f"{name}: share of other labels", ranks, device, (labels != expected["labels"]).double().mean().item(), SAME_LABELS)
    figure(f"{name}: objective", ranks, device, max(abs(found["objective"] / expected["objective"] - 1) for found in each), SAME_OBJECTIVE)


@pytest.mark.parametrize("ranks", [1, 2])
@on_devices
def test_the_torch_engine_finds_the_clusters_of_the_cpu(rows, on_cpu, figure, device, ranks):
    env = of(device, "ddp", ranks)
    ranks_found = spawn(found, ranks, rows, ("torch",), DISTANCES[device], env=env)
    for name, expected in on_cpu["clusters"].items():
        compare(figure, f"law 6, torch against {name} on the CPU", ranks, device, expected, [each["clusters"]["torch"] for each in ranks_found])
    for kind in DISTANCES[device]:
        other = np.mean([(each["nearest"][kind] != on_cpu["nearest"]["fp32"]).double().mean().item() for each in ranks_found])
        figure(f"torch engine, products in {kind}: share of other nearest rows", ranks, device, float(other), 0.0)


@on_devices
def test_faiss_on_the_device_finds_the_clusters_of_the_torch_engine(rows, on_cpu, figure, device):
    if device == "cuda" and not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("faiss-gpu is not installed (pip install '.[gpu]' in place of faiss-cpu)")
    [both] = spawn(found, 1, rows, ("faiss", "torch"), (), env=of(device, "ddp", 1))
    assert both["gpus of faiss"] == (torch.cuda.device_count() if device == "cuda" else 0)
    compare(figure, "law 6, faiss against torch on the device", 1, device, both["clusters"]["torch"], [both["clusters"]["faiss"]])
    compare(figure, "law 6, faiss on the device against the CPU", 1, device, on_cpu["clusters"]["faiss"], [both["clusters"]["faiss"]])
