"""What optim.compile_blocks gains: time of an optimiser step with compiled and with eager blocks, in turns in one process.

    python benchmarks/compile.py [--rows 64] [--steps 10] [--threads 2] [--set optim.precision=bf16 ...]

The model and step are those of recipes/demo_clip.yaml with a vision transformer (batch norm is not compiled), at random pictures and captions whose lengths vary as
the corpus's do; on a GPU, there. Both trainers see the same batches, and steps alternate, so that what else the machine does hits both. The first steps, which compile, are told apart.

Prints a table, and as the last line one JSON object with its figures.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from large_batch_parts.rows import read_batch
from rich.console import Console
from rich.table import Table

from protoclip_scale.data.batches import Batch
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.compilation import num_graphs
from protoclip_scale.engine.schedules import Schedule
from protoclip_scale.engine.trainer import Trainer
from protoclip_scale.objectives import build_objectives
from protoclip_scale.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
TOWERS = ("model.image.name=vit_small_patch32_224", "model.image.size=224")


def recipe_of(settings: list[str], rows: int, compiled: bool) -> Recipe:
    plan = (f"data.plan.global_batch={rows}", f"data.plan.episode_size={rows}")
    return load_recipe(ROOT / "recipes" / "demo_clip.yaml", [*TOWERS, *plan, *settings, f"optim.compile_blocks={str(compiled).lower()}"])


def trainer_of(recipe: Recipe, accelerator) -> Trainer:
    strategy = strategies.make_strategy(accelerator, strategies.Precision(recipe.optim.precision, accelerator.device))
    trainer = Trainer(recipe, strategy, build_objectives(recipe), Schedule(recipe, 1, recipe.data.plan.global_batch))
    trainer.build(episode=0)
    trainer.model.train()
    return trainer


def part(batch: Batch, start: int, rows: int) -> Batch:
    return Batch(0, *(tensor[start : start + rows] for tensor in (batch.images, batch.token_ids, batch.token_lengths)), *[torch.arange(rows)] * 3)


def seconds_of_step(trainer: Trainer, batch: Batch) -> float:
    start = time.perf_counter()
    update = trainer.step(trainer.loss(batch, 0, None), 0)  # it reads the norm, and so waits for the device
    assert update.taken
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=ROOT / "recipes" / "demo_corpus", help="parquet file, or a folder with train*.parquet")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="that are timed, of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    accelerator = strategies.start(timeout_minutes=30)
    trainers = {name: trainer_of(recipe_of(chosen.set, chosen.rows, name == "compiled"), accelerator) for name in ("eager", "compiled")}
    settings = trainers["eager"].recipe.model
    rows = read_batch(chosen.corpus, chosen.rows * (chosen.steps + 1), settings.image.size, settings.text.context_length)
    first = {name: seconds_of_step(trainer, part(rows, 0, chosen.rows)) for name, trainer in trainers.items()}
    graphs = num_graphs()
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(chosen.steps):
        batch = part(rows, (number + 1) * chosen.rows, chosen.rows)
        for name, trainer in trainers.items():
            times[name].append(seconds_of_step(trainer, batch))
    median = {name: statistics.median(each) for name, each in times.items()}
    ratio = median["compiled"] / median["eager"]
    table = Table("blocks", "first step, s", "step, s (median)", "fastest, s", "of eager", title=f"{chosen.rows} rows, {chosen.steps} steps each, {accelerator.device}, {chosen.threads} threads")
    for name, each in times.items():
        table.add_row(name, f"{first[name]:.1f}", f"{median[name]:.3f}", f"{min(each):.3f}", f"{median[name] / median['eager']:.3f}")
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"{graphs} graphs, {num_graphs() - graphs} more after the first step")
    figures = {"first_step": first, "median": median, "fastest": {name: min(each) for name, each in times.items()}}
    print(json.dumps({"benchmark": "compile", "device": str(accelerator.device), "threads": chosen.threads, "rows": chosen.rows, "settings": chosen.set, "seconds": {kind: {name: round(value, 4) for name, value in each.items()} for kind, each in figures.items()}, "compiled_over_eager": round(ratio, 4), "graphs": graphs, "graphs_after_first_step": num_graphs() - graphs}))


if __name__ == "__main__":
    main()
