"""Batch norm folded into the convolution or linear layer before it, for passes that only evaluate: the same function with less work.

In evaluation mode batch norm is one multiplication and one addition per channel, and so can be part of the layer that makes its input.
"""

import copy
import itertools
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.overrides import TorchFunctionMode

from protoclip_scale.models.batch_norm import GroupBatchNorm


class Pair(NamedTuple):
    """Names of a layer and of the batch norm that alone reads its output."""

    layer: str
    norm: str


class _Watch(TorchFunctionMode):
    """Notes which layer makes a tensor, which functions read it, and how often layers and norms run."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.layers = {id(child.weight): name for name, child in module.named_modules() if isinstance(child, nn.Conv2d | nn.Linear)}
        self.norms = {id(child.running_mean): name for name, child in module.named_modules() if isinstance(child, GroupBatchNorm)}
        self.runs: Counter[str] = Counter()
        self.reads: Counter[int] = Counter()
        self.makers: dict[int, tuple[str, torch.Tensor]] = {}  # holds the tensors, so that their numbers stay theirs
        self.found: list[tuple[int, Pair]] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") != "__get__":  # looking at a shape is no use of the values
            self.reads.update(id(each) for each in _flat((*args, *kwargs.values())))
        output = function(*args, **kwargs)
        if function in (torch.conv2d, F.linear) and (name := self.layers.get(id(args[1]))):
            self.runs[name] += 1
            if function is torch.conv2d or output.dim() == 2:  # the channels of both are dimension 1
                self.makers[id(output)] = name, output
                self.reads[id(output)] = 0  # what had this number before is gone
        elif function is F.batch_norm and (name := self.norms.get(id(args[1]))):
            self.runs[name] += 1
            if maker := self.makers.get(id(args[0])):
                self.found.append((id(args[0]), Pair(maker[0], name)))
        return output

    def pairs(self) -> list[Pair]:
        return [pair for number, pair in self.found if self.reads[number] == 1 and self.runs[pair.layer] == self.runs[pair.norm] == 1]


def _flat(values: Any) -> list[Any]:
    return list(itertools.chain.from_iterable(_flat(value) if isinstance(value, list | tuple) else [value] for value in values))


@torch.no_grad()
def foldable(module: nn.Module, *example: Any, **options: Any) -> list[Pair]:
    """The pairs that can be folded, found by watching one forward pass of a module in evaluation mode on a small example.

    A batch norm is folded if its input comes straight from a convolution or linear layer, nothing else reads that, and both run once. Layers that
    compute their weight anew (standardised weights) are none of these.
    """
    assert not module.training, "batch norm can be folded in evaluation mode only"
    with _Watch(module) as watch:
        module(*example, **options)
    return watch.pairs()


@torch.no_grad()
def folded(module: nn.Module, pairs: list[Pair]) -> nn.Module:
    """A copy of a module in evaluation mode, with the pairs folded as the weights are now; all other weights are shared with it.

    Equal to the module up to rounding. Costs a copy of the folded layers' weights; the module is not changed.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    copied = copy.deepcopy(module, shared)
    for pair in pairs:
        layer, norm = copied.get_submodule(pair.layer), copied.get_submodule(pair.norm)
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        copied.set_submodule(pair.layer, fuse(layer, norm))
        copied.set_submodule(pair.norm, nn.Sequential(norm.drop, norm.act))
    return copied
