"""The cluster phase: k-means of each modality and the teacher, back translation, labels of every position."""

import numpy as np
import torch

from protoclip_scale import collectives
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.faults import event
from protoclip_scale.objectives import Objective
from protoclip_scale.prototypes import back_translation, diagnostics, kmeans
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.prototypes.store import FeatureStore

STUDENTS = ("image", "text")
LABELINGS = ("image", "text", "teacher")


def labelings(objectives: dict[str, Objective]) -> list[str]:
    """The labelings that the given objectives learn from, always in the same order."""
    wanted = set().union(*(objective.clusters for objective in objectives.values()))
    return [name for name in LABELINGS if name in wanted]


def num_iterations(run: RunContext, objectives: dict[str, Objective]) -> int:
    """k-means iterations of an episode at most, over all labelings and restarts."""
    return len(labelings(objectives)) * run.recipe.prototypes.restarts * run.recipe.prototypes.iterations


def cluster(
    run: RunContext, store: FeatureStore, objectives: dict[str, Objective], episode: int
) -> tuple[EpisodePrototypes, dict[str, float]]:
    """Prototypes and labels of an episode from its features, and figures about them; a collective.

    Every rank works on its own lanes. Costs ``restarts`` x ``iterations`` searches of S rows among K centroids per labeling.
    """
    settings = run.recipe.prototypes
    wanted = labelings(objectives)
    features = {name: [store.read(name, lane) for lane in run.lanes] for name in store.columns}
    first_positions = [lane * run.plan.lane_rows for lane in run.lanes]
    labels: dict[str, list[np.ndarray]] = {}
    prototypes: dict[str, np.ndarray] = {}
    figures: dict[str, float] = {}
    for number, name in enumerate(wanted):

        def on_iteration(restart: int, iteration: int, objective: float, moved: int, empty: int, number: int = number, name: str = name) -> None:
            event("cluster.iteration")
            run.stop.agree()
            done = (number * settings.restarts + restart) * settings.iterations + iteration + 1
            run.console.advance(done, f"{name}: objective {objective:.4f}, {moved} rows moved, {empty} clusters refilled")

        result = kmeans.fit(features[name], first_positions, settings, (run.recipe.data.plan.seed, episode, LABELINGS.index(name)), on_iteration)
        labels[name] = result.labels
        if name in STUDENTS:
            prototypes[f"{name}_centroids"] = result.centroids
        figures |= {f"kmeans/{name}/objective": result.objective, f"kmeans/{name}/empty": result.empties, f"kmeans/{name}/imbalance": result.imbalance}
    for student in STUDENTS:
        for teacher in wanted:
            if teacher != student:
                prototypes[f"{student}_from_{teacher}"] = back_translation.class_means(features[student], labels[teacher], settings.clusters)
    if settings.normalize_centroids:
        prototypes = {name: back_translation.unit_rows(rows) for name, rows in prototypes.items()}
    for objective in objectives.values():
        for name, temperature in objective.soft_target_temperatures().items():
            figures[f"target_entropy/{name}"] = diagnostics.target_entropy(prototypes[f"{name}_centroids"], labels[name], temperature)
    event("cluster.labels")
    return EpisodePrototypes(
        episode,
        {name: torch.from_numpy(rows).to(run.device) for name, rows in prototypes.items()},
        {name: _of_all_lanes(own, run.device) for name, own in labels.items()},
    ), figures


def _of_all_lanes(own: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """int32 [S] by position, from each rank's lanes."""
    return collectives.all_gather(torch.from_numpy(np.concatenate(own)).to(torch.int32).to(device)).cpu()
