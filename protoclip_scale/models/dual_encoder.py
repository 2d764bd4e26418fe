"""Both towers, their projections, temperatures and prototype heads: everything that is trained."""

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


class ParameterGroup(NamedTuple):
    """Which learning rate (``visual`` or ``other``) a parameter follows, and whether it decays."""

    side: str
    decay: bool


class _JoinGraph(torch.autograd.Function):
    """The output unchanged; the parameters get a gradient of exact zeros, whatever the output's is."""

    @staticmethod
    def forward(ctx, output, *parameters):
        ctx.parameters = parameters
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.parameters)


class DualEncoder(nn.Module):
    """The model of a recipe with the parts that ``features`` need, a subset of ``FEATURES``.

    ``forward`` computes the wanted features in fp32 (fp64 for fp64 weights), whatever autocast runs the towers in:
    ``image``, ``text`` unit rows [B, embed_dim]; ``image_prototype``, ``text_prototype`` unit rows [B, P], from the un-normalised
    projected outputs; ``logit_scale``, ``prototype_scale`` (1,). Projections are linear without bias, except where timm's
    model ends in its own (``ImageTower.ends_in_projection``). Parts that are built but not wanted join the graph with a
    gradient of exact zero, since DDP waits for every parameter. Batch norm is ``GroupBatchNorm`` with ``norm_groups``.
    """

    def __init__(self, model: schema.Model, features: frozenset[str], pretrained: bool | None = None):
        super().__init__()
        assert features <= FEATURES, f"unknown features {set(features - FEATURES)}"
        self.features = frozenset(features)
        self.embed_dim = model.embed_dim
        image_tower = ImageTower(model.image, pretrained)
        self.image_tower = convert_batch_norm(image_tower, model.norm_groups)
        self.text_tower = TextTower(model.text, pretrained)
        self.image_projection = _projection(image_tower.num_features, model.embed_dim, image_tower.ends_in_projection)
        self.text_projection = _projection(self.text_tower.num_features, model.embed_dim, False)
        self.logit_scale = LogitScale(model.logit_scale)
        # after the towers, so that these start alike with and without heads
        if features & {"image_prototype", "text_prototype"}:
            self.text_prototype_head = PrototypeHead(model.embed_dim, model.prototype_heads, model.norm_groups)
            self.image_prototype_head = copy.deepcopy(self.text_prototype_head)
        if "prototype_scale" in features:
            self.prototype_logit_scale = LogitScale(model.logit_scale)
        self.normalization = NORMALIZATION[model.image.normalization]
        self.image_frozen = False

    def forward(
        self, images: torch.Tensor, token_ids: torch.Tensor, token_lengths: torch.Tensor, wants: frozenset[str], records: frozenset[str] = frozenset()
    ) -> dict[str, torch.Tensor]:
        """The ``wants`` features of images (uint8 [B, 3, S, S], or floats that are already normalised) and captions; those of ``records`` that
        are not wanted besides are computed without gradient, their heads as idle as if they were not asked for."""
        assert wants | records <= self.features, f"wanted {set((wants | records) - self.features)} which the model was not built for"
        outputs = {}
        for side, project in (("image", lambda: self._project_image(images)), ("text", lambda: self._project_text(token_ids, token_lengths))):
            prototype, asked = f"{side}_prototype", wants | records
            if not asked & {side, prototype}:
                continue
            projected = project()
            if side in wants:
                outputs[side] = F.normalize(projected, dim=-1)
            if prototype in asked:
                with torch.set_grad_enabled(torch.is_grad_enabled() and prototype in wants):
                    outputs[prototype] = self._prototype(getattr(self, f"{prototype}_head"), projected)
        if "logit_scale" in wants:
            outputs["logit_scale"] = self.logit_scale()
        if "prototype_scale" in wants:
            outputs["prototype_scale"] = self.prototype_logit_scale()
        if torch.is_grad_enabled():
            unused = [self.get_parameter(name) for name in self.head_parameters(FEATURES - wants)]
            idle = [parameter for parameter in unused if parameter.requires_grad]
            if idle:
                outputs = {name: _JoinGraph.apply(output, *idle) if name in wants else output for name, output in outputs.items()}
        return outputs

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Unit embeddings [B, embed_dim] of images."""
        return F.normalize(self._project_image(images), dim=-1)

    def encode_text(self, token_ids: torch.Tensor, token_lengths: torch.Tensor) -> torch.Tensor:
        """Unit embeddings [B, embed_dim] of captions."""
        return F.normalize(self._project_text(token_ids, token_lengths), dim=-1)

    def normalize_images(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, S, S] -> floats with the recipe's channel means and deviations; floats pass unchanged."""
        if images.dtype != torch.uint8:
            return images
        return normalize(images, *self.normalization).to(self.logit_scale.log.dtype)

    def _project_image(self, images: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.image_frozen):
            pooled = self.image_tower(self.normalize_images(images)).pooled
            return _in_full_precision(self.image_projection, pooled)

    def _project_text(self, token_ids: torch.Tensor, token_lengths: torch.Tensor) -> torch.Tensor:
        return _in_full_precision(self.text_projection, self.text_tower(token_ids, token_lengths).pooled)

    def _prototype(self, head: PrototypeHead, projected: torch.Tensor) -> torch.Tensor:
        return F.normalize(_in_full_precision(head, projected), dim=-1)

    def freeze_image(self) -> None:
        """Lock the image tower and its projection: no gradients, evaluation mode even after ``train()``."""
        self.image_frozen = True
        self.image_tower.requires_grad_(False)
        self.image_projection.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "DualEncoder":
        super().train(mode)
        if self.image_frozen:
            self.image_tower.eval()
            self.image_projection.eval()
        return self

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """Every parameter's optimiser group (methods 6.1): ``visual`` is the image tower with its projection; no decay for
        vectors (gains, biases, class tokens, logit scales) and prototype heads."""
        groups = {}
        for name, parameter in self.named_parameters():
            part = name.split(".")[0]
            is_vector = sum(size > 1 for size in parameter.shape) < 2
            groups[name] = ParameterGroup("visual" if part in ("image_tower", "image_projection") else "other", not is_vector and not part.endswith("prototype_head"))
        return groups

    def head_parameters(self, feature_names: Iterable[str]) -> list[str]:
        """Names of the parameters that no other of the model's features is computed with."""
        names = frozenset(feature_names)
        parts = {part for part, users in USERS.items() if (users & self.features) <= names}
        return [name for name, _ in self.named_parameters() if name.split(".")[0] in parts]


def _projection(in_dim: int, out_dim: int, bias: bool) -> nn.Linear:
    linear = nn.Linear(in_dim, out_dim, bias=bias)
    nn.init.normal_(linear.weight, std=in_dim**-0.5)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def _in_full_precision(module: nn.Module, features: torch.Tensor) -> torch.Tensor:
    with torch.autocast(features.device.type, enabled=False):
        output = module(features.to(next(module.parameters()).dtype))
        return output.to(torch.promote_types(output.dtype, torch.float32))
