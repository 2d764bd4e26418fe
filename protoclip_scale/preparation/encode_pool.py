"""Images re-encoded in worker processes. One that crashes its decoder costs that image, not the run."""

import asyncio
import functools
import multiprocessing
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Self

from protoclip_scale.data.decode import BadImage, Limits
from protoclip_scale.errors import UserError
from protoclip_scale.preparation.download import Failure
from protoclip_scale.preparation.images import ImageSettings, prepare_image
from protoclip_scale.preparation.pool import begin_worker


def encode(data: bytes, settings: ImageSettings, limits: Limits) -> bytes | Failure:
    """The image as it is kept, or why there is none."""
    try:
        return prepare_image(data, settings, limits).encoded
    except BadImage as error:
        return Failure("not an image" if str(error) == "not an image" else "unusable image", str(error))
    except MemoryError:
        return Failure("unusable image", "not enough memory to decode it")
    except Exception as error:  # of one image; the others go on
        return Failure("unusable image", f"{type(error).__name__}: {error}")


def _nothing() -> None:
    """To see whether a worker starts."""


class EncodePool:
    """``encode`` in ``workers`` processes, or in a thread of this one if 0; an asynchronous context manager.

    UserError if processes do not start.
    """

    def __init__(self, workers: int, settings: ImageSettings, limits: Limits, encode=encode):
        self._workers = workers
        self._encode = functools.partial(encode, settings=settings, limits=limits)

    async def __aenter__(self) -> Self:
        self._pool = self._open(self._workers)
        self._alone = asyncio.Lock()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def __call__(self, data: bytes) -> bytes | Failure:
        loop, pool = asyncio.get_running_loop(), self._pool
        try:
            return await loop.run_in_executor(pool, self._encode, data)
        except BrokenProcessPool:
            if pool is self._pool:
                self._pool = self._open(self._workers)
        async with self._alone:  # one suspect at a time: whoever breaks a process of its own did it
            with self._open(1) as cell:
                try:
                    await loop.run_in_executor(cell, _nothing)
                except BrokenProcessPool:
                    raise UserError("worker processes do not start; run again with --workers 0, which decodes in this process") from None
                try:
                    return await loop.run_in_executor(cell, self._encode, data)
                except BrokenProcessPool:
                    return Failure("unusable image", "it ends the process that decodes it")

    @staticmethod
    def _open(workers: int) -> Executor:
        if workers == 0:
            return ThreadPoolExecutor(1, "encode")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # torch is imported once, not by every worker
        return ProcessPoolExecutor(workers, context, begin_worker)
