"""Both towers, their projections, temperatures and prototype heads: everything that is trained."""

import contextlib
import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import nn

from protoclip_scale.data.transforms import normalize
from protoclip_scale.models.batch_norm import convert_batch_norm
from protoclip_scale.models.heads import PrototypeHead
from protoclip_scale.models.image import ImageTower
from protoclip_scale.models.microbatches import in_microbatches
from protoclip_scale.models.scale import LogitScale
from protoclip_scale.models.text import TextTower
from protoclip_scale.recipe import schema

NORMALIZATION = {"clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD), "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)}

# part of the model -> features that are computed with it
USERS = {
    "image_tower": {"image", "image_prototype"},
    "image_projection": {"image", "image_prototype"},
    "text_tower": {"text", "text_prototype"},
    "text_projection": {"text", "text_prototype"},
    "image_prototype_head": {"image_prototype"},
    "text_prototype_head": {"text_prototype"},
    "logit_scale": {"logit_scale"},
    "prototype_logit_scale": {"prototype_scale"},
}
FEATURES = frozenset().union(*USERS.values())
BEFORE_THE_EMBEDDING = frozenset({"image_projected", "image_pooled"})  # what any model gives of images, beside their embeddings, to who evaluates it


class ParameterGroup(NamedTuple):
    """Which learning rate (``visual`` or ``other``) a parameter follows, whether it decays, and the part it belongs to if that may enter training later than
    the towers do."""

    side: str
    decay: bool
    later: str


class DualEncoder(nn.Module):
    """The model of a recipe with the parts that ``features`` need, a subset of ``FEATURES``.

    ``forward`` computes the wanted features in fp32 (fp64 for fp64 weights), whatever autocast runs the towers in:
    ``image``, ``text`` unit rows [B, embed_dim]; ``image_prototype``, ``text_prototype`` unit rows [B, P], from the un-normalised
    projected outputs; ``logit_scale``, ``prototype_scale`` (1,); beside ``image``, the un-normalised ``image_projected`` and the tower's own ``image_pooled``. Projections are linear without bias, so
    that every layout of an export holds them. Batch norm is ``GroupBatchNorm`` with ``norm_groups``.

    ``compiled``: whether blocks have been compiled in place. ``compute_dtype``, if it is set, is what autocast runs the towers in. Everything that reads weights goes through ``forward``: where ranks hold
    parts of them, they are put together by its hooks.
    """

    def __init__(self, model: schema.Model, features: frozenset[str], pretrained: bool | None = None):
        super().__init__()
        assert features <= FEATURES, f"unknown features {set(features - FEATURES)}"
        self.features = frozenset(features)
        self.embed_dim = model.embed_dim
        image_tower = ImageTower(model.image, pretrained)
        self.image_tower = convert_batch_norm(image_tower, model.norm_groups)
        self.text_tower = TextTower(model.text, pretrained)
        self.image_projection = _projection(image_tower.num_features, model.embed_dim)
        self.text_projection = _projection(self.text_tower.num_features, model.embed_dim)
        self.logit_scale = LogitScale(model.logit_scale)
        # after the towers, so that these start alike with and without heads
        if features & {"image_prototype", "text_prototype"}:
            self.text_prototype_head = PrototypeHead(model.embed_dim, model.prototype_heads, model.norm_groups)
            self.image_prototype_head = copy.deepcopy(self.text_prototype_head)
        if "prototype_scale" in features:
            self.prototype_logit_scale = LogitScale(model.logit_scale)
        self.normalization = NORMALIZATION[model.image.normalization]
        self.frozen_towers: frozenset[str] = frozenset()
        self.compute_dtype: torch.dtype | None = None
        self.compiled = False

    def forward(
        self,
        images: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        token_lengths: torch.Tensor | None = None,
        *,
        wants: frozenset[str],
        records: frozenset[str] = frozenset(),
        microbatch: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """The ``wants`` features of images (uint8 [B, 3, S, S], or floats that are already normalised) and captions; those of ``records`` that
        are not wanted besides are computed without gradient, so that their heads need not train. Inputs that nothing asks for may be None.
        Towers take at most ``microbatch`` rows at once (see ``in_microbatches``), heads all. ``token_lengths`` may lie on the CPU in any case.
        """
        known = self.features | {"image", "text"} | BEFORE_THE_EMBEDDING
        assert wants | records <= known, f"wanted {set((wants | records) - known)} which the model was not built for"
        with self._autocast((token_ids if images is None else images).device):
            return self._features(images, token_ids, token_lengths, wants, records, microbatch)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        # a cache of weights would keep gathered ones alive
        return torch.autocast(device.type, self.compute_dtype, cache_enabled=False)

    def _features(self, images, token_ids, token_lengths, wants, records, microbatch) -> dict[str, torch.Tensor]:
        outputs = {}
        for side, inputs in (("image", (images,)), ("text", (token_ids, token_lengths))):
            prototype, asked = f"{side}_prototype", wants | records
            if not asked & {side, prototype}:
                continue
            if side == "image" and "image_pooled" in wants:
                outputs["image_pooled"] = self._pooled_image(images)
                projected = _in_full_precision(self.image_projection, outputs["image_pooled"])
            else:
                projected = self._projected(side, microbatch, *inputs)
            if side == "image" and "image_projected" in wants:
                outputs["image_projected"] = projected
            if side in wants:
                outputs[side] = F.normalize(projected, dim=-1)
            if prototype in asked:
                with torch.set_grad_enabled(torch.is_grad_enabled() and prototype in wants):
                    outputs[prototype] = self._prototype(getattr(self, f"{prototype}_head"), projected)
        if "logit_scale" in wants:
            outputs["logit_scale"] = self.logit_scale()
        if "prototype_scale" in wants:
            outputs["prototype_scale"] = self.prototype_logit_scale()
        return outputs

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Unit embeddings [B, embed_dim] of images."""
        return self(images, None, None, wants=frozenset({"image"}))["image"]

    def encode_text(self, token_ids: torch.Tensor, token_lengths: torch.Tensor) -> torch.Tensor:
        """Unit embeddings [B, embed_dim] of captions."""
        return self(None, token_ids, token_lengths, wants=frozenset({"text"}))["text"]

    def normalize_images(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, S, S] -> floats with the recipe's channel means and deviations; floats pass unchanged."""
        if images.dtype != torch.uint8:
            return images
        return normalize(images, *self.normalization).to(next(self.parameters()).dtype)

    def _projected(self, side: str, microbatch: int | None, *inputs: torch.Tensor) -> torch.Tensor:
        """[B, embed_dim] of a tower with its projection; of a frozen tower nothing is kept for the backward pass but what it gives."""
        pool = {"image": self._pooled_image, "text": self.text_tower.pooled}[side]
        projection = getattr(self, f"{side}_projection")
        if side in self.frozen_towers:
            with torch.no_grad():
                pooled = in_microbatches(pool, microbatch, *inputs)
            return _in_full_precision(projection, pooled)
        return in_microbatches(lambda *rows: _in_full_precision(projection, pool(*rows)), microbatch, *inputs)

    def _pooled_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.image_tower(self.normalize_images(images)).pooled

    def _prototype(self, head: PrototypeHead, projected: torch.Tensor) -> torch.Tensor:
        return F.normalize(_in_full_precision(head, projected), dim=-1)

    def train_only(self, names: frozenset[str]) -> None:
        """Ask for gradients of these parameters alone. A tower of which nothing trains is frozen: evaluation mode even after ``train()``, no gradient."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in names)
        self.frozen_towers = frozenset(side for side in ("image", "text") if not any(name.startswith(f"{side}_tower.") for name in names))
        self.train(self.training)

    def train(self, mode: bool = True) -> "DualEncoder":
        super().train(mode)
        for side in self.frozen_towers:
            getattr(self, f"{side}_tower").eval()
        return self

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """Every parameter's optimiser group (methods 6.1): ``visual`` is the image tower with its projection; no decay for
        vectors (gains, biases, class tokens, logit scales) and prototype heads. What only prototypes use may start later than the rest."""
        groups = {}
        for name, parameter in self.named_parameters():
            part = name.split(".")[0]
            is_vector = sum(size > 1 for size in parameter.shape) < 2
            side = "visual" if part in ("image_tower", "image_projection") else "other"
            groups[name] = ParameterGroup(side, not is_vector and not part.endswith("prototype_head"), part if "prototype" in part else "")
        return groups

    def head_parameters(self, feature_names: Iterable[str]) -> list[str]:
        """Names of the parameters that no other of the model's features is computed with."""
        names = frozenset(feature_names)
        parts = {part for part, users in USERS.items() if (users & self.features) <= names}
        return [name for name, _ in self.named_parameters() if name.split(".")[0] in parts]


def _projection(in_dim: int, out_dim: int) -> nn.Linear:
    linear = nn.Linear(in_dim, out_dim, bias=False)
    nn.init.normal_(linear.weight, std=in_dim**-0.5)
    return linear


def _in_full_precision(module: nn.Module, features: torch.Tensor) -> torch.Tensor:
    with torch.autocast(features.device.type, enabled=False):
        output = module(features.to(next(module.parameters()).dtype))
        return output.to(torch.promote_types(output.dtype, torch.float32))
