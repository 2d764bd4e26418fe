"""Laws 1 and 2 on GPUs: each strategy on one GPU and on two, whole batches and micro-batches, against one process on one GPU, gradient by gradient."""

import functools

import pytest

from tests import test_law1_ranks as in_fp64
from tests.gpu.devices import EXACT, cases, of, on_devices
from tests.strategies import OBJECTIVES, fill_spool, largest_difference, recipe_with, whole_difference
from tests.support import spawn
from tests.test_law1_strategies import EPISODE, FP32_BOUND, MOVED_BOUND, differences, measured

MICROBATCH = 12
PRECISIONS = ("fp32", "bf16")
ONE_TENSOR = 3 * FP32_BOUND  # other numbers of rows are other kernels, which add in other orders
IN_FP64 = 1e-9


@pytest.fixture(scope="module")
def spool_folder(tmp_path_factory) -> str:
    return fill_spool(tmp_path_factory.mktemp("spool"), recipe_with("clip"), EPISODE)


@pytest.fixture(scope="module")
def one_process(spool_folder):
    """By device; made when it is first asked for."""
    return functools.cache(lambda device: spawn(measured, 1, spool_folder, OBJECTIVES, PRECISIONS, env=EXACT | of(device, "ddp", 1))[0])


def worst(expected: dict, ranks: list[dict], precision: str) -> dict[str, float]:
    """The largest differences of any objective on any rank."""
    wanted = {name: each for name, each in expected.items() if name.endswith(precision)}
    each = [found for rank in ranks for found in differences(wanted, {name: rank[name] for name in wanted}).values()]
    return {what: max(found[what] for found in each) for what in each[0]}


@cases(twins=(("zero3", 2), ("ddp", 1)))
def test_ranks_and_microbatches_equal_one_process(spool_folder, one_process, figure, device, strategy, ranks):
    env, expected = EXACT | of(device, strategy, ranks), one_process(device)
    if (strategy, ranks) == ("ddp", 1):
        for objective in OBJECTIVES:
            fp32, bf16 = (expected[f"{objective}, {precision}"]["gradients"] for precision in PRECISIONS)
            figure(f"{objective}: whole gradient in bf16 against fp32", 1, device, whole_difference(fp32, bf16))
    found = spawn(measured, ranks, spool_folder, OBJECTIVES, PRECISIONS, env=env)
    in_parts = spawn(measured, ranks, spool_folder, OBJECTIVES, ("fp32",), False, MICROBATCH, env=env)
    for law, each in (("law 1", found), ("law 2", in_parts)):
        difference = worst(expected, each, "fp32")
        for what, bound in (("loss", FP32_BOUND), ("gradients", ONE_TENSOR), ("whole gradient", FP32_BOUND), ("weights", MOVED_BOUND)):
            figure(f"{law}, {strategy}, fp32: {what}", ranks, device, difference[what], bound)
    figure(f"law 1, {strategy}, bf16: whole gradient", ranks, device, worst(expected, found, "bf16")["whole gradient"])


@cases(twins=(("ddp", 2),), strategies=("ddp",))
def test_law_1_in_fp64_with_batch_norm_too(spool_folder, figure, device, strategy, ranks):
    env = EXACT | of(device, strategy, ranks)
    [expected] = spawn(in_fp64.gradients, 1, spool_folder, False, env=EXACT | of(device, "ddp", 1))
    names = [name for name in expected if "fp64" in name]
    assert len(names) == 2 * len(OBJECTIVES)
    for rank in spawn(in_fp64.gradients, ranks, spool_folder, False, env=env):
        for name in names:
            figure(f"law 1, {strategy}, {name}: gradients", ranks, device, largest_difference(expected[name], rank[name]), IN_FP64)


@on_devices
def test_a_gather_without_gradient_breaks_law_1(spool_folder, one_process, figure, device):
    env = EXACT | of(device, "ddp", 2)
    found = spawn(measured, 2, spool_folder, ("clip",), ("fp32",), True, env=env)
    difference = worst({"clip, fp32": one_process(device)["clip, fp32"]}, found, "fp32")["gradients"]
    figure("law 1, a gather without gradient: 1 / gradients", 2, device, 1 / difference, 1 / (100 * ONE_TENSOR))
