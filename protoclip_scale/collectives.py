"""Every collective the package uses, differentiable ones included; each is a no-op in a single process.

Row-local losses need both directions of a gather (methods: table 0.2, row 1): the forward collects the columns of all
ranks, the backward sums what every rank sends back and keeps the own slice. With gradients averaged over ranks by DDP
this equals the gradient of the one-process loss.
"""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from protoclip_scale import standing
from protoclip_scale.errors import UserError

_group: ContextVar[dist.ProcessGroup | None] = ContextVar("group", default=None)  # None is that of all ranks


def separate_group(timeout_minutes: float) -> dist.ProcessGroup | None:
    """All ranks once more, on CPUs over gloo, for a thread that works beside the main one: its collectives must not come between those. A collective;
    a group keeps sockets and threads for as long as the process lives, so it is made once."""
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes)) if dist.is_initialized() else None


@contextlib.contextmanager
def within(group: dist.ProcessGroup | None) -> Iterator[None]:
    """The thread's collectives inside go through ``group``, without gradients."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def is_about_other_ranks(error: BaseException) -> bool:
    """Whether an error says that a collective failed, here or in a library: another rank is then gone, late or out of reach. Gloo raises plain RuntimeErrors."""
    texts = ("gloo", "NCCL", "pair closure", "Connection reset by peer", "Connection closed by peer", "Broken pipe", "process group")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(text in str(error) for text in texts))


def backend() -> str | None:
    """gloo or nccl; None in a single process."""
    return dist.get_backend(_group.get()) if dist.is_initialized() else None


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0")) if dist.is_initialized() else 0


def local_world_size() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        ctx.rows = tensor.shape[0]
        gathered = tensor.new_empty((world_size() * tensor.shape[0], *tensor.shape[1:]))
        dist.all_gather_into_tensor(gathered, tensor.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        if backend() == "nccl":  # half of the traffic
            own = gradient.new_empty((ctx.rows, *gradient.shape[1:]))
            dist.reduce_scatter_tensor(own, gradient.contiguous())
            return own
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed)
        return summed[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """[B, ...] on each rank -> [W*B, ...] in rank order on all; every rank must hold the same B."""
    return tensor if world_size() == 1 else _AllGather.apply(tensor)


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """A reduced copy, without gradient. ``op``: sum, min or max."""
    reduced = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(reduced, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op], group=_group.get())
    return reduced


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Like ``all_gather_with_grad`` without gradient."""
    if world_size() == 1:
        return tensor.detach()
    gathered = tensor.new_empty((world_size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor.detach().contiguous(), group=_group.get())
    return gathered


def all_gather_objects(value: Any) -> list[Any]:
    """One (small, picklable) value per rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_group.get())
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's (small, picklable) value on all ranks."""
    if world_size() == 1:
        return value
    box = [value if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0, group=_group.get())
    return box[0]


def any_rank(flag: bool) -> bool:
    """True everywhere if it is true anywhere."""
    if world_size() == 1:
        return bool(flag)
    device = "cuda" if backend() == "nccl" else "cpu"
    return bool(all_reduce(torch.tensor([int(flag)], device=device), "max").item())


def host_values(tensor: torch.Tensor) -> list:
    """``tensor.tolist()`` of what collectives gave: on a GPU a rank waits for the others here, and its watch knows that by this module's name."""
    return tensor.tolist()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier(group=_group.get())


def from_rank_zero(work: Callable[[], Any]) -> Any:
    """What ``work`` gives on rank 0, on all ranks; a UserError of it is raised on all."""
    value, failure = None, None
    if rank() == 0:
        try:
            value = work()
        except UserError as error:
            failure = error
    value, failure = broadcast_object((value, failure))
    if failure:
        raise failure
    return value


def from_rank_zero_patiently(work: Callable[[], Any], meanwhile: Callable[[], None]) -> Any:
    """``from_rank_zero`` for work that may take longer than a collective may wait: it is done in a thread, and all ranks call ``meanwhile``, which may hold
    collectives, about every second. What ``meanwhile`` raises ends the wait; the thread is left to itself."""
    outcome: list[Callable[[], Any]] = []

    def attempt() -> None:
        try:
            value = work()
            outcome.append(lambda: value)
        except BaseException as error:
            outcome.append(functools.partial(_raise, error))

    thread = threading.Thread(target=attempt, daemon=True) if rank() == 0 else None
    if thread:
        thread.start()
    pause = 0.01
    with standing.polling():
        while any_rank(works := thread is not None and thread.is_alive()):
            standing.HERE.waits = not works
            meanwhile()
            if thread:
                thread.join(pause)
            else:
                time.sleep(pause)
            pause = min(2 * pause, 1.0)
    return from_rank_zero(lambda: outcome[0]())


def _raise(error: BaseException) -> None:
    raise error


def on_each_machine(work: Callable[[], None]) -> None:
    """Let the first rank of each machine work while the others wait; a UserError of one is raised on all."""
    failure = None
    if local_rank() == 0:
        try:
            work()
        except UserError as error:
            failure = error
    failures = [error for error in all_gather_objects(failure) if error]
    if failures:
        raise failures[0]
