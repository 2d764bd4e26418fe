"""Pictures of the prototypes found: for some clusters of each modality, the images and captions nearest to the centroid."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from protoclip_scale import collectives
from protoclip_scale.data.plan import EpisodePlan
from protoclip_scale.engine.context import RunContext
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.report.prototype_grid import draw_prototypes as draw_grid

MEMBERS = 6
SMALLEST_SHOWN = 4


def draw_prototypes(run: RunContext, plan: EpisodePlan, store: FeatureStore, prototypes: EpisodePrototypes) -> None:
    """``pictures/prototypes-<episode>-<modality>.png``, drawn by rank 0 from the lanes it owns; the tightest clusters of some size."""
    shown = run.recipe.prototypes.pictures
    if not shown or collectives.rank() != 0:
        return
    for modality in ("image", "text"):
        if f"{modality}_centroids" not in prototypes.centroids:
            continue
        labels = prototypes.labels[modality].numpy().reshape(run.recipe.data.plan.lanes, -1)[run.lanes.start : run.lanes.stop].reshape(-1)
        centroids = prototypes.centroids[f"{modality}_centroids"].cpu().numpy()
        distances = _squared_distances(run, store, modality, labels, centroids)
        sizes = np.bincount(labels, minlength=len(centroids))
        spread = np.bincount(labels, weights=distances, minlength=len(centroids)) / np.maximum(sizes, 1)
        candidates = np.flatnonzero(sizes >= min(SMALLEST_SHOWN, sizes.max()))
        cards = []
        for cluster in candidates[np.argsort(spread[candidates], kind="stable")][:shown]:
            members = np.flatnonzero(labels == cluster)
            nearest = members[np.argsort(distances[members], kind="stable")][:MEMBERS]
            images, captions = zip(*(_row(run, plan, int(place)) for place in nearest), strict=True)
            cards.append((f"prototype {cluster}", int(sizes[cluster]), list(images), list(captions)))
        path = run.folder / "pictures" / f"prototypes-{plan.number + 1:04d}-{modality}.png"
        path.parent.mkdir(exist_ok=True)
        draw_grid(path, cards)


def _squared_distances(run: RunContext, store: FeatureStore, modality: str, labels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Of every row of the own lanes to its centroid; one block of features in memory at a time."""
    distances = np.empty(len(labels), dtype=np.float32)
    for number, lane in enumerate(run.lanes):
        for start, block in store.blocks(modality, lane):
            first = number * run.plan.lane_rows + start
            rows = slice(first, first + len(block))
            distances[rows] = np.square(block - centroids[labels[rows]]).sum(axis=1)
    return distances


def _row(run: RunContext, plan: EpisodePlan, place: int) -> tuple[Image.Image, str]:
    """The picture and caption at a place of rank 0's lanes."""
    lane, slot = run.lanes.start + place // plan.lane_rows, place % plan.lane_rows
    encoded, captions = run.spool.open(plan.number, lane).row(int(plan.spool_rows(lane)[slot]))
    try:
        image = Image.open(io.BytesIO(encoded))
        image.thumbnail((128, 128))
        image = image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        image = Image.new("RGB", (96, 96), "lightgrey")
    return image, captions[0] if captions else ""
