"""The same function over many pieces of work, in this process or in several; results as they come, and one count of rows for the progress bar.

Workers are started clean (forkserver, or spawn where there is none): nothing is forked after threads. They end when the main process does, however it ends.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from protoclip_scale.errors import UserError
from protoclip_scale.preparation.images import use_one_thread

Item, Result = TypeVar("Item"), TypeVar("Result")
Advance = Callable[[int], None]
SECONDS_BETWEEN_LOOKS = 0.2
ROWS_BETWEEN_TICKS = 32

_worker: dict[str, Any] = {}  # of a worker process: job, done, stop


class Stopped(BaseException):
    """In a worker: another one failed, or the user stopped the command."""


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(function: Callable[[Any, Item, Advance], Result], job: Any, items: Sequence[Item], processes: int, advance: Advance) -> Iterator[Result]:
    """``function(job, item, advance)`` of every item, in any order. It calls ``advance(rows)`` as it goes on, and so ``advance`` here learns of all rows.

    The first exception of a worker is raised here and stops the others. UserError if a worker is killed, for instance for memory.
    """
    if processes == 1 or len(items) <= 1:
        for item in items:
            yield function(job, item, advance)
        return
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    done, stop = context.Value("q", 0), context.Value("b", 0)
    with ProcessPoolExecutor(min(processes, len(items)), context, _begin, (job, done, stop)) as executor:
        waiting = {executor.submit(_call, function, item) for item in items}
        try:
            seen = 0
            while waiting:
                finished, waiting = wait(waiting, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                now = done.value
                advance(now - seen)
                seen = now
                for future in finished:
                    yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps because memory ran out; run the same command again, it goes on where it stopped (fewer --processes need less memory)"
            ) from None
        finally:
            stop.value = 1
            executor.shutdown(wait=False, cancel_futures=True)


def begin_worker() -> None:
    """First thing in a worker process: one core, and an end that the main process decides, also when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what Ctrl-C means
    use_one_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _begin(job: Any, done: Any, stop: Any) -> None:
    begin_worker()
    _worker.update(job=job, done=done, stop=stop)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(function: Callable, item: Any) -> Any:
    pending = 0

    def advance(rows: int) -> None:
        nonlocal pending
        pending += rows
        if pending >= ROWS_BETWEEN_TICKS:
            tell()

    def tell() -> None:
        nonlocal pending
        with _worker["done"].get_lock():
            _worker["done"].value += pending
        pending = 0
        if _worker["stop"].value:
            raise Stopped

    result = function(_worker["job"], item, advance)
    tell()
    return result
