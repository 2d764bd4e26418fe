"""Groups of processes that wait for work: forked from one server that has imported everything, joined over gloo."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["kmeans_parts.contestants"])


class Group:
    """``world`` processes of ``threads`` threads; ``run`` lets all of them do one thing."""

    def __init__(self, world: int, threads: int, features: str):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(theirs, rank, world, port, threads, features), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def run(self, work: Callable[..., dict], *arguments: Any) -> dict:
        """What rank 0's ``work(rows, rank, world, *arguments)`` gives, with the longest ``seconds``, the sum of ``cpu`` and all ``labels``."""
        for pipe in self.pipes:
            pipe.send((work, arguments))
        found = [pipe.recv() for pipe in self.pipes]
        for answer in found:
            if isinstance(answer, str):
                raise RuntimeError(answer)
        labels = [answer["labels"] for answer in found if "labels" in answer]
        return found[0] | {
            "seconds": max(answer["seconds"] for answer in found),
            "cpu": sum(answer["cpu"] for answer in found),
            "labels": np.concatenate(labels) if labels else None,
        }

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def _serve(pipe, rank: int, world: int, port: int, threads: int, features: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is compared here runs on processors, on a machine with GPUs too
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        dist.init_process_group("gloo")
    rows = np.load(features, mmap_mode="r", allow_pickle=False)
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        work, arguments = task
        try:
            if world > 1:
                dist.barrier()
            cpu, began = time.process_time(), time.perf_counter()
            found = work(rows, rank, world, threads, *arguments)
            pipe.send({"cpu": time.process_time() - cpu, "seconds": time.perf_counter() - began} | found)
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
    if world > 1:
        dist.destroy_process_group()
