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

from protoclip_scale.engine.freezing import trained_parameters
from protoclip_scale.models.blocks import blocks
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives import Objective, features_of
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

    ``trained``: parameters that train in some episode. ``blocks``: parameters of each repeated block. ``towers``: activations by side; ``heads``: bytes that one row keeps in projections
    and heads, which see all rows at once. ``products``: weights that autocast copies in half precision.
    """

    parameters: dict[str, int]
    trained: int
    blocks: tuple[int, ...]
    products: int
    flops: dict[str, Flops]
    longest: int
    towers: dict[str, Activations]
    heads: int

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def forward_flops(self) -> int:
        """Of an image-text pair with the longest caption."""
        return round(sum(flops.at(self.longest) for flops in self.flops.values()))


class _Counted(NamedTuple):
    flops: int
    whole: int
    checkpointed: int


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
        model = DualEncoder(recipe.model.model_copy(update=plain), features_of(objectives), pretrained=False)
        trained = trained_in_some_episode(model, recipe, objectives)
        model.train()
        model.train_only(trained)
        size, longest = recipe.model.image.size, recipe.model.text.context_length
        encoder = model.text_tower.encoder
        of_length = {
            tokens: _counted(model, encoder, lambda tokens=tokens: encoder(input_ids=torch.ones(PROBE_ROWS, tokens, dtype=torch.int64)))
            for tokens in sorted({longest, (longest + 1) // 2, 1})
        }
        image = _counted(model, model.image_tower, lambda: model.image_tower(torch.zeros(PROBE_ROWS, 3, size, size)))
        widths = {"image_projection": model.image_tower.num_features, "text_projection": model.text_tower.num_features}
        widths |= dict.fromkeys(("image_prototype_head", "text_prototype_head"), model.embed_dim)
        heads = {name: _counted(model, head, lambda head=head, width=width: head(torch.zeros(PROBE_ROWS, width))) for name, width in widths.items() if (head := getattr(model, name, None))}
    parameters: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parameters[name.split(".")[0]] = parameters.get(name.split(".")[0], 0) + parameter.numel()
    flops = {"image_tower": Flops(image.flops), "text_tower": _through({tokens: each.flops for tokens, each in of_length.items()})}
    return ModelCost(
        parameters=parameters,
        trained=sum(model.get_parameter(name).numel() for name in trained),
        blocks=tuple(sum(parameter.numel() for parameter in block.parameters()) for block in blocks(model)),
        products=sum(each.weight.numel() for tower in (model.image_tower, encoder) for each in tower.modules() if isinstance(each, nn.Linear | nn.Conv2d)),
        flops=flops | {name: Flops(each.flops) for name, each in heads.items()},
        longest=longest,
        towers={"image": Activations(image.whole, image.checkpointed), "text": Activations(of_length[longest].whole, of_length[longest].checkpointed)},
        heads=sum(each.whole for each in heads.values()),
    )


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
    del output
    checkpointed = saved.bytes - sum(inside) + sum(entering) + max(inside, default=0)
    return _Counted(*(number // PROBE_ROWS for number in (counter.get_total_flops(), saved.bytes, checkpointed)))


def _through(points: dict[int, int]) -> Flops:
    """The polynomial through up to three points."""
    tokens = np.array(list(points), dtype=np.float64)
    return Flops(*map(float, np.linalg.solve(np.vander(tokens, increasing=True), np.array(list(points.values()), dtype=np.float64))))
