"""How far --check's memory is from what ranks need: peak resident memory of a step above imports, under each strategy, in several CPU processes.

    python benchmarks/memory.py [--ranks 2] [--rows 16] [--strategies ddp zero2 zero3] [--set model.image.name=vit_small_patch32_224 ...]

Every rank takes three optimiser steps of recipes/demo_clip.yaml at --rows rows (random pictures, captions of full length) after a step of a small model has loaded what libraries load late. With few rows the
exact parts (weights, gradients, AdamW, buckets) are nearly all there is; with many, activations, which are an estimate. Linux only.

Prints a table, and as the last line one JSON object with its figures.
"""

import argparse
import ctypes
import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from large_batch_parts.peak import Peak  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from protoclip_scale.data.batches import Batch  # noqa: E402
from protoclip_scale.engine import strategy as strategies  # noqa: E402
from protoclip_scale.engine.memory import shared_memory, sizes_of  # noqa: E402
from protoclip_scale.engine.model_cost import measure  # noqa: E402
from protoclip_scale.engine.schedules import Schedule  # noqa: E402
from protoclip_scale.engine.strategy.memory import LAYOUTS  # noqa: E402
from protoclip_scale.engine.trainer import Trainer  # noqa: E402
from protoclip_scale.objectives import build_objectives  # noqa: E402
from protoclip_scale.recipe import Recipe, load_recipe  # noqa: E402
from tests.strategies import environment  # noqa: E402
from tests.support import TINY, spawn  # noqa: E402

DEMO = Path(__file__).resolve().parent.parent / "recipes" / "demo_clip.yaml"
TITLES = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
STEPS = 3
MMAP_THRESHOLD, SMALLEST_MAPPED = -3, 1 << 16  # mallopt's number: tensors go back to the system when they are freed, so that peaks are theirs


def recipe_of(settings: list[str], rows: int) -> Recipe:
    return load_recipe(DEMO, ["data.plan.lanes=4", f"data.plan.global_batch={rows}", f"data.plan.episode_size={rows}", *settings])


def drawn(recipe: Recipe, rows: int) -> Batch:
    size, length = recipe.model.image.size, recipe.model.text.context_length
    images = torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8)
    numbers = torch.from_numpy(np.arange(rows))
    return Batch(0, images, torch.randint(1, 1000, (rows, length)), torch.full((rows,), length), numbers, numbers, numbers)


def step(trainer: Trainer, batch: Batch) -> None:
    trainer.model.train()
    update = trainer.step(trainer.loss(batch, 0, None), 0)
    assert update.taken


def measured(rank: int, world: int, settings: list[str], rows: int) -> int:
    """Bytes of a rank at the peak of a step."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, SMALLEST_MAPPED)
    accelerator = strategies.start(timeout_minutes=10)
    for recipe in (load_recipe(DEMO, TINY), recipe_of(settings, rows * world)):
        peak = Peak(accelerator.device)
        strategy = strategies.make_strategy(accelerator, strategies.Precision(recipe.optim.precision, accelerator.device))
        trainer = Trainer(recipe, strategy, build_objectives(recipe), Schedule(recipe, 1, recipe.data.plan.global_batch))
        trainer.build(episode=0)
        batch = drawn(recipe, rows)
        for number in range(STEPS):
            if number == STEPS - 1:  # the first one makes moments and buckets
                peak.forget()
            step(trainer, batch)
        found = peak.bytes()
        trainer.strategy.release()
        del trainer, strategy, batch
        gc.collect()
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 512], help="of a rank")
    parser.add_argument("--strategies", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    chosen = parser.parse_args(argv)
    table = Table("strategy", "rows of a rank", "estimate, MB", "of it activations", "measured, MB", "measured / estimate", title=f"Peak memory of a step, {chosen.ranks} processes")
    results = []
    for rows in chosen.rows:
        recipe = recipe_of(chosen.set, rows * chosen.ranks)
        objectives = build_objectives(recipe)
        cost = measure(recipe, objectives)
        shared = shared_memory(cost, recipe, objectives, chosen.ranks, "cpu")
        for name in chosen.strategies:
            layout = next(each for each in LAYOUTS if each.title == TITLES[name])
            estimate = layout.memory(sizes_of(cost, recipe), chosen.ranks).device + sum(shared.values())
            found = max(spawn(measured, chosen.ranks, chosen.set, rows, env=environment(name, chosen.ranks)))
            results.append({"strategy": name, "rows": rows, "estimate_mb": round(estimate / 1e6, 1), "activations_mb": round(shared["activations (estimate)"] / 1e6, 1), "measured_mb": round(found / 1e6, 1)})
            results[-1]["ratio"] = round(found / estimate, 3)
            table.add_row(layout.title, str(rows), *(str(results[-1][key]) for key in ("estimate_mb", "activations_mb", "measured_mb", "ratio")))
    Console(soft_wrap=True).print(table)
    print(json.dumps({"benchmark": "memory", "ranks": chosen.ranks, "settings": chosen.set, "parameters": cost.num_parameters, "results": results}))


if __name__ == "__main__":
    main()
