"""Pictures of a clustering: prototypes with their images and captions, sizes of clusters, a map of both modalities' prototypes."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from protoclip_scale import collectives
from protoclip_scale.data.randomness import permutation
from protoclip_scale.data.spool import SpooledLane
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.refresh import ClusterRows
from protoclip_scale.prototypes.diagnostics import class_counts
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.prototypes.mapped import let_pages_go
from protoclip_scale.prototypes.store import BLOCK_ROWS
from protoclip_scale.report.caption_words import telling_words
from protoclip_scale.report.prototype_cards import write_cards
from protoclip_scale.report.prototype_grid import Prototype
from protoclip_scale.report.prototype_grid import draw_prototypes as draw_grid
from protoclip_scale.report.prototype_map import LABELLED, MappedSet, draw_map
from protoclip_scale.report.size_histogram import draw_sizes

MEMBERS = 6
SMALLEST_SHOWN = 4
CAPTIONS_READ = 64  # of a cluster, for its word on the map
STUDENTS = ("image", "text")


def draw_prototypes(run: RunContext, rows: ClusterRows, labels: dict[str, list[np.ndarray]], prototypes: EpisodePrototypes) -> None:
    """``pictures/prototypes-<episode>-<what>.png``: ``sizes``, ``map``, and for each labeling a grid of its largest, tightest and some random prototypes, whose
    cards are kept as JSON for the HTML report, too.

    ``labels``: by labeling, of the own lanes' ``rows``, -1 for rows that have none. A collective: sizes are those of all rows; the rest is drawn by rank 0
    from its own lanes. Where its spool no longer holds the rows (a run resumed on another machine) the grids and the words of the map are left out.
    Costs one pass over rank 0's features and about a second; memory of one block of features.
    """
    if not run.recipe.prototypes.pictures:
        return
    sizes = {name: class_counts(own, run.recipe.prototypes.clusters) for name, own in labels.items()}
    if collectives.rank() != 0:
        return
    drawn = _Drawing(run, rows, labels, prototypes)
    title = f"{run.recipe.name}, episode {prototypes.episode + 1}"
    stem = str(run.folder / "pictures" / f"prototypes-{prototypes.episode + 1:04d}")
    draw_sizes(f"{stem}-sizes.png", f"{title}: sizes of clusters", sizes)
    draw_map(f"{stem}-map.png", f"{title}: prototypes", drawn.spaces(sizes))
    for name in labels if drawn.has_rows else ():
        chosen = drawn.sections(name, sizes[name])
        draw_grid(f"{stem}-{name}.png", f"{title}: {name} clusters, with the rows nearest to each prototype", chosen)
        write_cards(Path(f"{stem}-{name}.json"), name, prototypes.episode + 1, chosen)


def newest_pictures(folder: Path) -> list[Path]:
    """The pictures of the last clustering that was drawn into a run directory."""
    found = sorted((folder / "pictures").glob("prototypes-[0-9]*.png"))
    return [path for path in found if path.name.split("-")[1] == found[-1].name.split("-")[1]]


def choose(sizes: np.ndarray, own_sizes: np.ndarray, spread: np.ndarray, shown: int, order: np.ndarray) -> dict[str, list[int]]:
    """Clusters to draw, about ``shown`` / 3 of each kind, none twice: with the most rows (``sizes`` [K]), with the smallest ``spread`` [K] among those of at
    least four own rows, and the first in ``order``, a permutation. Only clusters with ``own_sizes`` > 0 can be drawn."""
    tightest = np.argsort(spread, kind="stable")
    kinds = {
        "largest": np.argsort(-sizes, kind="stable"),
        f"tightest of those with {SMALLEST_SHOWN} rows or more": tightest[own_sizes[tightest] >= min(SMALLEST_SHOWN, own_sizes.max())],
        "drawn at random from the others": order,
    }
    chosen: dict[str, list[int]] = {}
    taken: set[int] = set()
    for number, (kind, clusters) in enumerate(kinds.items()):
        free = [cluster for cluster in clusters.tolist() if own_sizes[cluster] and cluster not in taken]
        chosen[kind] = free[: -(-(shown - number) // len(kinds))]
        taken |= set(chosen[kind])
    return {kind: clusters for kind, clusters in chosen.items() if clusters}


class _Drawing:
    """What rank 0 draws from: its own rows, one after another over its lanes."""

    def __init__(self, run: RunContext, rows: ClusterRows, labels: dict[str, list[np.ndarray]], prototypes: EpisodePrototypes):
        self._run, self._rows = run, rows
        self._labels = {name: np.concatenate(parts) for name, parts in labels.items()}
        self._centroids = {name: centroids.float().cpu().numpy() for name, centroids in prototypes.centroids.items()}
        self._episode = prototypes.episode
        self._row_ids, self._positions = np.concatenate(rows.row_ids), np.concatenate(rows.positions)
        self._lanes: dict[int, tuple[SpooledLane, np.ndarray, np.ndarray]] = {}
        try:
            first_of_lanes = np.unique(self._positions // run.plan.lane_rows, return_index=True)[1]
            self.has_rows = bool(len(first_of_lanes)) and all(self._row(int(place)) for place in first_of_lanes)
        except FileNotFoundError:
            self.has_rows = False

    def spaces(self, sizes: dict[str, np.ndarray]) -> dict[str, list[MappedSet]]:
        """The prototypes in the space of each student: its own clusters' and all that are translated into it."""
        words = {name: self._words(name, sizes[name]) for name in sizes}
        found = {}
        for student in STUDENTS:
            keys = {name: f"{student}_centroids" if name == student else f"{student}_from_{name}" for name in sizes}
            sets = [MappedSet(name, name != student, self._centroids[key], sizes[name], words[name]) for name, key in keys.items() if key in self._centroids]
            if sets:
                found[f"space of {student}s"] = sets
        return found

    def sections(self, name: str, sizes: np.ndarray) -> dict[str, list[Prototype]]:
        """The cards of a labeling's grid."""
        run, labels = self._run, self._labels[name]
        distances = self._squared_distances(name)
        known = labels >= 0
        own_sizes = np.bincount(labels[known], minlength=len(sizes))
        spread = np.bincount(labels[known], weights=distances[known], minlength=len(sizes)) / np.maximum(own_sizes, 1)
        order = permutation(len(sizes), run.recipe.data.plan.seed, "pictures", self._episode)
        chosen = choose(sizes, own_sizes, spread, run.recipe.prototypes.pictures, order)
        return {kind: [self._card(cluster, int(sizes[cluster]), labels, distances) for cluster in clusters] for kind, clusters in chosen.items()}

    def _card(self, cluster: int, size: int, labels: np.ndarray, distances: np.ndarray) -> Prototype:
        members = np.flatnonzero(labels == cluster)
        nearest = members[np.argsort(distances[members], kind="stable")][:MEMBERS]
        cells = [self._row(int(place)) for place in nearest]
        return f"prototype {cluster}", size, [_picture(encoded) for encoded, _ in cells], [captions[0] if captions else "" for _, captions in cells]

    def _words(self, name: str, sizes: np.ndarray) -> dict[int, str]:
        if not self.has_rows:
            return {}
        largest = np.argsort(-sizes, kind="stable")[:LABELLED]
        members = {int(cluster): np.flatnonzero(self._labels[name] == cluster)[:CAPTIONS_READ] for cluster in largest}
        return telling_words({cluster: [" ".join(self._row(int(place))[1]) for place in places] for cluster, places in members.items()})

    def _squared_distances(self, name: str) -> np.ndarray:
        """float32 [n] of every own row to its prototype, one block of features in memory at a time: in the labeling's own space, or where the teacher's
        clusters are translated to."""
        space, key = (name, f"{name}_centroids") if name in STUDENTS else next((s, k) for s in STUDENTS if (k := f"{s}_from_{name}") in self._centroids)
        distances = []
        labels = iter(np.split(self._labels[name], np.cumsum([len(part) for part in self._rows.positions])[:-1]))
        for part, own in zip(self._rows.features[space], labels, strict=True):
            for start in range(0, len(part), BLOCK_ROWS):
                block = slice(start, start + BLOCK_ROWS)
                distances.append(np.square(part[block] - self._centroids[key][own[block]]).sum(axis=1, dtype=np.float32))
                let_pages_go(part)
        return np.concatenate([*distances, np.empty(0, dtype=np.float32)])

    def _row(self, place: int) -> tuple[bytes | None, list[str]]:
        """The encoded image and the captions of an own row, from the spool of the episode whose rows these are. FileNotFoundError if that is gone."""
        lane = int(self._positions[place]) // self._run.plan.lane_rows
        if lane not in self._lanes:
            spooled = self._run.spool.open(self._rows.episode, lane)
            order = np.argsort(spooled.row_ids, kind="stable")
            self._lanes[lane] = spooled, spooled.row_ids[order], order
        spooled, row_ids, order = self._lanes[lane]
        return spooled.row(int(order[np.searchsorted(row_ids, self._row_ids[place])]))


def _picture(encoded: bytes | None) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(encoded or b""))
        image.thumbnail((128, 128))
        return image.convert("RGBA")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return Image.new("RGB", (96, 96), "lightgrey")
