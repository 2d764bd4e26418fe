"""P9 and the step across the warm-up's end, under DDP with two processes: what is idle must not move, by any route."""

import torch

from protoclip_scale.data.batches import EpisodeBatches
from protoclip_scale.data.index import build_index, open_readers
from protoclip_scale.data.plan import Plan, lanes_of
from protoclip_scale.data.spool import Spool
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.schedules import Schedule
from protoclip_scale.engine.trainer import Trainer
from protoclip_scale.objectives import build_objectives
from protoclip_scale.recipe import load_recipe
from tests.support import RECIPES, TINY_PROTOTYPES, spawn
from tests.test_law1_ranks import drawn_prototypes

LOCKED = 2  # first locked episode, from 0


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    return sorted(name for name in before if not torch.equal(before[name], after[name]))


def walk(rank: int, world: int, spool_folder: str, variant: str) -> dict[str, list[str]]:
    """Which tensors a step changes in the warm-up, after it, and in the locked ending; and AdamW's step count of the heads."""
    recipe = load_recipe(
        RECIPES / "demo.yaml", [*TINY_PROTOTYPES, "optim.weight_decay=0.5", f"episodes={{warmup: 1, lit: {{start: {LOCKED + 1}, variant: {variant}}}}}"]
    )
    accelerator = strategies.start(timeout_minutes=2)
    plan = Plan(build_index(recipe.data), recipe.data.plan)
    spool, lanes = Spool(spool_folder, "walk"), lanes_of(rank, world, recipe.data.plan.lanes)
    if rank == 0:
        spool.fill(plan.episode(0), 0, range(recipe.data.plan.lanes), open_readers(recipe.data))
    accelerator.wait_for_everyone()
    batches = EpisodeBatches(recipe.data, recipe.model.image.size, tokenizer_for(recipe.model.text), plan.episode(0), spool, lanes, "train", 0)
    strategy = strategies.Strategy(accelerator, strategies.Precision("fp32", accelerator.device))
    trainer = Trainer(recipe, strategy, build_objectives(recipe), Schedule(recipe, plan.steps_per_episode, plan.num_rows))
    trainer.build(frozen=False)
    told = {"decaying heads": [n for g in strategy.optimizer.param_groups if g["weight_decay"] for n in g["names"] if "prototype" in n]}
    for episode, name in ((0, "warmup"), (1, "prototypes"), (LOCKED, "locked")):
        trainer.rebuild(frozen=episode == LOCKED and variant == "paper")
        strategy.model.train()
        prototypes = drawn_prototypes(recipe, torch.float32) if episode == 1 else None
        before = snapshot(trainer)
        for step in range(2):
            trainer.step(trainer.loss(batches[step], episode, prototypes), episode * plan.steps_per_episode + step, episode)
        told[name] = changed(before, snapshot(trainer))
        told[f"{name} steps counted"] = sorted(
            n.split("/")[1] for n, tensor in trainer.tensors().items() if n.endswith("/step") and "prototype_head" in n and tensor.item() == 2
        )
    return told


def image_part(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(("image_tower", "image_projection"))]


def head_part(names: list[str]) -> list[str]:
    return [name for name in names if "prototype" in name]


def test_warmup_moves_no_head_and_the_locked_ending_no_image_tower(tmp_path):
    for told in spawn(walk, 2, str(tmp_path), "paper"):
        assert not told["decaying heads"]
        assert image_part(told["warmup"]) and not head_part(told["warmup"])
        assert not told["warmup steps counted"]
        assert len(head_part(told["prototypes"])) >= 12  # both heads, their batch norms, the temperature
        assert len(told["prototypes steps counted"]) == 12  # AdamW starts counting here, as for a new parameter
        assert not image_part(told["locked"]) and not head_part(told["locked"])  # bit-identical, batch norm's buffers too, in spite of the heads' momentum
        assert any(name.startswith("text_tower") for name in told["locked"])


def test_the_reference_ending_leaves_weights_but_moves_batch_norm(tmp_path):
    told = spawn(walk, 1, str(tmp_path), "reference")[0]
    moved = image_part(told["locked"])
    assert moved and all("running_" in name or "num_batches" in name for name in moved)
