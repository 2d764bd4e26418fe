"""What a rank needs in memory, in bytes: activations, prototypes and loss tiles, which are the same under every strategy, beside what each strategy makes of the
weights; and which strategy to take."""

import re
from dataclasses import dataclass

import torch

from protoclip_scale.engine.cost import DIRECTIONS, FLOAT_BYTES
from protoclip_scale.engine.model_cost import ModelCost
from protoclip_scale.engine.strategy.memory import LAYOUTS, Layout, Sizes, StateMemory
from protoclip_scale.errors import UserError
from protoclip_scale.models.features import parse
from protoclip_scale.models.microbatches import num_microbatches
from protoclip_scale.objectives import Objective, used, views_of
from protoclip_scale.objectives.shared.tiled import tile_rows
from protoclip_scale.prototypes.loss import tile_elements
from protoclip_scale.recipe import Recipe

HALF_SHARE = 0.55  # of fp32's activations: what layer norms and residual sums keep stays fp32
HALF_BYTES = 2
USABLE_SHARE = 0.9  # of a device: libraries, their workspaces and fragmentation take the rest
UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_size(text: str) -> int:
    """Bytes of '80GB' or '79.6 GiB'. Raises UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([kmgt]?i?b)\s*", text.lower())
    size = int(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else 0
    if size <= 0:
        raise UserError(f"--memory-per-rank {text!r} is no amount of memory; write for instance 80GB or 640GiB")
    return size


def size_text(number: float) -> str:
    """Bytes as B, kB, MB, GB or TB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def sizes_of(cost: ModelCost, recipe: Recipe) -> Sizes:
    return Sizes(cost.num_parameters, cost.trained, max(cost.blocks, default=0), cost.num_parameters - sum(cost.blocks), averaged=recipe.optim.ema is not None, by_sgd=cost.by_sgd)


def shared_memory(cost: ModelCost, recipe: Recipe, objectives: dict[str, Objective], world: int, device: str) -> dict[str, int]:
    """What every strategy needs besides the weights' state, by what it holds. ``device``: cpu or cuda, which decides the size of tiles."""
    plan = recipe.data.plan
    local_rows = plan.global_batch // world
    views = views_of(objectives)
    images, texts = 1 + len(views.images), 1 + len(views.texts) + 2 * len(views.masked)  # masked ones have labels
    memory = {"images and captions": local_rows * (images * 3 * recipe.model.image.size**2 + texts * 8 * recipe.model.text.context_length)}
    memory |= _activations(cost, recipe, local_rows)
    gathered = sum(_numbers_gathered(each, cost) for each in used(objectives).values())
    tiles = 0
    if gathered:  # one tile's logits and softmax at a time; the gradients of rows and columns stay
        tiles += 2 * tile_rows(local_rows, plan.global_batch, device) * plan.global_batch + gathered * (local_rows + plan.global_batch)
    if remembered := sum(_bytes_of_state(each) for each in used(objectives).values()):
        memory["what objectives remember"] = remembered
    if recipe.prototypes:
        clusters, width = recipe.prototypes.clusters, recipe.model.prototype_heads.dim
        labelings = set().union(*(each.clusters for each in objectives.values()))
        clustered = [each for each in objectives.values() if each.clusters]
        soft = sum(len(each.soft_target_temperatures()) for each in objectives.values())
        centroids = len(labelings - {"teacher"}) + DIRECTIONS * len(clustered) + soft
        memory["prototypes"] = FLOAT_BYTES * centroids * clusters * width
        if clustered:  # one tile's logits and softmax at a time; the gradients of the student's rows stay
            tiles += 2 * tile_elements(local_rows, clusters, device) + DIRECTIONS * len(clustered) * local_rows * width
    return memory | {"loss tiles": FLOAT_BYTES * tiles}


def _numbers_gathered(objective: Objective, cost: ModelCost) -> int:
    """Of a row, for one objective."""
    sizes = cost.sizes | objective.derived_sizes(cost.sizes)
    return sum(sizes[name] if name in sizes else sizes[parse(name).kind] for name in objective.gathers)


def _bytes_of_state(objective: Objective) -> int:
    objective.prepare(torch.device("meta"))
    return sum(tensor.nbytes for tensor in objective.state().values())


def _activations(cost: ModelCost, recipe: Recipe, local_rows: int) -> dict[str, int]:
    """Both towers' for all rows of all views; or, in micro-batches, one tower's for one of them, beside what towers give for each row."""
    recomputed = {side: getattr(recipe.model, side).grad_checkpointing for side in cost.towers}
    per_row = {side: each.checkpointed if recomputed[side] else each.whole for side, each in cost.towers.items()}
    passes = {part: cost.passes(part, cost.wants) for part in cost.users}
    rows, cut = local_rows, num_microbatches(local_rows, recipe.optim.microbatch) > 1
    if cut:
        rows = recipe.optim.microbatch
    towers = rows * (max(per_row.values()) if cut else sum(passes[f"{side}_tower"] * each for side, each in per_row.items()))
    half = recipe.optim.precision != "fp32"
    outputs = local_rows * (sum(passes[part] * each for part, each in cost.heads.items()) + DIRECTIONS * FLOAT_BYTES * recipe.model.embed_dim)
    tokens = sum(cost.sizes[feature.kind] for feature in map(parse, cost.wants) if feature.kind in cost.in_parts)  # for all rows, and their gradients
    outputs += 2 * local_rows * FLOAT_BYTES * tokens
    memory = {"activations (estimate)": round(towers * (HALF_SHARE if half else 1)) + outputs}
    if half:  # autocast's copies of weights live until the backward pass has used them
        memory["weights in half precision"] = HALF_BYTES * (max(cost.blocks, default=0) if all(recomputed.values()) else cost.products)
    return memory


@dataclass(frozen=True)
class Needed:
    """Bytes of a rank under one strategy."""

    layout: Layout
    state: StateMemory
    shared: int

    @property
    def device(self) -> int:
        return self.state.device + self.shared


def memory_by_strategy(cost: ModelCost, recipe: Recipe, objectives: dict[str, Objective], world: int, device: str) -> list[Needed]:
    """Under every strategy that makes sense for ``world`` ranks and takes the recipe's optimiser, least communication first."""
    shared = sum(shared_memory(cost, recipe, objectives, world, device).values())
    sizes = sizes_of(cost, recipe)
    return [Needed(layout, layout.memory(sizes, world), shared) for layout in LAYOUTS if layout.makes_sense(world, device, recipe.optim.name)]


def recommended(found: list[Needed], recipe: Recipe, available: int) -> Needed | None:
    """The first that fits into ``available`` bytes, some left free, and takes the recipe; None if none does."""
    usable = USABLE_SHARE * available
    return next((each for each in found if each.device <= usable and not (recipe.optim.compile_blocks and not each.layout.compiles)), None)
