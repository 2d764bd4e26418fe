"""What one row costs in a recipe's model: FLOPs of a forward pass and bytes that autograd keeps, counted on torch's meta device, where nothing is computed or held."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from protoclip_scale.data.masking import IGNORED, SELECTED_SHARE
from protoclip_scale.engine.freezing import features_wanted, trained_parameters
from protoclip_scale.engine.optimizer import text_parts
from protoclip_scale.models.blocks import blocks
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.features import parse
from protoclip_scale.models.passes import SIDES, closure, side_of
from protoclip_scale.objectives import Objective, features_of, heads_of, used
from protoclip_scale.objectives.base import locked_from
from protoclip_scale.recipe import Recipe

PROBE_ROWS = 2


class Flops(NamedTuple):
    """Of a forward pass over one row (a multiply-add is 2), as a polynomial in the tokens of its caption: attention is quadratic in them."""

    constant: float
    per_token: float = 0.0
    per_pair: float = 0.0

    def at(self, tokens: float, squared: float | None = None) -> float:
        """For a caption of ``tokens``; on average over captions with a mean of ``tokens`` and a mean square of ``squared``."""
        return self.constant + self.per_token * tokens + self.per_pair * (tokens**2 if squared is None else squared)


class Activations(NamedTuple):
    """fp32 bytes that one row keeps for the backward pass: ``whole``, all of them; ``checkpointed``, where every block is recomputed: what enters blocks, and
    once the largest block's."""

    whole: int
    checkpointed: int


@dataclass(frozen=True)
class ModelCost:
    """By part of the dual encoder. Captions are as long as they can be unless told otherwise.

    ``trained``: parameters that train in some episode; ``by_sgd``: those of them that SGD steps on. ``blocks``: parameters of each repeated block. ``flops``: of one pass. ``towers``: activations of a pass by side, those of heads inside
    micro-batches with them; ``heads``: bytes that one row keeps, of each part, in projections and heads, which see all rows of a view at once. ``products``: weights that autocast copies in half precision.
    ``sizes``: numbers that a row has of each kind of feature; ``in_parts``: those kinds that heads inside micro-batches give. ``users``: see ``DualEncoder.users``. ``wants``: all features of all objectives.
    """

    parameters: dict[str, int]
    trained: int
    by_sgd: int
    blocks: tuple[int, ...]
    products: int
    flops: dict[str, Flops]
    longest: int
    towers: dict[str, Activations]
    heads: dict[str, int]
    sizes: dict[str, int]
    in_parts: frozenset[str]
    users: dict[str, frozenset[str]]
    wants: frozenset[str]

    def passes(self, part: str, wants: frozenset[str]) -> int:
        """How often a part runs over a batch: once for each view that a feature is wanted of."""
        return len({feature.view for feature in map(parse, wants) if feature.kind in self.users[part]})

    def flops_of(self, wants: frozenset[str]) -> int:
        """Of a forward pass over one row of all the views that these features need, with the longest captions."""
        return round(sum(self.passes(part, wants) * flops.at(self.longest) for part, flops in self.flops.items()))

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def forward_flops(self) -> int:
        """Of a row with the longest captions, in all the views that a step may need."""
        return self.flops_of(self.wants)


class _Counted(NamedTuple):
    flops: int
    whole: int
    checkpointed: int
    output: Any


class _Saved:
    """Bytes of each storage that autograd keeps, weights left out. Tensors are held, so no number is used twice."""

    def __init__(self, weights: set[int]):
        self._weights, self._held, self._sizes = weights, [], {}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._held.append(tensor)
            self._sizes[storage._cdata] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())


class _Attention(torch.autograd.Function):
    """What fused attention computes and keeps: queries, keys, values and output, never the matrix."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = (query @ key.transpose(-2, -1)) @ value
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("only forward passes are counted")


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value = args[:3]
        if kwargs.get("enable_gqa"):
            key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
        return _Attention.apply(query, key, value)


def measure(recipe: Recipe, objectives: dict[str, Objective]) -> ModelCost:
    """Counts forward passes of two rows in training mode; a second or less, without the model's memory. Raises UserError for a model that cannot be built."""
    plain = {side: getattr(recipe.model, side).model_copy(update={"grad_checkpointing": False}) for side in ("image", "text")}
    with torch.device("meta"):
        model = DualEncoder(recipe.model.model_copy(update=plain), features_of(objectives), pretrained=False, heads=heads_of(objectives))
        trained = trained_in_some_episode(model, recipe, objectives)
        model.train()
        model.train_only(trained)
        size, longest = recipe.model.image.size, recipe.model.text.context_length
        encoder = model.text_tower.encoder
        lengths = sorted({longest, (longest + 1) // 2, 1})
        of_length = {tokens: _counted(model, encoder, lambda tokens=tokens: encoder(input_ids=torch.ones(PROBE_ROWS, tokens, dtype=torch.int64))) for tokens in lengths}
        image = _counted(model, model.image_tower, lambda: model.image_tower(torch.zeros(PROBE_ROWS, 3, size, size)))
        projections = {f"{side}_projection": getattr(model, f"{side}_projection") for side in SIDES}
        found = {name: _counted(model, layer, lambda layer=layer: layer(torch.zeros(PROBE_ROWS, layer.in_features))) for name, layer in projections.items()}
        heads = {tokens: _count_heads(model, image.output.tokens, tokens) for tokens in lengths}
    parameters: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parameters[name.split(".")[0]] = parameters.get(name.split(".")[0], 0) + parameter.numel()
    flops = {"image_tower": Flops(image.flops), "text_tower": _through({tokens: each.flops for tokens, each in of_length.items()})}
    flops |= {name: Flops(each.flops) for name, each in found.items()}
    of_side, kept, in_parts = {"image": image, "text": of_length[longest]}, {name: each.whole for name, each in found.items()}, dict.fromkeys(SIDES, 0)
    for kind, counted in heads[longest].items():
        part = model.heads[kind].part(kind)
        if model.heads[kind].in_parts:
            in_parts[side_of(kind, model.heads)] += counted.whole
        else:
            kept[part] = counted.whole
        flops[part] = _through({tokens: each[kind].flops for tokens, each in heads.items()})
    return ModelCost(
        parameters=parameters,
        trained=sum(model.get_parameter(name).numel() for name in trained),
        by_sgd=sum(model.get_parameter(name).numel() for name in trained if recipe.optim.sgd and name.split(".")[0] in text_parts(model)),
        blocks=tuple(sum(parameter.numel() for parameter in block.parameters()) for block in blocks(model)),
        products=sum(each.weight.numel() for tower in (model.image_tower, encoder) for each in tower.modules() if isinstance(each, nn.Linear | nn.Conv2d)),
        flops=flops,
        longest=longest,
        towers={side: Activations(each.whole + in_parts[side], each.checkpointed + in_parts[side]) for side, each in of_side.items()},
        heads=kept,
        sizes=dict.fromkeys(SIDES, model.embed_dim) | {kind: counted.output.numel() // PROBE_ROWS for kind, counted in heads[longest].items()},
        in_parts=frozenset(kind for kind in heads[longest] if model.heads[kind].in_parts),
        users=model.users,
        wants=features_wanted(used(objectives)),
    )


def _count_heads(model: DualEncoder, image_tokens: torch.Tensor, tokens: int) -> dict[str, "_Counted"]:
    """Every head that reads something, by kind, for captions of so many tokens, of which masking selects its share."""
    widths = model.widths
    labels = torch.full((PROBE_ROWS, tokens), IGNORED, device="cpu")
    labels[:, : round(SELECTED_SHARE * tokens)] = 0
    values = {name: (torch.zeros(PROBE_ROWS, getattr(widths, name)),) for name in ("image_pooled", "text_pooled", "image_projected", "text_projected")}
    values |= {"image_tokens": (torch.zeros(image_tokens.shape),), "labels": (labels,)}
    values["text_tokens"] = torch.zeros(PROBE_ROWS, tokens, widths.text_tokens), torch.ones(PROBE_ROWS, tokens, dtype=torch.bool)
    found = {}
    for kind in closure(model.heads, model.heads):
        head = model.heads[kind]
        if head.reads:
            module, inputs = getattr(model, head.part(kind)), [each for read in head.reads for each in values[read]]
            found[kind] = _counted(model, module, lambda module=module, inputs=inputs: module(*inputs))
            values[kind] = (torch.zeros(found[kind].output.shape),)
    return found


def trained_in_some_episode(model: DualEncoder, recipe: Recipe, objectives: dict[str, Objective]) -> frozenset[str]:
    """Names of the parameters that train in the first episode, after the warm-up, or in the locked ending."""
    episodes = {0, recipe.episodes.warmup, locked_from(recipe) or 0}
    return frozenset().union(*(trained_parameters(model, recipe, objectives, episode) for episode in episodes))


def _counted(model: nn.Module, module: nn.Module, run: Callable[[], Any]) -> _Counted:
    """Of one row of ``run``, which calls ``module``."""
    saved = _Saved({tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())})
    before: dict[nn.Module, int] = {}
    inside: list[int] = []
    entering: list[int] = []

    def enter(block: nn.Module, inputs: tuple) -> None:
        before[block] = saved.bytes

    def leave(block: nn.Module, inputs: tuple, output: Any) -> None:
        inside.append(saved.bytes - before[block])
        entering.append(sum(each.nbytes for each in inputs if isinstance(each, torch.Tensor)) if inside[-1] else 0)

    hooks = [hook for block in blocks(module) for hook in (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))]
    with FlopCounterMode(display=False) as counter, _FusedAttention(), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
        output = run()
    for hook in hooks:
        hook.remove()
    checkpointed = saved.bytes - sum(inside) + sum(entering) + max(inside, default=0)
    return _Counted(*(number // PROBE_ROWS for number in (counter.get_total_flops(), saved.bytes, checkpointed)), output)


def _through(points: dict[int, int]) -> Flops:
    """The polynomial through up to three points."""
    tokens = np.array(list(points), dtype=np.float64)
    return Flops(*map(float, np.linalg.solve(np.vander(tokens, increasing=True), np.array(list(points.values()), dtype=np.float64))))
