"""Bytes that a rank holds of weights, gradients and optimiser under each strategy, and the strategies in the order of what they communicate. Arithmetic alone: neither DeepSpeed nor a GPU is needed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

FLOAT_BYTES = 4
MOMENTS = 2
# Of gradients that ZeRO reduces at once, and of weights that ZeRO-3 keeps because they are needed again soon: 200 MB; DeepSpeed's own 500,000,000 and 1,000,000,000 are more than most towers have.
BUCKET_ELEMENTS = 50_000_000


class Sizes(NamedTuple):
    """Numbers of parameters: all, those that train, the largest repeated block's, those in no block; whether averaged weights are kept; and of those that train, those that SGD
    steps on, which remembers one number for each where AdamW and LAMB remember two."""

    parameters: int
    trained: int
    largest_block: int
    outside_blocks: int
    averaged: bool
    by_sgd: int = 0


class StateMemory(NamedTuple):
    """Bytes of one rank. ``optimizer``: its moments and, under ZeRO, the weights it steps on. ``buckets``: what is reduced or gathered at once. ``host``: in CPU memory besides."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    buckets: int
    host: int = 0

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.buckets


def _floats(weights: float, gradients: float, optimizer: float, average: float, buckets: float, host: float = 0) -> StateMemory:
    return StateMemory(*(round(FLOAT_BYTES * number) for number in (weights, gradients, optimizer, average, buckets, host)))


def _average(sizes: Sizes, world: int) -> float:
    return sizes.parameters / world if sizes.averaged else 0


def replicated(sizes: Sizes, world: int) -> StateMemory:
    """DDP's buckets are the memory of the gradients themselves (``gradient_as_bucket_view``)."""
    return _floats(sizes.parameters, sizes.trained, MOMENTS * sizes.trained - sizes.by_sgd, _average(sizes, world), buckets=0)


def zero1(sizes: Sizes, world: int) -> StateMemory:
    """Gradients are whole until the step, which makes a flat copy of the rank's own."""
    own = sizes.trained / world
    return _floats(sizes.parameters, sizes.trained + own, (1 + MOMENTS) * own, _average(sizes, world), min(sizes.trained, BUCKET_ELEMENTS))


def zero2(sizes: Sizes, world: int) -> StateMemory:
    own = sizes.trained / world
    return _floats(sizes.parameters, own, (1 + MOMENTS) * own, _average(sizes, world), min(sizes.trained, BUCKET_ELEMENTS))


def _gathered_by_zero3(sizes: Sizes, world: int) -> float:
    """Weights that are whole at one time, at most: a module's, those fetched ahead, and those kept because they are needed again soon; and a bucket of gradients, once
    more in the order of the ranks, with this rank's part of the sum."""
    return min(sizes.parameters, 2 * BUCKET_ELEMENTS + sizes.largest_block) + (2 + 1 / world) * min(sizes.trained, BUCKET_ELEMENTS)


def zero3(sizes: Sizes, world: int) -> StateMemory:
    own = sizes.trained / world
    return _floats(sizes.parameters / world, own, (1 + MOMENTS) * own, _average(sizes, world), _gathered_by_zero3(sizes, world))


def zero3_offload(sizes: Sizes, world: int) -> StateMemory:
    on_host = (sizes.parameters + (2 + MOMENTS) * sizes.trained) / world + _average(sizes, world)
    return _floats(0, 0, 0, 0, _gathered_by_zero3(sizes, world), on_host)


def fsdp2(sizes: Sizes, world: int) -> StateMemory:
    """What is in no block is gathered as one and stays until it is needed no more; of the blocks two, the second fetched ahead; gradients of either before they are reduced."""
    own = sizes.trained / world
    gathered = sizes.outside_blocks + 2 * sizes.largest_block + max(sizes.outside_blocks, sizes.largest_block)
    return _floats(sizes.parameters / world, own, MOMENTS * own, _average(sizes, world), gathered)


@dataclass(frozen=True)
class Layout:
    """A strategy as a user chooses it. ``files``: of launch/accelerate/, by device. ``traffic``: what it communicates in a step. ``compiles``: whether it takes
    ``optim.compile_blocks``. ``steps_whole``: whether it takes other optimisers than AdamW. ``alone``: whether it is for one rank, for several (false), or for both (None)."""

    title: str
    memory: Callable[[Sizes, int], StateMemory]
    files: dict[str, str]
    traffic: str
    compiles: bool = True
    alone: bool | None = False
    steps_whole: bool = False

    def makes_sense(self, world: int, device: str, optimizer: str) -> bool:
        return device in self.files and self.alone in (None, world == 1) and (self.steps_whole or optimizer == "adamw")


LAYOUTS = (  # least communication first
    Layout("single process", replicated, {"cuda": "single.yaml", "cpu": "single.yaml"}, "communicates nothing", alone=True, steps_whole=True),
    Layout("DDP", replicated, {"cuda": "ddp.yaml", "cpu": "cpu.yaml"}, "sums up gradients while the backward pass runs", steps_whole=True),
    Layout("ZeRO-1", zero1, {"cuda": "zero1.yaml", "cpu": "cpu_zero1.yaml"}, "sums up gradients, then gathers the new weights"),
    Layout("ZeRO-2", zero2, {"cuda": "zero2.yaml", "cpu": "cpu_zero2.yaml"}, "sums up gradients in parts, then gathers the new weights"),
    Layout("ZeRO-3", zero3, {"cuda": "zero3.yaml", "cpu": "cpu_zero3.yaml"}, "gathers weights module by module, in both passes", compiles=False),
    Layout("FSDP2", fsdp2, {"cuda": "fsdp2.yaml"}, "gathers weights block by block, in both passes"),
    Layout("ZeRO-3 + CPU offload", zero3_offload, {"cuda": "zero3_offload.yaml"}, "moves weights and gradients between GPU and CPU, where AdamW steps", compiles=False, alone=None),
)
