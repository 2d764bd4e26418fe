"""What every strategy does. The engine knows no more than this of how a model is spread over ranks.

One optimiser step::

    strategy.set_learning_rates(...)
    features = strategy(images, token_ids, token_lengths, wants=...)   # through the wrappers, so that their hooks run
    strategy.backward(loss)                                            # gradients are averaged over ranks
    update = strategy.update(stop)                                     # norm, decision of all ranks, clipping, step; gradients are gone

Every rank makes the same calls in the same order. There is one backward pass per step: micro-batches are a matter of the model's forward pass.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from protoclip_scale import collectives
from protoclip_scale.engine.checkpoint.pieces import WEIGHTS, Piece
from protoclip_scale.engine.optimizer import Groups
from protoclip_scale.engine.strategy.precision import Precision
from protoclip_scale.recipe.schema import Optim

if TYPE_CHECKING:
    from accelerate import Accelerator

    from protoclip_scale.engine.checkpoint.reading import Reader

MOMENTS = ("exp_avg", "exp_avg_sq")


class Held(NamedTuple):
    """Memory of this rank that the model computes with: a whole tensor, or (``part``) what this rank's piece of one is."""

    values: torch.Tensor
    part: bool


@dataclass(frozen=True)
class Update:
    """What came of a step, the same on all ranks.

    ``norm``: of the gradient averaged over ranks, before clipping; not finite if any rank's loss or gradient was not. ``taken``: whether weights
    changed. ``stop``: whether any rank asked to stop.
    """

    norm: float
    taken: bool
    stop: bool


def spoilt_if_not_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss, or NaN with NaN gradients: an infinite loss can have finite gradients, which the other ranks could not tell from sound ones."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class Strategy(ABC):
    """A model and its optimiser as the ranks hold them.

    ``bare_model``: the model without wrappers, for its names, its mode and, inside ``evaluating``, for calls without gradient. ``whole``: every rank
    holds every weight, so the bare model may also be copied and called by one rank alone. ``compiles``: whether blocks of the model may be compiled before ``prepare``.
    ``optimizers``: the values of ``optim.name`` it takes; only AdamW steps number by number on parts of flattened weights as it would on whole ones, in groups of one kind.
    """

    title: str
    whole = True
    compiles = True
    optimizers = frozenset({"adamw"})

    def __init__(self, accelerator: "Accelerator", precision: Precision):
        self.accelerator = accelerator
        self.precision = precision
        self.device = accelerator.device
        self.bare_model: nn.Module = None
        self.optimizer: torch.optim.Optimizer = None

    @abstractmethod
    def prepare(self, model: nn.Module, groups: Groups, settings: Optim) -> None:
        """Take over a model whose weights are final, on the strategy's device, or without ``whole`` on the CPU, and make the optimiser for ``groups`` (see
        ``parameter_groups``); what does not train is in no group and asks for no gradient. Called again, after ``release``, when what trains changes."""

    def release(self) -> None:
        """Let go of model and optimiser, if there are any; their memory is free again."""
        self.bare_model = self.optimizer = None

    @abstractmethod
    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """A forward pass of the model with gradient."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """The gradient of a scalar, averaged over ranks. A loss that is not finite on one rank makes the step's norm not finite on all."""

    @abstractmethod
    def update(self, stop: bool = False) -> Update:
        """Clip to ``optim.max_norm`` and step, or skip the step on all ranks if the norm is not finite; gradients are dropped. ``stop``: this rank was
        asked to stop. A collective, and a wait for the device: the only ones of a step beside those of the gradients, but for DeepSpeed's own."""

    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(parameter.numel() for parameter in self.bare_model.parameters())

    def set_learning_rates(self, learning_rates: dict[str, float]) -> None:
        """By ``side`` of the groups, times their ``factor``."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rates[group["side"]] * group["factor"]

    @contextlib.contextmanager
    def evaluating(self, compute_dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
        """The model in evaluation mode, its towers in ``compute_dtype`` (None: fp32); it comes back as it was. Without ``whole`` its weights are gathered
        layer by layer inside each call, so all ranks make equally many, without gradient and outside of ``torch.inference_mode``."""
        model = self.bare_model
        was = model.training, model.compute_dtype
        model.compute_dtype = compute_dtype
        model.eval()
        # compiled blocks run as they are: other graphs for passes without gradient would take longer to compile than most evaluations do
        try:
            with torch.compiler.set_stance("force_eager") if model.compiled else contextlib.nullcontext():
                yield model
        finally:
            model.compute_dtype = was[1]
            model.train(was[0])

    @contextlib.contextmanager
    def holding(self, own: Iterable[Piece]) -> Iterator[None]:
        """The model with other weights and buffers, to evaluate or export; ``own``: this rank's share of them, cut as ``weight_pieces`` cuts. A collective.

        Afterwards it has its own ones again, bit for bit; what AdamW steps on is as it was. Costs a copy of what this rank holds of the model (a whole one, where ranks
        do): less than gradients and activations, of which there are none meanwhile.
        """
        held = self._held()
        before = {name: each.values.clone() for name, each in held.items()}
        shares: dict[str, list[Piece]] = {}
        for piece in own:
            shares.setdefault(piece.name.removeprefix(WEIGHTS["live"]), []).append(piece)
        try:
            with self._writing():
                for name, each in held.items():
                    _fill(each, shares.get(name, []))
            yield
        finally:
            with self._writing():
                for name, each in held.items():
                    each.values.copy_(before[name])

    def _held(self) -> dict[str, Held]:
        """By name in the state dict."""
        return {name: Held(tensor, part=False) for name, tensor in self.bare_model.state_dict().items()}

    def _writing(self) -> contextlib.AbstractContextManager:
        """Around changes of what ``_held`` gives."""
        return contextlib.nullcontext()

    @abstractmethod
    def gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Whole gradients by name between ``backward`` and ``update``, one after the other, averaged over ranks; a collective. For tests and benchmarks."""

    @abstractmethod
    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's state dict, one whole tensor after the other; a collective. No more than one is gathered at a time."""

    @abstractmethod
    def weight_pieces(self) -> Iterator[Piece]:
        """This rank's share of ``model/NAME``, weights in fp32 and buffers: the very memory that steps change, until ``release``. Nothing is gathered."""

    @abstractmethod
    def optimizer_pieces(self) -> Iterator[Piece]:
        """This rank's share of ``optimizer/NAME/KEY``, with AdamW's keys exp_avg, exp_avg_sq and step; a parameter that has taken no step has none. Nothing is gathered."""

    @abstractmethod
    def load(self, reader: "Reader") -> None:
        """Put the optimiser's state back after ``prepare``, whatever world size and strategy they come from; parameters without any start fresh. Weights are
        loaded into the model before ``prepare``."""


def _fill(held: Held, own: list[Piece]) -> None:
    """Write what the ranks' pieces of a tensor hold together; a collective where each rank holds the whole."""
    if held.part:
        for piece in own:
            held.values.copy_(piece.values)
        return
    whole = torch.zeros(held.values.numel(), dtype=held.values.dtype, device=held.values.device)
    for piece in own:
        whole[piece.start : piece.start + piece.values.numel()] = piece.values
    held.values.copy_(collectives.all_reduce(whole).view_as(held.values))
