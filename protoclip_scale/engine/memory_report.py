"""What ``--check`` says of memory: a rank's under every strategy, and which one to launch with."""

import os
from typing import NamedTuple

import psutil
import torch

from protoclip_scale.engine.memory import USABLE_SHARE, Needed, memory_by_strategy, recommended, shared_memory, size_text
from protoclip_scale.engine.model_cost import ModelCost
from protoclip_scale.engine.optimizer import TITLES
from protoclip_scale.objectives import Objective
from protoclip_scale.recipe import Recipe


class Place(NamedTuple):
    """Where ranks would run: ``device`` cpu or cuda, bytes for each of them, and whose they are."""

    device: str
    available: int
    described: str


def place_of(world: int, memory_per_rank: int | None) -> Place:
    """The place that was named (taken for a GPU), this machine's GPU, or a share of its free memory."""
    if memory_per_rank:
        return Place("cuda", memory_per_rank, "--memory-per-rank")
    if torch.cuda.is_available():
        return Place("cuda", torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    shared = f", for {here} ranks" if here > 1 else ""
    return Place("cpu", psutil.virtual_memory().available // here, f"free memory of this machine{shared}; --memory-per-rank asks about another")


def memory_tables(cost: ModelCost, recipe: Recipe, objectives: dict[str, Objective], world: int, place: Place, recipe_file: str) -> tuple[dict[str, list[tuple[str, str]]], str | None]:
    """Rows by the title of their table, and the line that launches with the recommended strategy, if there is one."""
    shared = shared_memory(cost, recipe, objectives, world, place.device)
    found = memory_by_strategy(cost, recipe, objectives, world, place.device)
    chosen = recommended(found, recipe, place.available)
    tables = {
        "Memory per rank, under every strategy": [(part, size_text(number)) for part, number in (*shared.items(), ("all", sum(shared.values())))],
        f"Memory per rank, {world} rank{'s' * (world > 1)}": [(each.layout.title, _described(each, TITLES[recipe.optim.name])) for each in found],
        "Recommended strategy": [_recommendation(found, chosen, recipe, place)],
    }
    if chosen is None:
        return tables, None
    config = f"launch/accelerate/{chosen.layout.files[place.device]}"
    return tables, f"accelerate launch --config_file {config} --num_processes {world} launch/pretrain.py --recipe {recipe_file} --expect-ranks {world}"


def _described(needed: Needed, optimizer: str) -> str:
    parts = {"weights": needed.state.weights, "gradients": needed.state.gradients, optimizer: needed.state.optimizer, "averaged weights": needed.state.average, "buckets": needed.state.buckets}
    listed = ", ".join(f"{name} {size_text(number)}" for name, number in parts.items() if number)
    host = f"; {size_text(needed.state.host)} in CPU memory" if needed.state.host else ""
    return f"{size_text(needed.device)}: {listed}, the above {size_text(needed.shared)}{host}"


def _recommendation(found: list[Needed], chosen: Needed | None, recipe: Recipe, place: Place) -> tuple[str, str]:
    room = f"{size_text(USABLE_SHARE * place.available)} that may be used of {size_text(place.available)} ({place.described})"
    if chosen is None:
        least = min(found, key=lambda each: each.device)
        fix = f"more ranks, a smaller optim.microbatch (now {recipe.optim.microbatch or 'null'}), model.image.grad_checkpointing and model.text.grad_checkpointing, or a smaller data.plan.global_batch"
        return ("none", f"nothing fits into the {room}: {least.layout.title} would need {size_text(least.device)}; use {fix}")
    larger = [each for each in found[: found.index(chosen)] if each.device > USABLE_SHARE * place.available]
    others = "".join(f"; {each.layout.title} would need {size_text(each.device)}" for each in larger)
    return (chosen.layout.title, f"needs {size_text(chosen.device)} of the {room}, and {chosen.layout.traffic}{others}")
