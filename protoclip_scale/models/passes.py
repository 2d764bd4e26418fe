"""Which heads a view's pass through a tower feeds, and where each of them runs: inside micro-batches, or on all rows at once."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from protoclip_scale.models.features import Feature, parse
from protoclip_scale.models.heads import Head

SIDES = ("image", "text")
BEFORE_THE_EMBEDDING = frozenset({"image_pooled", "image_projected"})  # what any model gives of images, beside their embeddings, to who evaluates it
Heads = Mapping[str, Head]


def closure(kinds: Iterable[str], heads: Heads) -> list[str]:
    """The heads among the kinds and those that they read, each behind what it reads; the same order for the same kinds."""
    found: list[str] = []

    def visit(kind: str) -> None:
        if kind in heads and kind not in found:
            for read in heads[kind].reads:
                visit(read)
            found.append(kind)

    for kind in sorted(kinds):
        visit(kind)
    return found


def sources(kind: str, heads: Heads) -> frozenset[str]:
    """What a kind is computed from in the end: names of tower outputs, empty for a temperature."""
    if kind in SIDES:
        return frozenset({f"{kind}_projected"})
    if kind in BEFORE_THE_EMBEDDING:
        return frozenset({kind})
    return frozenset(read for each in closure([kind], heads) for read in heads[each].reads if read not in heads)


def side_of(kind: str, heads: Heads) -> str | None:
    """image or text; None for a temperature, which no tower is run for."""
    if kind == "logit_scale":
        return None
    found = {name.split("_")[0] if name != "labels" else "text" for name in sources(kind, heads)}
    assert len(found) <= 1, f"{kind} reads outputs of both towers"
    return found.pop() if found else None


def users_of(kinds: Iterable[str], heads: Heads) -> dict[str, frozenset[str]]:
    """By part of the dual encoder: the kinds that are computed with it."""
    users: dict[str, set[str]] = {f"{side}_{part}": set() for side in SIDES for part in ("tower", "projection")} | {"logit_scale": {"logit_scale"}}
    users |= {head.part(kind): set() for kind, head in heads.items()}
    for kind in set(kinds) - {"logit_scale"}:
        side = side_of(kind, heads)
        if side:
            users[f"{side}_tower"].add(kind)
        if f"{side}_projected" in sources(kind, heads):
            users[f"{side}_projection"].add(kind)
        for read in closure([kind], heads):
            users[heads[read].part(read)].add(kind)
    return {part: frozenset(each) for part, each in users.items()}


def views_needed(names: Iterable[str], heads: Heads) -> frozenset[str]:
    """``image``, ``text@VIEW``: the views that a tower is run over for these features."""
    placed = ((side_of(kind, heads), view) for kind, view in map(parse, names))
    return frozenset(Feature(side, view).name for side, view in placed if side)


class Pass(NamedTuple):
    """``in_parts``, ``whole``: kinds of heads in the order they run; ``kept``: names of what leaves the micro-batches; ``projects``: whether the projection is needed."""

    side: str
    in_parts: tuple[str, ...]
    whole: tuple[str, ...]
    kept: tuple[str, ...]
    projects: bool


def plan_pass(side: str, kinds: Iterable[str], heads: Heads) -> Pass:
    """Of one view, of which ``kinds`` are wanted."""
    order = closure(kinds, heads)
    in_parts, whole = (tuple(kind for kind in order if heads[kind].in_parts is parts) for parts in (True, False))
    wanted = {*kinds, *(read for kind in whole for read in heads[kind].reads)} | ({f"{side}_projected"} if side in kinds else set())
    kept = tuple(name for name in (f"{side}_pooled", f"{side}_projected", *in_parts) if name in wanted)
    projected = f"{side}_projected"
    return Pass(side, in_parts, whole, kept, projected in wanted or any(projected in heads[kind].reads for kind in in_parts))


def in_full_precision(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """The module's output in fp32 at least, computed in its weights' precision whatever autocast is on."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        dtype = next(module.parameters()).dtype
        return at_least_fp32(module(*(each.to(dtype) if each.is_floating_point() else each for each in inputs)))


def at_least_fp32(output: torch.Tensor) -> torch.Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))
