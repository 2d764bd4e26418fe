"""One step under every strategy: what is not finite on one rank is skipped on all, loss scaling skips and recovers, and a signal on one rank is known to all."""

import sys

import pytest
import torch

from protoclip_scale import collectives
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.strategy import LossScale
from protoclip_scale.models.dual_encoder import DualEncoder
from tests.strategies import batches_of, environment, fill_spool, recipe_with, trainer_of, weights
from tests.support import spawn

EPISODE = 0


def steps(rank: int, world: int, spool_folder: str) -> dict:
    """What came of a step whose loss is infinite on the last rank alone (its gradient is sound), of sound ones, of one that overflows, and of the next."""
    torch.set_num_threads(1)
    accelerator = strategies.start(timeout_minutes=2)
    recipe = recipe_with("clip", "optim.precision=fp32", "optim.max_norm=1.0")
    batch = batches_of(recipe, spool_folder, EPISODE)[0]
    last = rank == world - 1

    def step(trainer, scale: float = 1.0, plus: float = 0.0, stop: bool = False) -> tuple[strategies.Update, bool]:
        trainer.model.train()
        before = weights(trainer)
        trainer.strategy.set_learning_rates({"visual": 1e-3, "other": 1e-3})
        loss = trainer.loss(batch, EPISODE, None).total
        trainer.strategy.backward(loss * scale + plus)
        update = trainer.strategy.update(stop)
        after = weights(trainer)
        return update, not any(name in dict(trainer.model.named_parameters()) and not torch.equal(before[name], after[name]) for name in before)

    plain = trainer_of(recipe, accelerator)
    plain.build(EPISODE)
    lost, lost_stands = step(plain, plus=float("inf") if last else 0.0)
    sound, sound_stands = step(plain, stop=last)
    plain_weights = weights(plain)
    plain.strategy.release()

    scaled = trainer_of(recipe, accelerator)
    scaled.strategy.precision.scale = LossScale()  # on CPUs recipes may not ask for it; the logic is the same
    scaled.build(EPISODE)
    overflowed, overflowed_stands = step(scaled, scale=1e36)  # times 2^16 is more than fp32 holds
    scale_after = scaled.strategy.precision.scale.value
    recovered, recovered_stands = step(scaled)
    difference = max((tensor - plain_weights[name]).abs().max().item() for name, tensor in weights(scaled).items() if "running" not in name and "num_" not in name)
    return {
        "lost": [lost.taken, torch.tensor(lost.norm).isfinite().item(), lost_stands, lost.stop],
        "sound": [sound.taken, sound.norm > 1, sound_stands, sound.stop],
        "overflowed": [overflowed.taken, torch.tensor(overflowed.norm).isfinite().item(), overflowed_stands, scale_after],
        "recovered": [recovered.taken, abs(recovered.norm / sound.norm - 1) < 1e-4, recovered_stands, scaled.strategy.precision.state()["_growth_tracker"]],
        "difference": difference,
        "deepspeed": "deepspeed" in sys.modules,
        "ranks": len(set(collectives.all_gather_objects(sound.norm))),
    }


def moved_whole(rank: int, world: int) -> int:
    """How often building a trainer takes the whole model to the device at once."""
    moves, to = [], DualEncoder.to

    def counting(self, *arguments, **options):
        moves.append(self)
        return to(self, *arguments, **options)

    DualEncoder.to = counting
    trainer = trainer_of(recipe_with("clip"), strategies.start(timeout_minutes=2))
    trainer.build(EPISODE)
    assert trainer.strategy.num_parameters() > 10**6
    return len(moves)


def check(told: dict) -> None:
    assert told["lost"] == [False, False, True, False]
    assert told["sound"] == [True, True, False, True]
    assert told["overflowed"] == [False, False, True, 2.0**15]
    assert told["recovered"] == [True, True, False, 1]
    assert told["difference"] < 2e-6  # gradients are unscaled before they are clipped
    assert told["ranks"] == 1


@pytest.fixture(scope="module")
def spool_folder(tmp_path_factory) -> str:
    return fill_spool(tmp_path_factory.mktemp("spool"), recipe_with("clip"), EPISODE)


@pytest.mark.parametrize("strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3", "fsdp2"))])
def test_what_is_lost_on_one_rank_is_skipped_on_all(spool_folder, strategy):
    for told in spawn(steps, 2, spool_folder, env=environment(strategy, 2)):
        check(told)
        assert told["deepspeed"] == strategy.startswith("zero")  # imported only when it is asked for


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "expected"), [("zero2", True), ("zero3", False), ("fsdp2", False)])
def test_what_is_held_in_parts_never_goes_to_the_device_whole(strategy, expected):
    assert [moves > 0 for moves in spawn(moved_whole, 2, env=environment(strategy, 2))] == [expected] * 2
