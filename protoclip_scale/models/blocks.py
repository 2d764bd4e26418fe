"""The repeated blocks of a model: what activation checkpointing, sharding and compilation take one at a time."""

from collections.abc import Iterator

from torch import nn


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost repeated blocks, in order: composite elements of lists and sequences that hold no such elements themselves.

    A vision transformer's blocks, a ResNet's bottlenecks, the layers of a text encoder; none where a model keeps its blocks in no list (RegNets).
    """
    for child in module.children():
        inner = list(blocks(child))
        if inner:
            yield from inner
        elif isinstance(module, nn.ModuleList | nn.Sequential) and _is_composite(child):
            yield child


def _is_composite(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())
