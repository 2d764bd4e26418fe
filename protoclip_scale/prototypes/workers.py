"""Threads for the tiles of a search: each takes a tile at a time and computes on one processor thread.

A tile takes hundreds of small operations. Shared among threads one by one, they would wait for each other at the end of every one, and on a
busy machine each wait costs a time slice; whole tiles wait once.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch


class Workers:
    """As many as torch has threads, on a CPU; on a GPU none, the caller does the work. Use as a context manager."""

    def __init__(self, module: ModuleType):
        self.number = torch.get_num_threads() if module.device().type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None
        if self.number > 1:
            started = threading.Barrier(self.number + 1)

            def begin() -> None:
                module.use_one_thread()
                started.wait()

            self._pool = ThreadPoolExecutor(self.number, initializer=begin)
            for _ in range(self.number):
                self._pool.submit(int)
            started.wait()
            torch.set_num_threads(self.number)  # for threads to come: torch takes the last number set in any thread for theirs

    def map(self, work: Callable[[Any], Any], tasks: Iterable[Any]) -> list[Any]:
        """What ``work`` gives for each task, in their order; the first error is raised."""
        return list(self._pool.map(work, tasks)) if self._pool else [work(task) for task in tasks]

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown()
