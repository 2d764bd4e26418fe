"""What a recipe costs beside memory: arithmetic per sample, and bytes on disk."""

from protoclip_scale.engine.encoding import FEATURES
from protoclip_scale.engine.model_cost import ModelCost
from protoclip_scale.models.microbatches import num_microbatches
from protoclip_scale.objectives import Objective, used
from protoclip_scale.prototypes import recording
from protoclip_scale.recipe import Recipe

TRAINING_FACTOR = 3  # forward, gradient of the inputs, gradient of the weights
FLOAT_BYTES = 4
ROW_BYTES = 9  # a row id and the mark that it is written
DIRECTIONS = 2  # of a prototype objective: the image student and the text student


def flops_per_sample(model_cost: ModelCost, recipe: Recipe, objectives: dict[str, Objective], world: int) -> dict[str, int]:
    """FLOPs per trained row: the towers' step, once more forward in micro-batches, the losses, and, with clusters, the extraction pass if there is one, and k-means at most: searches of rows that cannot
    have changed their cluster are left out, and most are."""
    batch = recipe.data.plan.global_batch
    flops = {"towers (forward and backward)": TRAINING_FACTOR * model_cost.forward_flops}
    if num_microbatches(batch // world, recipe.optim.microbatch) > 1:
        flops["towers again (optim.microbatch)"] = model_cost.forward_flops
    losses = TRAINING_FACTOR * sum(2 * each.loss_products(batch, model_cost.sizes) for each in used(objectives).values())
    labelings = sorted(set().union(*(each.clusters for each in objectives.values())))
    if recipe.prototypes and labelings:
        search = 2 * recipe.prototypes.clusters * recipe.model.prototype_heads.dim
        clusters_per_row = recipe.prototypes.clusters / recipe.data.plan.episode_size
        for each in objectives.values():
            losses += DIRECTIONS * 2 * search * bool(each.clusters)  # the gradient is formed with the loss: two products, none backward
            losses += int(2 * search * clusters_per_row) * len(each.soft_target_temperatures())  # what targets expect, once an episode
        if recipe.prototypes.refresh == "episode":
            flops["extraction"] = model_cost.flops_of(frozenset(FEATURES.values()))
        each_episode = [name for name in labelings if name != "teacher" or recipe.objectives["teacher"].refresh == "episode"]
        if each_episode:
            flops["k-means (at most)"] = search * recipe.prototypes.iterations * recipe.prototypes.restarts * len(each_episode)
        if recipe.prototypes.refresh == "online":
            losses += search * len(set(each_episode) - {"teacher"})  # the nearest centroid of every row
    return flops | {"losses": losses}


def feature_store_bytes(recipe: Recipe, rows: int, teacher_dim: int) -> int:
    """Bytes in scratch of the features that one clustering of ``rows`` is made of, all lanes together; 0 without prototypes."""
    if not recipe.prototypes:
        return 0
    width = recipe.model.prototype_heads.dim
    students = {"episode": FLOAT_BYTES * 2 * width + ROW_BYTES, "recorded": recording.bytes_per_row(width), "online": 0}[recipe.prototypes.refresh]
    teacher = recipe.objectives.get("teacher")
    return rows * (students + (FLOAT_BYTES * teacher_dim + 1 if teacher and teacher.refresh == "episode" else 0))
