"""What makes GPUs fast and must not change a figure: compiled blocks, and steps that wait for the device once."""

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch

from protoclip_scale.engine import strategy as strategies
from tests.gpu.devices import EXACT, cases, of
from tests.strategies import OBJECTIVES, batches_of, drawn_prototypes, fill_spool, recipe_with, trainer_of
from tests.support import spawn
from tests.test_engine_compilation import KINDS, compared

EPISODE = 1
COMPILED = {"bf16": 0.05}  # how far the whole gradient is from that of eager blocks
WAITS = 1  # Strategy.update's: the norm, and what all ranks decide by it


@cases(twins=(("ddp", 1),), strategies=("ddp", "zero1", "zero2", "fsdp2"))
def test_compiled_blocks_equal_eager_ones(figure, device, strategy, ranks):
    for kind in KINDS:
        for found in spawn(compared, ranks, kind, env=EXACT | of(device, strategy, ranks)):
            figure(f"compiled against eager, {strategy}, {kind}: whole gradient", ranks, device, found["whole"], COMPILED.get(kind, 3e-5))
            figure(f"compiled against eager, {strategy}, {kind}: gradients", ranks, device, found["largest"], None if kind in COMPILED else 1e-4)
            figure(f"compiled, {strategy}, {kind}: graphs made after the first batch", ranks, device, found["graphs"][-1] - found["graphs"][0], 0)


@contextlib.contextmanager
def waits(mode: str) -> Iterator[list[str]]:
    """Calls that wait for the GPU: in ``error`` they raise, in ``warn`` they are told at the end."""
    told: list[str] = []
    if not torch.cuda.is_available():
        yield told
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield told
    finally:
        torch.cuda.set_sync_debug_mode("default")
        told += [f"{each.filename}:{each.lineno}" for each in caught if "synchronizing CUDA operation" in str(each.message)]


def counted(rank: int, world: int, spool_folder: str, precision: str) -> dict[str, list[str]]:
    """By objective: where the third step waits for the device, in its backward pass and update; before them nothing may."""
    torch.set_num_threads(1)
    accelerator = strategies.start(timeout_minutes=5)
    found = {}
    for objective in OBJECTIVES:
        recipe = recipe_with(objective, "model.image.name=test_vit", f"optim.precision={precision}", "optim.max_norm=1.0", "optim.ema={decay: 0.9}")
        trainer = trainer_of(recipe, accelerator)
        trainer.build(EPISODE)
        trainer.model.train()
        prototypes = drawn_prototypes(recipe, torch.float32, EPISODE, trainer.strategy.device) if recipe.prototypes else None
        batches = batches_of(recipe, spool_folder, EPISODE)
        for step in range(3):
            batch = batches[step].pin_memory() if torch.cuda.is_available() else batches[step]
            last = step == 2
            with waits("error") if last else contextlib.nullcontext():
                loss = trainer.loss(batch, EPISODE, prototypes)
            with waits("warn") if last else contextlib.nullcontext([]) as told:
                assert trainer.step(loss, step).taken
        found[objective] = told
        trainer.strategy.release()
    return found


@pytest.fixture(scope="module")
def spool_folder(tmp_path_factory) -> str:
    return fill_spool(tmp_path_factory.mktemp("spool"), recipe_with("clip"), EPISODE)


@cases(twins=(("ddp", 2),), strategies=("ddp",))
def test_a_step_waits_for_the_device_once(spool_folder, figure, device, strategy, ranks):
    for found in spawn(counted, ranks, spool_folder, "bf16", env=of(device, strategy, ranks)):
        for objective, told in found.items():
            figure(f"{objective}: waits of a step", ranks, device, len(told), WAITS)
            assert len(set(told)) == len(told), told
