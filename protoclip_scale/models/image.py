"""The image tower: any timm model, without its classifier."""

import timm
import torch
from timm.layers import AttentionPool2d, RotAttentionPool2d
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from protoclip_scale.errors import UserError
from protoclip_scale.models.outputs import TowerOutput
from protoclip_scale.models.row_dropout import key_by_row
from protoclip_scale.recipe import schema


class ImageTower(nn.Module):
    """[B, 3, size, size] normalised images -> pooled features [B, num_features] by the model's own pooling.

    The trunk is built as open_clip's TimmModel builds it: from the name alone, classifier removed; only towers whose position
    embeddings are made for one size (``fixed_size``) are told another ``settings.size``. ``ends_in_projection`` is true where
    timm's classifier is the model's own projection (CLIP's attention pools, models with a hidden layer behind the pooling).
    ``arguments`` are what timm was told besides the name; ``pooling_parameters`` the names of the weights that pooling alone reads, and tokens do not. Tokens of a convolutional trunk are the places of its last map, row by row;
    a transformer's begin with ``num_prefix_tokens`` class or register tokens.

    Extra tokens [B, E, width] with a mask [B, E] (true: attended to) join a vision transformer behind the position
    embeddings; the pooling leaves them out, ``tokens`` and ``mask`` hold them last. ``row_keys``, int64 [B], say what is dropped by chance in training (``row_dropout``); None: nothing is. Raises UserError for other trunks,
    for names unknown to timm and for sizes the trunk cannot take.
    """

    def __init__(self, settings: schema.ImageTower, pretrained: bool | None = None):
        super().__init__()
        self.name = settings.name
        pretrained = settings.pretrained if pretrained is None else pretrained
        dropped = {"drop_path_rate": settings.drop_path} if settings.drop_path else {}
        trunk = _create(settings.name, pretrained, **dropped)
        self.fixed_size = hasattr(trunk, "set_input_size")
        self.own_size = settings.size == trunk.pretrained_cfg["input_size"][-1]
        self.arguments = {"img_size": settings.size} if self.fixed_size and not self.own_size else {}
        if self.arguments:
            trunk = _create(settings.name, pretrained, **self.arguments, **dropped)
        self.pooling = getattr(trunk, "global_pool", None) if isinstance(getattr(trunk, "global_pool", None), str) else "avg"
        trunk.reset_classifier(0)
        self.trunk = trunk
        self.num_features, self.pooling_parameters = self._try_pooling(settings.size)
        attention_pooled = isinstance(getattr(trunk, "head", None), AttentionPool2d | RotAttentionPool2d)
        self.ends_in_projection = attention_pooled or self.num_features != trunk.num_features
        self.num_prefix_tokens = getattr(trunk, "num_prefix_tokens", 0)
        if isinstance(trunk, VisionTransformer) and not isinstance(trunk.norm_pre, nn.Identity) and not pretrained:
            for embedding in (trunk.cls_token, trunk.pos_embed):  # CLIP's init (methods 1.1)
                nn.init.normal_(embedding, std=trunk.embed_dim**-0.5)
        self.draws = key_by_row(trunk, settings.name)
        if settings.drop_path and not self.draws:
            raise UserError(_no_stochastic_depth(settings.name, settings.drop_path))
        if settings.grad_checkpointing and self.draws:
            raise UserError(f"model.image.grad_checkpointing: {settings.name} drops by chance, and recomputed blocks would not know which rows they see; set it to false and use optim.microbatch")
        if settings.grad_checkpointing:
            trunk.set_grad_checkpointing(True)

    def _try_pooling(self, size: int) -> tuple[int, frozenset[str]]:
        """The width of what is pooled, and which parameters that has a gradient for."""
        training, parameters = self.trunk.training, dict(self.trunk.named_parameters())
        try:
            with torch.no_grad():
                features = self.trunk.eval().forward_features(torch.zeros(1, 3, size, size))
            with torch.enable_grad():
                pooled = self.trunk.forward_head(features)
            slopes = torch.autograd.grad(pooled.sum(), list(parameters.values()), allow_unused=True) if pooled.requires_grad else ()
            return pooled.shape[1], frozenset(name for name, slope in zip(parameters, slopes, strict=False) if slope is not None)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"model.image.size {size} does not suit model.image.name {self.name} ({_one_line(error)}); use its own {self.trunk.pretrained_cfg['input_size'][-1]} or another tower") from error
        finally:
            self.trunk.train(training)

    def forward(
        self,
        images: torch.Tensor,
        extra_tokens: torch.Tensor | None = None,
        extra_mask: torch.Tensor | None = None,
        want_layers: bool = False,
        row_keys: torch.Tensor | None = None,
    ) -> TowerOutput:
        if self.draws:
            self.draws.keys_B = row_keys
        if isinstance(self.trunk, VisionTransformer) and (extra_tokens is not None or want_layers):
            return self._transformer(images, extra_tokens, extra_mask, want_layers)
        if extra_tokens is not None:
            raise UserError(f"model.image.name {self.name} takes no extra tokens; choose a vision transformer such as vit_base_patch32_clip_224")
        if not self.fixed_size:
            images = images.contiguous(memory_format=torch.channels_last)  # convolutions run up to twice as fast on CPUs
        layers = None
        if want_layers:
            features, maps = self.trunk.forward_intermediates(images)
            layers = tuple(_as_tokens(each, "NCHW") for each in maps)
        else:
            features = self.trunk.forward_features(images)
        tokens = _as_tokens(features, getattr(self.trunk, "output_fmt", "NCHW"))
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return TowerOutput(self.trunk.forward_head(features), tokens, mask, layers)

    def _transformer(self, images, extra_tokens, extra_mask, want_layers) -> TowerOutput:
        trunk = self.trunk
        states = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))
        num_own = states.shape[1]
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        attention_mask = None
        if extra_tokens is not None:
            states = torch.cat((states, extra_tokens.to(states.dtype)), dim=1)
            extra_mask = torch.ones(extra_tokens.shape[:2], dtype=torch.bool, device=states.device) if extra_mask is None else extra_mask
            mask = torch.cat((mask, extra_mask), dim=1)
            attention_mask = torch.zeros(mask.shape, dtype=states.dtype, device=states.device).masked_fill(~mask, -torch.inf)[:, None, None]
        layers = []
        for block in trunk.blocks:
            if trunk.grad_checkpointing and torch.is_grad_enabled():
                states = checkpoint(block, states, attn_mask=attention_mask, use_reentrant=False)
            else:
                states = block(states, attn_mask=attention_mask)
            layers.append(states)
        states = trunk.norm(states)
        return TowerOutput(trunk.forward_head(states[:, :num_own]), states, mask, tuple(layers) if want_layers else None)


def _create(name: str, pretrained: bool, **options) -> nn.Module:
    if not timm.is_model(name):
        raise UserError(f"model.image.name {name!r} is not a timm model; timm.list_models() lists them, for instance resnet50_clip or vit_base_patch32_clip_224")
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        if "drop_path_rate" in options and isinstance(error, TypeError) and "drop_path_rate" in str(error):
            raise UserError(_no_stochastic_depth(name, options["drop_path_rate"])) from error
        fix = "set model.image.pretrained false or make the hub reachable" if pretrained else "choose another name or model.image.size"
        raise UserError(f"model.image: timm could not build {name} ({_one_line(error)}); {fix}") from error


def _no_stochastic_depth(name: str, drop_path: float) -> str:
    return f"model.image.drop_path {drop_path} has no effect: {name} has no stochastic depth; remove it"


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _as_tokens(features: torch.Tensor, layout: str) -> torch.Tensor:
    if features.dim() == 3:
        return features
    return features.flatten(1, 2) if layout == "NHWC" else features.flatten(2).transpose(1, 2)
