"""P9 and the steps across the warm-up's end and into the locked ending, with two processes: what is idle must not move, by any route."""

from pathlib import Path

import pytest
import torch

from protoclip_scale.data.index import build_index
from protoclip_scale.data.plan import Plan
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.trainer import Trainer
from protoclip_scale.recipe import load_recipe
from tests.strategies import batches_of, drawn_prototypes, environment, fill_spool, saved, trainer_of, weights
from tests.support import RECIPES, TINY_PROTOTYPES, spawn

LOCKED = 2  # first locked episode, from 0


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    return sorted(name for name in before if not torch.equal(before[name], after[name]))


def settings(variant: str):
    return load_recipe(RECIPES / "demo.yaml", [*TINY_PROTOTYPES, "optim.weight_decay=0.5", f"episodes={{warmup: 1, lit: {{start: {LOCKED + 1}, variant: {variant}}}}}"])


def walk(rank: int, world: int, spool_folder: str, folder: str, variant: str) -> dict[str, list[str]]:
    """Which tensors two steps change in the warm-up, after it, and in the locked ending; and what AdamW has counted and kept by then."""
    recipe = settings(variant)
    accelerator = strategies.start(timeout_minutes=2)
    batches, plan = batches_of(recipe, spool_folder, 0), Plan(build_index(recipe.data), recipe.data.plan)
    trainer = trainer_of(recipe, accelerator)
    trainer.build(episode=0)
    told = {}
    for episode, name in ((0, "warmup"), (1, "prototypes"), (LOCKED, "locked")):
        trainer.rebuild(episode, lambda episode=episode: saved(trainer, Path(folder) / f"before-{episode}"))
        trainer.model.train()
        prototypes = drawn_prototypes(recipe, torch.float32, episode) if episode == 1 else None
        before = weights(trainer)
        for step in range(2):
            assert trainer.step(trainer.loss(batches[step], episode, prototypes), episode * plan.steps_per_episode + step).taken
        told[name] = changed(before, weights(trainer))
        told[f"{name} counted"] = counted(trainer, Path(folder) / f"after-{episode}")
        told[f"{name} decays"] = [n for group in trainer.strategy.optimizer.param_groups if group["weight_decay"] for n in group["names"]]
    return told


def counted(trainer: Trainer, folder: Path) -> list[str]:
    """``NAME STEPS`` of every parameter that AdamW keeps moments of."""
    reader = saved(trainer, folder)
    return sorted(f"{name.split('/')[1]} {reader.tensor(name).item():.0f}" for name in reader.names("optimizer/") if name.endswith("/step"))


def image_part(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(("image_tower", "image_projection"))]


def head_part(names: list[str]) -> list[str]:
    return [name for name in names if "prototype" in name]


@pytest.fixture(scope="module")
def spool_folder(tmp_path_factory) -> str:
    return fill_spool(tmp_path_factory.mktemp("spool"), settings("paper"), 0)


@pytest.mark.parametrize("strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3", "fsdp2"))])
def test_warmup_moves_no_head_and_the_locked_ending_no_image_tower(tmp_path, spool_folder, strategy):
    for told in spawn(walk, 2, spool_folder, str(tmp_path), "paper", env=environment(strategy, 2)):
        assert told["prototypes decays"] and not head_part(told["prototypes decays"])
        assert image_part(told["warmup"]) and not head_part(told["warmup"])
        assert not head_part(told["warmup counted"]) and all(each.endswith(" 2") for each in told["warmup counted"])
        assert len(head_part(told["prototypes"])) >= 12  # both heads, their batch norms, the temperature
        steps = dict(each.rsplit(" ", 1) for each in told["prototypes counted"])
        assert {steps[name] for name in head_part(list(steps))} == {"2"}  # AdamW starts counting here, as for a new parameter
        assert len(head_part(list(steps))) == 13 and {steps[name] for name in steps if "prototype" not in name} == {"4"}
        assert not image_part(told["locked"]) and not head_part(told["locked"])  # bit-identical, batch norm's buffers too, in spite of the heads' momentum
        assert any(name.startswith("text_tower") for name in told["locked"])
        assert told["locked counted"] and all(each.endswith(" 6") and not image_part([each]) for each in told["locked counted"])


def test_the_reference_ending_leaves_weights_but_moves_batch_norm(tmp_path, spool_folder):
    told = spawn(walk, 1, spool_folder, str(tmp_path), "reference")[0]
    moved = image_part(told["locked"])
    assert moved and all("running_" in name or "num_batches" in name for name in moved)
