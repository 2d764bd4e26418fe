"""The cluster phase: k-means of each modality and the teacher, back translation, labels of every position."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from protoclip_scale import collectives
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.faults import event
from protoclip_scale.engine.refresh import ClusterRows
from protoclip_scale.objectives import Objective
from protoclip_scale.prototypes import back_translation, diagnostics, kmeans, quality
from protoclip_scale.prototypes.episode import EpisodePrototypes, RowLabels
from protoclip_scale.prototypes.fixed_point import Extent
from protoclip_scale.prototypes.kmeans import Iteration, KMeansResult

STUDENTS = ("image", "text")
LABELINGS = ("image", "text", "teacher")
OnIteration = Callable[[Iteration], None]
Begun = Callable[[list[np.ndarray], OnIteration], KMeansResult]  # row ids of the own lanes -> their clusters


@dataclass(frozen=True)
class Clustering:
    """What the phase found. ``labels``: int32 [n_l] of the clustered rows of the own lanes, by labeling; ``centroids``: k-means' own, as they were before
    any scaling, to start the next one from; ``table``: one line per k-means iteration."""

    prototypes: EpisodePrototypes
    labels: dict[str, list[np.ndarray]]
    centroids: dict[str, np.ndarray]
    figures: dict[str, float]
    table: list[dict[str, Any]]


def labelings(objectives: dict[str, Objective]) -> list[str]:
    """The labelings that the given objectives learn from, always in the same order."""
    wanted = set().union(*(objective.clusters for objective in objectives.values()))
    return [name for name in LABELINGS if name in wanted]


def num_iterations(run: RunContext, num_labelings: int) -> int:
    """k-means iterations at most, over all labelings and restarts."""
    return num_labelings * run.recipe.prototypes.restarts * run.recipe.prototypes.iterations


def seed_of(run: RunContext, episode: int, name: str) -> tuple[int, ...]:
    """Of the k-means of an episode's labeling."""
    return run.recipe.data.plan.seed, episode, LABELINGS.index(name)


def on_iteration(run: RunContext, name: str, done: int) -> OnIteration:
    """What each iteration of a labeling's k-means does besides: faults, stops, progress. ``done``: iterations of those before it."""
    settings = run.recipe.prototypes

    def told(found: Iteration) -> None:
        event("cluster.iteration")
        run.stop.agree()
        so_far = done + found.restart * settings.iterations + found.iteration + 1
        run.console.advance(so_far, f"{name}: objective {found.objective:.4f}, {found.moved} rows moved, {found.empty} clusters refilled")

    return told


def cluster(
    run: RunContext,
    rows: ClusterRows,
    objectives: dict[str, Objective],
    episode: int,
    row_labels: dict[str, RowLabels],
    begun: dict[str, Begun],
    warm: dict[str, np.ndarray],
) -> Clustering:
    """Prototypes of an episode and labels of its rows, from the features at hand; a collective.

    ``row_labels``: labelings that each row has for good (a teacher's that is clustered once), not searched for here; ``begun``: labelings whose k-means is under way; ``warm``: centroids to start from.
    Every rank works on its own lanes. Costs ``restarts`` x ``iterations`` searches of n rows among K centroids per labeling.
    """
    settings = run.recipe.prototypes
    wanted = labelings(objectives)
    labels: dict[str, list[np.ndarray]] = {}
    centroids: dict[str, np.ndarray] = {}
    figures: dict[str, float] = {} if rows.found is None else {"records/found": rows.found}
    table: list[dict[str, Any]] = []
    extents: dict[str, Extent] = {}
    searched = [name for name in wanted if name not in row_labels]
    for number, name in enumerate(searched):
        told = on_iteration(run, name, num_iterations(run, number))
        if name in begun:
            result = begun[name](rows.row_ids, told)
        else:
            result = kmeans.fit(rows.features[name], rows.positions, settings, seed_of(run, episode, name), told, warm.get(name))
        labels[name], centroids[name], extents[name] = result.labels, result.centroids, result.extent
        table += [{"labeling": name, **vars(line)} for line in result.history]
        figures |= {f"kmeans/{name}/objective": result.objective, f"kmeans/{name}/empty": result.empties, f"kmeans/{name}/imbalance": result.imbalance}
    for name in wanted:
        if name in row_labels:
            labels[name] = [row_labels[name](row_ids) for row_ids in rows.row_ids]
    prototypes = {f"{name}_centroids": centroids[name] for name in STUDENTS if name in centroids}
    for student in STUDENTS:
        for teacher in wanted:
            if teacher != student:
                event("cluster.translate")
                prototypes[f"{student}_from_{teacher}"] = back_translation.class_means(rows.features[student], labels[teacher], settings.clusters, extents.get(student))
    if settings.normalize_centroids:
        prototypes = {name: back_translation.unit_rows(each) for name, each in prototypes.items()}
    for objective in objectives.values():
        for name, temperature in objective.soft_target_temperatures().items():
            figures[f"target_entropy/{name}"] = diagnostics.target_entropy(torch.from_numpy(prototypes[f"{name}_centroids"]).to(run.device), labels[name], temperature)
    figures |= quality.clustering_quality(rows.features, rows.positions, labels, prototypes, settings, (run.recipe.data.plan.seed, episode))
    event("cluster.labels")
    by_position = {name: _of_all_lanes(run, rows.positions, labels[name]) for name in searched} if rows.episode == episode else {}
    return Clustering(
        EpisodePrototypes(episode, {name: torch.from_numpy(each).to(run.device) for name, each in prototypes.items()}, by_position, row_labels),
        labels,
        centroids,
        figures,
        table,
    )


def _of_all_lanes(run: RunContext, positions: list[np.ndarray], labels: list[np.ndarray]) -> torch.Tensor:
    """int32 [S] by position of the episode, from each rank's lanes; -1 where a row was not clustered."""
    own = torch.full((len(run.lanes) * run.plan.lane_rows,), -1, dtype=torch.int32)
    places = torch.from_numpy(np.concatenate(positions)) - run.lanes.start * run.plan.lane_rows
    own[places] = torch.from_numpy(np.concatenate(labels)).to(torch.int32)
    return collectives.all_gather(own.to(run.device)).cpu()
