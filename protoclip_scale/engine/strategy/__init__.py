"""The only place that knows how a model is spread over ranks: replicated (one process, DDP), ZeRO 1-3 (DeepSpeed), FSDP2. ``base`` is the contract."""

from typing import TYPE_CHECKING

from protoclip_scale.engine.strategy.base import Strategy, Update
from protoclip_scale.engine.strategy.launch import alone, asks_for_deepspeed, asks_for_fsdp, refuse_foreign_settings, start
from protoclip_scale.engine.strategy.precision import LossScale, Precision

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["LossScale", "Precision", "Strategy", "Update", "alone", "make_strategy", "refuse_foreign_settings", "start"]


def make_strategy(accelerator: "Accelerator", precision: Precision) -> Strategy:
    """The strategy that accelerate's configuration asks for. DeepSpeed is imported only here, and only if it is asked for."""
    if asks_for_deepspeed():
        from protoclip_scale.engine.strategy.zero import Zero as Chosen
    elif asks_for_fsdp():
        from protoclip_scale.engine.strategy.fsdp import FullySharded as Chosen
    else:
        from protoclip_scale.engine.strategy.replicated import Replicated as Chosen
    return Chosen(accelerator, precision)
