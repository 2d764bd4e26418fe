"""The clean process that loader workers are forked from. This module imports next to nothing, so that the server can start while the rest is imported.

Workers cannot be forked from the training process, which may have threads and a process group; a fresh interpreter for each would import torch again.
"""

import multiprocessing
import multiprocessing.forkserver

ALWAYS = ("__main__", "protoclip_scale.data.batches")


def context(modules: tuple[str, ...] = ()) -> multiprocessing.context.ForkServerContext:
    """The multiprocessing context of loader workers. ``modules`` are imported once, in the server; no effect once it runs."""
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload([*ALWAYS, *modules])
    return forked


def start(modules: tuple[str, ...]) -> None:
    """Start the server ahead of its first use; its imports then run beside what this process does."""
    context(modules)
    multiprocessing.forkserver.ensure_running()
