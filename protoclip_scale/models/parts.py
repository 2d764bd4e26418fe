"""Parts of the dual encoder that a recipe can name to keep as they start (``model.frozen``)."""

from collections.abc import Callable

from protoclip_scale.errors import UserError
from protoclip_scale.models.dual_encoder import DualEncoder


def _below(prefix: str) -> Callable[[DualEncoder], set[str]]:
    return lambda model: {name for name, _ in model.named_parameters() if name.startswith(prefix)}


def _token_embedding(model: DualEncoder) -> set[str]:
    table = model.text_tower.encoder.get_input_embeddings().weight
    return {name for name, parameter in model.named_parameters() if parameter is table}


PARTS: dict[str, Callable[[DualEncoder], set[str]]] = {
    "image_tower": _below("image_tower."),
    "text_tower": _below("text_tower."),
    "patch_embedding": _below("image_tower.trunk.patch_embed.proj."),
    "token_embedding": _token_embedding,
}


def parameters_of(model: DualEncoder, part: str) -> set[str]:
    """Names of a part's parameters. Raises UserError if the model has no such part."""
    names = PARTS[part](model)
    if not names:
        raise UserError(f"model.frozen names {part}, but model.image.name {model.image_tower.name} has none; remove it, or choose a vision transformer")
    return names
