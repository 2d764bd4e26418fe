"""How fast training is, for the log: samples per second, and MFU, the share of the devices' peak that the model's own arithmetic is (PaLM, appendix B).

Model FLOPs of a sample are those of towers, projections and heads: a forward pass, and twice as much backward in parts that train, whatever is recomputed (activation checkpointing, micro-batches).
A caption counts with the tokens it has, not with the padding around it. Losses, clustering and the optimiser are left out.
"""

from collections.abc import Callable, Iterable

import torch

from protoclip_scale import collectives
from protoclip_scale.engine.cost import TRAINING_FACTOR
from protoclip_scale.engine.model_cost import Flops, ModelCost, measure
from protoclip_scale.engine.peaks import peak_flops
from protoclip_scale.objectives import Objective
from protoclip_scale.recipe import Recipe


def training_flops(cost: ModelCost, wants: frozenset[str], trained: Iterable[str]) -> Flops:
    """Of one sample of a step that computes ``wants`` and trains the parameters ``trained``. Other texts of a row count as its caption does."""
    parts = {name.split(".")[0] for name in trained}
    used = [(cost.passes(part, wants) * (TRAINING_FACTOR if part in parts else 1), each) for part, each in cost.flops.items()]
    return Flops(*(sum(factor * each[power] for factor, each in used) for power in range(len(Flops._fields))))


class Throughput:
    """Of windows of steps: ``add`` each batch, then ask for the ``figures``. Captions are those of rank 0's rows; all ranks draw theirs alike.

    Where the device's peak is known, the model's FLOPs are counted once, on rank 0.
    """

    def __init__(self, recipe: Recipe, objectives: dict[str, Objective], device: torch.device):
        self._rows = recipe.data.plan.global_batch
        self._peak = peak_flops(device, recipe.optim.precision, recipe.run.peak_tflops)
        self._count: Callable[[], ModelCost] = lambda: measure(recipe, objectives)
        self._cost: ModelCost | None = None
        self._sample: Flops | None = None
        self.paused = 0.0  # seconds of the window in which training waited for an evaluation
        self._forget()

    def _forget(self) -> None:
        self._steps, self._captions, self._tokens, self._squares, self.paused = 0, 0, 0, 0, 0.0

    def begin(self, wants: frozenset[str], trained: Iterable[str]) -> None:
        """An episode, in which every step computes and trains these."""
        self._forget()
        if self._peak is None or collectives.rank():
            return
        self._cost = self._cost or self._count()
        self._sample = training_flops(self._cost, wants, trained)

    def add(self, token_lengths: torch.Tensor) -> None:
        """A step with this rank's captions, whose lengths lie on the CPU."""
        self._steps += 1
        self._captions += len(token_lengths)
        self._tokens += int(token_lengths.sum())
        self._squares += int(token_lengths.square().sum())

    def figures(self, seconds: float) -> dict[str, float]:
        """Of the steps since the last call, which took so long. ``mfu`` only where the peak is known."""
        rate = self._steps * self._rows / seconds
        found = {"samples_per_second": rate, "samples_per_second_per_rank": rate / collectives.world_size()}
        if self._sample:
            flops = self._sample.at(self._tokens / self._captions, self._squares / self._captions)
            found["mfu"] = flops * found["samples_per_second_per_rank"] / self._peak
        self._forget()
        return found
