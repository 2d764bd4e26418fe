"""``token_heads.safetensors`` of an export: FILIP's heads and temperature, for which no other library's layout has a place.

Tensors, float32: ``image.weight`` [D, width], ``image.bias``, ``text.weight``, ``text.bias`` of the linear maps behind the towers' token states, and ``logit_scale``, the logarithm of the
temperature as it is used, a scalar. Metadata: ``special_tokens`` and ``embeddings``, ``true`` or ``false``, see ``TokenFacts``.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from protoclip_scale.errors import UserError
from protoclip_scale.models.build import load_export
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.open_clip_keys import Made
from protoclip_scale.objectives.compared import Compared, compared_by
from protoclip_scale.objectives.filip import LateInteraction, token_heads
from protoclip_scale.recipe import schema

FILE = "token_heads.safetensors"
_SOURCES = {f"{side}.{part}": f"{kind}_head.linear.{part}" for side, kind in zip(("image", "text"), LateInteraction.token_kinds, strict=True) for part in ("weight", "bias")}
_SCALE = "filip_scale_head.log"


class TokenFacts(NamedTuple):
    """``special_tokens``: whether a text's start and end count; ``embeddings``: whether the model's embeddings are trained, too."""

    special_tokens: bool
    embeddings: bool

    def metadata(self) -> dict[str, str]:
        return {"format": "pt"} | {name: str(value).lower() for name, value in self._asdict().items()}


class TokenHeads(NamedTuple):
    """A run's: ``scale``, start and bounds of its temperature."""

    facts: TokenFacts
    scale: schema.LogitScale

    def plan(self) -> dict[str, Made]:
        """What the file's tensors are made of, by the names of a run's model."""
        bounds = self.scale.minimum, self.scale.maximum
        return {name: Made((source,)) for name, source in _SOURCES.items()} | {"logit_scale": Made((_SCALE,), lambda log: log.clamp(*bounds).reshape(()))}


class Exported(NamedTuple):
    """``settings``, ``model``: see ``load_export``; ``compared``: what is to be compared of it; ``token_scale``: what similarities of tokens are multiplied by for a softmax, None without tokens."""

    settings: schema.Model
    model: DualEncoder
    compared: Compared = Compared()
    token_scale: float | None = None


def token_heads_of(recipe: schema.Recipe) -> TokenHeads | None:
    """None for a recipe that trains no tokens."""
    compared = compared_by(recipe)
    if not compared.tokens:
        return None
    settings = recipe.objectives["filip"]
    return TokenHeads(TokenFacts(settings.special_tokens, compared.embeddings), settings.logit_scale or recipe.model.logit_scale)


def read_facts(path: Path) -> TokenFacts:
    """Raises UserError for a file that is none."""
    return _read(path)[0]


def load_with_tokens(folder: str | Path) -> Exported:
    """``load_export``, with heads for tokens if their file is there. Raises UserError for a file that is damaged or of other towers."""
    path = Path(folder) / FILE
    if not path.is_file():
        return Exported(*load_export(folder))
    facts, tensors = _read(path)
    settings, model = load_export(folder, token_heads(len(tensors["image.bias"]), facts.special_tokens))
    own = model.state_dict()
    for name, source in _SOURCES.items():
        if own[source].shape != tensors[name].shape:
            raise UserError(f"{path}: {name} is {list(tensors[name].shape)}, but these towers need {list(own[source].shape)}; export the model again")
    model.load_state_dict({source: tensors[name] for name, source in _SOURCES.items()}, strict=False)
    return Exported(settings, model.eval(), Compared(facts.embeddings, LateInteraction.token_kinds), tensors["logit_scale"].exp().item())


def heads_beside(folder: Path) -> dict[str, torch.Tensor]:
    """What an export's file holds, by the names of a run's model; nothing without a file. Raises UserError for a file that is damaged."""
    path = folder / FILE
    if not path.is_file():
        return {}
    _, tensors = _read(path)
    return {source: tensors[name] for name, source in _SOURCES.items()} | {_SCALE: tensors["logit_scale"].reshape(1)}


def _read(path: Path) -> tuple[TokenFacts, dict[str, torch.Tensor]]:
    """What the file says, and its tensors in float32, whose shapes fit each other."""
    try:
        with safe_open(path, framework="pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in (*_SOURCES, "logit_scale")}
        facts = TokenFacts(*({"true": True, "false": False}[about[name]] for name in TokenFacts._fields))
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path} is no file of token heads ({' '.join(str(error).split())[:200]}); export the model again") from error
    dims = {name: 2 if name.endswith("weight") else 1 for name in _SOURCES} | {"logit_scale": 0}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dim() != dims[name] or not tensor.numel():
            raise UserError(f"{path}: {name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, not {('a float', 'a vector of floats', 'a matrix of floats')[dims[name]]}; export the model again")
    rows = {name: len(tensors[name]) for name in _SOURCES}
    if len(set(rows.values())) > 1:
        raise UserError(f"{path}: tokens of both sides have one width, but {', '.join(f'{name} has {number}' for name, number in rows.items())} rows; export the model again")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not (tensor.exp() if name == "logit_scale" else tensor).isfinite().all():
            raise UserError(f"{path}: {name} holds what is no finite number; export the model again")
    return facts, tensors
