"""Both towers, their projections, temperatures and heads: everything that is trained."""

import contextlib
import copy
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import nn

from protoclip_scale.data.transforms import normalize
from protoclip_scale.models.batch_norm import convert_batch_norm
from protoclip_scale.models.features import Feature, kinds_of, parse
from protoclip_scale.models.heads import PROTOTYPE_HEADS, Head, Widths
from protoclip_scale.models.image import ImageTower
from protoclip_scale.models.microbatches import in_microbatches
from protoclip_scale.models.outputs import TowerOutput
from protoclip_scale.models.passes import (
    BEFORE_THE_EMBEDDING,
    SIDES,
    Pass,
    at_least_fp32,
    closure,
    in_full_precision,
    plan_pass,
    side_of,
    sources,
    users_of,
)
from protoclip_scale.models.row_dropout import of_view
from protoclip_scale.models.scale import LogitScale
from protoclip_scale.models.text import TextTower
from protoclip_scale.recipe import schema

NORMALIZATION = {"clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD), "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)}
FEATURES = frozenset({"image", "text", "logit_scale", *PROTOTYPE_HEADS})  # those that need no objective's heads


class ParameterGroup(NamedTuple):
    """Which learning rate (``visual`` or ``other``) a parameter follows, whether it decays, and the part it belongs to if that may enter training later than
    the towers do."""

    side: str
    decay: bool
    later: str


class DualEncoder(nn.Module):
    """The model of a recipe with the parts that ``features`` need: those of ``FEATURES`` and the kinds of ``heads``, of any views.

    ``forward`` computes the wanted features in fp32 (fp64 for fp64 weights), whatever autocast runs the towers in:
    ``image``, ``text`` unit rows [B, embed_dim]; ``image_prototype``, ``text_prototype`` unit rows [B, P], from the un-normalised
    projected outputs; ``logit_scale``, ``prototype_scale`` (1,); the un-normalised ``image_projected`` and the tower's own ``image_pooled``; of other kinds what their heads give. Projections are linear
    without bias, so that every layout of an export holds them. Batch norm is ``GroupBatchNorm`` with ``norm_groups``.

    ``users``: by part, the kinds that are computed with it. ``compiled``: whether blocks have been compiled in place. ``compute_dtype``, if it is set, is what autocast runs the
    towers in. Everything that reads weights goes through ``forward``: where ranks hold parts of them, they are put together by its hooks.
    """

    def __init__(self, model: schema.Model, features: frozenset[str], pretrained: bool | None = None, heads: Mapping[str, Head] | None = None):
        super().__init__()
        known, kinds = PROTOTYPE_HEADS | dict(heads or {}), kinds_of(features)
        assert kinds <= FEATURES | known.keys(), f"unknown features {set(kinds - FEATURES - known.keys())}"
        self.features = frozenset(features)
        self.embed_dim = model.embed_dim
        image_tower = ImageTower(model.image, pretrained)
        self.image_tower = convert_batch_norm(image_tower, model.norm_groups)
        self.text_tower = TextTower(model.text, pretrained)
        self.image_projection = _projection(image_tower.num_features, model.embed_dim)
        self.text_projection = _projection(self.text_tower.num_features, model.embed_dim)
        self.logit_scale = LogitScale(model.logit_scale)
        self.widths = Widths(
            image_pooled=image_tower.num_features,
            text_pooled=self.text_tower.num_features,
            image_projected=model.embed_dim,
            text_projected=model.embed_dim,
            image_tokens=image_tower.trunk.num_features,
            text_tokens=self.text_tower.num_features,
            image_prefix_tokens=image_tower.num_prefix_tokens,
            context_length=model.text.context_length,
            vocabulary=self.text_tower.encoder.config.vocab_size,
        )
        self.heads = self._add_heads(model, known, kinds)
        self.users = users_of(kinds | {"image", "text", "logit_scale"}, self.heads)
        self.normalization = NORMALIZATION[model.image.normalization]
        self.frozen_towers: frozenset[str] = frozenset()
        self.compute_dtype: torch.dtype | None = None
        self.compiled = False

    def _add_heads(self, model: schema.Model, known: dict[str, Head], kinds: Iterable[str]) -> dict[str, Head]:
        """The heads that the kinds need: after the towers, so that these start alike with and without heads, and each from draws of its own, so that it starts alike whatever others there are."""
        needed = closure(kinds, known)
        if {"image_prototype", "text_prototype"} & set(needed):
            needed = sorted({*needed, "image_prototype", "text_prototype"}, key=list(known).index)
        needed.sort(key=list(known).index)
        built = {}
        for kind in needed:
            head = known[kind]
            draws = contextlib.nullcontext() if kind in PROTOTYPE_HEADS else _own_draws(kind)  # prototypes' heads draw what they drew before there were others
            with draws:
                module = copy.deepcopy(built[head.twin]) if head.twin else head.build(self.widths, model)
            built[kind] = module
            self.add_module(head.part(kind), module)
        return {kind: known[kind] for kind in needed}

    def forward(
        self,
        images: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        token_lengths: torch.Tensor | None = None,
        *,
        wants: frozenset[str],
        records: frozenset[str] = frozenset(),
        microbatch: int | None = None,
        views: Mapping[str, tuple[torch.Tensor, ...]] | None = None,
        row_keys: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The ``wants`` features of images (uint8 [B, 3, S, S], or floats that are already normalised) and captions; those of ``records`` that
        are not wanted besides are computed without gradient, so that their heads need not train. Inputs that nothing asks for may be None.
        ``views``: the inputs of further views by ``image@VIEW``, (images,), and ``text@VIEW``, (ids, lengths) and labels if it is masked; each makes a pass of its own.
        Towers, with the heads that read their tokens, take at most ``microbatch`` rows at once (see ``in_microbatches``), other heads all rows of a view. Lengths and labels may lie on the CPU in any case.
        ``row_keys``, int64 [B]: by which an image tower that drops by chance does so in training; each view has keys of its own.
        """
        asked, known = kinds_of(wants | records), kinds_of(self.features) | {"image", "text"} | BEFORE_THE_EMBEDDING
        assert asked <= known, f"wanted {set(asked - known)} which the model was not built for"
        inputs = {"image": (images,), "text": (token_ids, token_lengths)} | dict(views or {})
        if row_keys is not None and self.image_tower.draws:
            inputs |= {name: (*each, of_view(row_keys, name)) for name, each in inputs.items() if parse(name).kind == "image"}
        with self._autocast((token_ids if images is None else images).device):
            return self._features(inputs, wants, wants | records, microbatch)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        # a cache of weights would keep gathered ones alive
        return torch.autocast(device.type, self.compute_dtype, cache_enabled=False)

    def _features(self, inputs, wants, asked, microbatch) -> dict[str, torch.Tensor]:
        passes: dict[Feature, set[str]] = {}
        outputs = {}
        for kind, view in sorted(map(parse, asked)):
            side = side_of(kind, self.heads)
            if side:
                passes.setdefault(Feature(side, view), set()).add(kind)
            else:
                outputs[kind] = self.logit_scale() if kind == "logit_scale" else self._part(kind)()
        for place, kinds in sorted(passes.items()):  # images first, each side's main view first
            trained = {kind for kind in kinds if Feature(kind, place.view).name in wants}
            found = self._one_view(plan_pass(place.kind, kinds, self.heads), kinds, trained, inputs[place.name], microbatch)
            outputs |= {Feature(kind, place.view).name: value for kind, value in found.items()}
        return outputs

    def _one_view(self, plan: Pass, kinds: set[str], trained: set[str], inputs: tuple[torch.Tensor, ...], microbatch: int | None) -> dict[str, torch.Tensor]:
        values, with_gradient = self._of_tower(plan, inputs, microbatch), closure(trained, self.heads)
        for kind in plan.whole:
            with torch.set_grad_enabled(torch.is_grad_enabled() and kind in with_gradient):
                values[kind] = self._head(kind, values)
        return {kind: F.normalize(values[f"{kind}_projected"], dim=-1) if kind in SIDES else at_least_fp32(values[kind]) for kind in sorted(kinds)}

    def _of_tower(self, plan: Pass, inputs: tuple[torch.Tensor, ...], microbatch: int | None) -> dict[str, torch.Tensor]:
        """What leaves the micro-batches, by name; of a frozen tower nothing is kept for the backward pass but what it gives."""
        pool, inputs_of_pool = {"image": (self._pooled_image, 2), "text": (self.text_tower.pooled, 2)}[plan.side]

        def encode(*rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if not plan.in_parts:
                return self._kept(plan, {f"{plan.side}_pooled": pool(*rows)})
            if plan.side == "image":
                return self._take_image(plan, self._read_image(*rows))
            return self.text_tower.read(lambda output, *labels: self._take_text(plan, output, *labels), *rows)

        if not plan.in_parts:
            inputs = inputs[:inputs_of_pool]
        if plan.side not in self.frozen_towers or plan.in_parts:
            return dict(zip(plan.kept, in_microbatches(encode, microbatch, *inputs), strict=True))
        with torch.no_grad():
            pooled = in_microbatches(pool, microbatch, *inputs)
        return dict(zip(plan.kept, self._kept(plan, {f"{plan.side}_pooled": pooled}), strict=True))

    def _take_image(self, plan: Pass, output: TowerOutput) -> tuple[torch.Tensor, ...]:
        return self._kept(plan, {"image_pooled": output.pooled, "image_tokens": (output.tokens,)})

    def _take_text(self, plan: Pass, output: TowerOutput, *labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._kept(plan, {"text_pooled": output.pooled, "text_tokens": (output.tokens, output.mask), "labels": labels})

    def _kept(self, plan: Pass, values: dict) -> tuple[torch.Tensor, ...]:
        """Of some rows of a tower."""
        if plan.projects:
            values[f"{plan.side}_projected"] = in_full_precision(getattr(self, f"{plan.side}_projection"), values[f"{plan.side}_pooled"])
        for kind in plan.in_parts:
            values[kind] = self._head(kind, values)
        return tuple(values[name] for name in plan.kept)

    def _part(self, kind: str) -> nn.Module:
        return getattr(self, self.heads[kind].part(kind))

    def _head(self, kind: str, values: dict) -> torch.Tensor:
        """The output of a head for what it reads of ``values``."""
        head, module = self.heads[kind], self._part(kind)
        inputs = [each for read in head.reads for each in (values[read] if isinstance(values[read], tuple) else (values[read],))]
        output = in_full_precision(module, *inputs) if head.precise else at_least_fp32(module(*inputs))
        return F.normalize(output, dim=-1) if head.unit else output

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

    def _read_image(self, images: torch.Tensor, row_keys: torch.Tensor | None = None) -> TowerOutput:
        return self.image_tower(self.normalize_images(images), row_keys=row_keys)

    def _pooled_image(self, images: torch.Tensor, row_keys: torch.Tensor | None = None) -> torch.Tensor:
        return self._read_image(images, row_keys).pooled

    def train_only(self, names: frozenset[str]) -> None:
        """Ask for gradients of these parameters alone. A tower of which nothing trains is frozen: evaluation mode even after ``train()``, no gradient."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in names)
        self.frozen_towers = frozenset(side for side in SIDES if not any(name.startswith(f"{side}_tower.") for name in names))
        self.train(self.training)

    def train(self, mode: bool = True) -> "DualEncoder":
        super().train(mode)
        for side in self.frozen_towers:
            getattr(self, f"{side}_tower").eval()
        return self

    def parameter_groups(self) -> dict[str, ParameterGroup]:
        """Every parameter's optimiser group (methods 6.1): ``visual`` is the image tower with its projection; no decay for
        vectors (gains, biases, class tokens, logit scales) and for heads that say so. Each head may start later than the towers."""
        by_part = {head.part(kind): head for kind, head in self.heads.items()}
        groups = {}
        for name, parameter in self.named_parameters():
            part = name.split(".")[0]
            is_vector = sum(size > 1 for size in parameter.shape) < 2
            side = "visual" if part in ("image_tower", "image_projection") else "other"
            groups[name] = ParameterGroup(side, not is_vector and (part not in by_part or by_part[part].decays), part if part in by_part else "")
        return groups

    def head_parameters(self, feature_names: Iterable[str]) -> list[str]:
        """Names of the parameters that no other of the model's features is computed with."""
        others = kinds_of(self.features - frozenset(feature_names))
        parts = {part for part, users in self.users.items() if not users & others}
        pools = BEFORE_THE_EMBEDDING & frozenset().union(*(sources(kind, self.heads) for kind in others))
        pooling = frozenset() if pools else {f"image_tower.trunk.{name}" for name in self.image_tower.pooling_parameters}
        return [name for name, _ in self.named_parameters() if name.split(".")[0] in parts or name in pooling]


@contextlib.contextmanager
def _own_draws(kind: str) -> Iterator[None]:
    """Draws inside are a function of the global generator's seed and the kind; afterwards the generator is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() ^ zlib.crc32(kind.encode()))
        yield


def _projection(in_dim: int, out_dim: int) -> nn.Linear:
    linear = nn.Linear(in_dim, out_dim, bias=False)
    nn.init.normal_(linear.weight, std=in_dim**-0.5)
    return linear
