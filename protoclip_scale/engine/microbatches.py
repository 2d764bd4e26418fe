"""Which models may be trained in micro-batches."""

from protoclip_scale.errors import UserError
from protoclip_scale.models.batch_norm import GroupBatchNorm
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.microbatches import num_microbatches
from protoclip_scale.recipe.schema import Recipe


def refuse_batch_norm(model: DualEncoder, recipe: Recipe, world: int) -> None:
    """UserError if micro-batches would change the statistics of a tower's batch norm, unless the recipe allows it. Heads see all rows at once; a frozen tower takes
    no statistics."""
    local_rows = recipe.data.plan.global_batch // world
    if recipe.run.allow_batchnorm_microbatches or num_microbatches(local_rows, recipe.optim.microbatch) == 1:
        return
    for side, tower, name in (("image", model.image_tower, recipe.model.image.name), ("text", model.text_tower, recipe.model.text.name)):
        if f"{side}_tower" not in recipe.model.frozen and any(isinstance(layer, GroupBatchNorm) for layer in tower.modules()):
            raise UserError(
                f"optim.microbatch {recipe.optim.microbatch} cuts the {local_rows} rows of a rank, but model.{side}.name {name} has batch norm: its statistics would be those of each "
                "micro-batch over all ranks instead of the batch's, and running statistics would move once per micro-batch; set optim.microbatch to null, choose a tower "
                "without batch norm, or accept that with run.allow_batchnorm_microbatches true"
            )
