"""What is timed: functions of (all rows, rank, ranks, threads, settings) that run in the processes of a group."""

import time

import faiss
import numpy as np
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from protoclip_scale.prototypes import kmeans
from protoclip_scale.prototypes.back_translation import class_means
from protoclip_scale.prototypes.fixed_point import extent_of
from protoclip_scale.prototypes.starts import draw_starts
from protoclip_scale.recipe.schema import Prototypes

LANES = 8


def _lanes(rows: np.ndarray, rank: int, world: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(parts, positions) of the own lanes, in memory."""
    own = range(rank * LANES // world, (rank + 1) * LANES // world)
    positions = np.array_split(np.arange(len(rows)), LANES)
    return [np.array(rows[positions[lane]]) for lane in own], [positions[lane] for lane in own]


def starts(rows: np.ndarray, rank: int, world: int, threads: int, settings: Prototypes, seed: int) -> dict:
    """The centroids that every contestant begins with."""
    return {"start": draw_starts([rows], [np.arange(len(rows))], settings, [seed, 0], extent_of([rows]))}


def ours(rows: np.ndarray, rank: int, world: int, threads: int, settings: Prototypes, seed: int, start: np.ndarray | None) -> dict:
    """Labels of the own lanes and the objective; ``seconds`` include the last search, which gives the labels. ``pbt``: of back translation."""
    parts, positions = _lanes(rows, rank, world)
    cpu, began = time.process_time(), time.perf_counter()
    result = kmeans.fit(parts, positions, settings, [seed], start=start)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    began = time.perf_counter()
    class_means(parts, result.labels, settings.clusters, result.extent)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "pbt": time.perf_counter() - began,
        "labels": np.concatenate(result.labels),
        "objective": result.objective,
        "moved": [line.moved for line in result.history],
        "empty": sum(line.empty for line in result.history),
    }


def faiss_kmeans(rows: np.ndarray, rank: int, world: int, threads: int, settings: Prototypes, seed: int, start: np.ndarray | None, gpu: bool = False) -> dict:
    """``faiss.Kmeans`` on all rows. ``seconds`` are of its training alone; ``labelled``: with the search that gives labels."""
    rows = np.array(rows)
    peer = faiss.Kmeans(
        rows.shape[1], settings.clusters, niter=settings.iterations, nredo=settings.restarts, seed=seed + 1, gpu=gpu, max_points_per_centroid=10**9, min_points_per_centroid=1
    )
    cpu, began = time.process_time(), time.perf_counter()
    peer.train(rows, init_centroids=start)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    squared, _ = peer.index.search(rows, 1)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "labelled": time.perf_counter() - began,
        "objective": float(squared.sum(dtype=np.float64)),
        "iterations": len(peer.iteration_stats),
        "empty": int(sum(line["nsplit"] for line in peer.iteration_stats)),
    }


def sklearn_kmeans(rows: np.ndarray, rank: int, world: int, threads: int, settings: Prototypes, seed: int, start: np.ndarray) -> dict:
    """scikit-learn's, Lloyd's form, never stopping before labels stand still."""
    rows = np.array(rows)
    with threadpool_limits(threads):
        peer = KMeans(settings.clusters, init=start, n_init=1, max_iter=settings.iterations, tol=0, algorithm="lloyd")
        cpu, began = time.process_time(), time.perf_counter()
        peer.fit(rows)
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "objective": float(peer.inertia_)}
