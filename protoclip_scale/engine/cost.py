"""What a recipe costs: arithmetic per sample, memory per rank, bytes on disk. Figures are counted where they can be, else called estimates."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.microbatches import num_microbatches
from protoclip_scale.objectives import Objective
from protoclip_scale.objectives.tiled import tile_rows
from protoclip_scale.prototypes import recording
from protoclip_scale.prototypes.loss import tile_elements
from protoclip_scale.recipe import Recipe

BACKWARD_FACTOR = 3  # forward, gradient of the inputs, gradient of the weights
FLOAT_BYTES = 4
ROW_BYTES = 9  # a row id and the mark that it is written
PROBE_ROWS = 2
DIRECTIONS = 2  # of a prototype objective: the image student and the text student


@dataclass(frozen=True)
class ModelCost:
    """``forward_flops`` (a multiply-add is 2) and bytes kept for the backward pass, per image-text pair with the longest caption."""

    parameters: dict[str, int]
    forward_flops: int
    activation_bytes: int

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())


def measure(model: DualEncoder, recipe: Recipe) -> ModelCost:
    """Counts one forward of two pairs in evaluation mode (no rank talks to another); 1-3 s for CLIP's ResNet-50 on 2 cores."""
    parameters: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        parameters[part] = parameters.get(part, 0) + parameter.numel()
    size, length = recipe.model.image.size, recipe.model.text.context_length
    images = torch.zeros(PROBE_ROWS, 3, size, size, dtype=torch.uint8)
    token_ids, lengths = torch.ones(PROBE_ROWS, length, dtype=torch.int64), torch.full((PROBE_ROWS,), length)
    was_training = model.training
    model.eval()
    model.text_tower.train()  # transformers recompute activations in training only; there is no dropout
    weights = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *model.buffers())}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, _saved_bytes(weights) as saved:
        model(images, token_ids, lengths, wants=model.features)
    model.train(was_training)
    return ModelCost(parameters, counter.get_total_flops() // PROBE_ROWS, sum(saved.values()) // PROBE_ROWS)


@contextlib.contextmanager
def _saved_bytes(weights: set[int]) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps inside the context, weights left out. Tensors are held, so no address is used twice."""
    held: list[torch.Tensor] = []
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held.append(tensor)
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def flops_per_sample(model_cost: ModelCost, recipe: Recipe, objectives: dict[str, Objective], world: int) -> dict[str, int]:
    """FLOPs per trained row: the towers' step, once more forward in micro-batches, the losses, and, with clusters, the extraction pass if there is one, and k-means at most: searches of rows that cannot
    have changed their cluster are left out, and most are."""
    batch, width = recipe.data.plan.global_batch, recipe.model.embed_dim
    flops = {"towers (forward and backward)": BACKWARD_FACTOR * model_cost.forward_flops}
    if num_microbatches(batch // world, recipe.optim.microbatch) > 1:
        flops["towers again (optim.microbatch)"] = model_cost.forward_flops
    losses = BACKWARD_FACTOR * sum(2 * batch * width * len(each.gathers) for each in objectives.values())
    labelings = sorted(set().union(*(each.clusters for each in objectives.values())))
    if recipe.prototypes and labelings:
        search = 2 * recipe.prototypes.clusters * recipe.model.prototype_heads.dim
        clusters_per_row = recipe.prototypes.clusters / recipe.data.plan.episode_size
        for each in objectives.values():
            losses += DIRECTIONS * 2 * search * bool(each.clusters)  # the gradient is formed with the loss: two products, none backward
            losses += int(2 * search * clusters_per_row) * len(each.soft_target_temperatures())  # what targets expect, once an episode
        if recipe.prototypes.refresh == "episode":
            flops["extraction"] = model_cost.forward_flops
        each_episode = [name for name in labelings if name != "teacher" or recipe.objectives["teacher"].refresh == "episode"]
        if each_episode:
            flops["k-means (at most)"] = search * recipe.prototypes.iterations * recipe.prototypes.restarts * len(each_episode)
        if recipe.prototypes.refresh == "online":
            losses += search * len(set(each_episode) - {"teacher"})  # the nearest centroid of every row
    return flops | {"losses": losses}


def memory_per_rank(model_cost: ModelCost, recipe: Recipe, objectives: dict[str, Objective], world: int) -> dict[str, int]:
    """Bytes of a rank under DDP, by what they hold. Activations are an estimate: evaluation mode, halved for half precision."""
    plan, parameters = recipe.data.plan, FLOAT_BYTES * model_cost.num_parameters
    local_rows, device = plan.global_batch // world, "cuda" if torch.cuda.is_available() else "cpu"
    memory = {"parameters": parameters, "gradients": parameters, "AdamW moments": 2 * parameters}
    gathered = sum(len(each.gathers) for each in objectives.values())
    tiles = 0
    if gathered:  # one tile's logits and softmax at a time; the gradients of rows and columns stay
        tiles += 2 * tile_rows(local_rows, plan.global_batch, device) * plan.global_batch + gathered * (local_rows + plan.global_batch) * recipe.model.embed_dim
    if recipe.prototypes:
        clusters, width = recipe.prototypes.clusters, recipe.model.prototype_heads.dim
        labelings = set().union(*(each.clusters for each in objectives.values()))
        clustered = [each for each in objectives.values() if each.clusters]
        soft = sum(len(each.soft_target_temperatures()) for each in objectives.values())
        centroids = len(labelings - {"teacher"}) + DIRECTIONS * len(clustered) + soft
        memory["prototypes"] = FLOAT_BYTES * centroids * clusters * width
        if clustered:  # one tile's logits and softmax at a time; the gradients of the student's rows stay
            tiles += 2 * tile_elements(local_rows, clusters, device) + DIRECTIONS * len(clustered) * local_rows * width
    memory["loss tiles"] = FLOAT_BYTES * tiles
    halved = 1 if recipe.optim.precision == "fp32" else 2
    rows_at_once = min(local_rows, recipe.optim.microbatch or local_rows)
    return memory | {"activations (estimate)": model_cost.activation_bytes * rows_at_once // halved}


def feature_store_bytes(recipe: Recipe, rows: int, teacher_dim: int) -> int:
    """Bytes in scratch of the features that one clustering of ``rows`` is made of, all lanes together; 0 without prototypes."""
    if not recipe.prototypes:
        return 0
    width = recipe.model.prototype_heads.dim
    students = {"episode": FLOAT_BYTES * 2 * width + ROW_BYTES, "recorded": recording.bytes_per_row(width), "online": 0}[recipe.prototypes.refresh]
    teacher = recipe.objectives.get("teacher")
    return rows * (students + (FLOAT_BYTES * teacher_dim + 1 if teacher and teacher.refresh == "episode" else 0))
