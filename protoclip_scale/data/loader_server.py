"""The clean process that loader workers are forked from. This module imports next to nothing, so that the server can start while the rest is imported.

Workers cannot be forked from the training process, which may have threads and a process group; a fresh interpreter for each would import torch again.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import signal
from collections.abc import Iterator

ALWAYS = ("__main__", "protoclip_scale.data.batches")
STOPS = (signal.SIGTERM, signal.SIGUSR1)  # batch systems send them to every process of a job
SIGNALS = (*STOPS, signal.SIGINT)  # which a terminal sends to every process that it started


def context(modules: tuple[str, ...] = ()) -> multiprocessing.context.ForkServerContext:
    """The multiprocessing context of loader workers. ``modules`` are imported once, in the server; no effect once it runs."""
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload([*ALWAYS, *modules])
    return forked


def start(modules: tuple[str, ...]) -> None:
    """Start the server ahead of its first use; its imports then run beside what this process does."""
    context(modules)
    with out_of_reach():
        multiprocessing.forkserver.ensure_running()


@contextlib.contextmanager
def out_of_reach() -> Iterator[None]:
    """A server or worker that starts inside does not get ``SIGNALS``: the training process answers to them, and would lose a worker that is just starting
    together with its server. A worker that has started says ``within_reach``."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        multiprocessing.resource_tracker.ensure_running()  # which both need; it lets SIGTERM and SIGINT in again when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def within_reach() -> None:
    """From now on this process ends on one of ``STOPS``, also on one that has come meanwhile; a Ctrl-C is the training process's alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
