"""What an episode's clustering hands to training: prototypes [K, P] and a label for each row."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from protoclip_scale.data.batches import Batch
from protoclip_scale.prototypes.assign_torch import nearest_rows

RowLabels = Callable[[np.ndarray], np.ndarray]  # row ids int64 [n] -> clusters int32 [n]


@dataclass(frozen=True)
class EpisodePrototypes:
    """Prototypes of one episode.

    ``centroids``: ``image_centroids``, ``text_centroids`` (plain means), ``image_from_text``, ``text_from_image``,
    ``image_from_teacher``, ``text_from_teacher`` (back translated), each [K, P] float32. ``labels``: by labeling (``image``, ``text``, ``teacher``) the cluster
    of each position of the episode, int32 [S], -1 where it is not known beforehand: 4 bytes a row. ``row_labels``: labelings that go by row and not
    by position. A modality with centroids and no known label is labelled online: by the centroid nearest to the batch's own features.
    """

    episode: int
    centroids: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]
    row_labels: dict[str, RowLabels] = field(default_factory=dict)

    def labels_of(self, batch: Batch, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The clusters of a batch's rows, int64 [B] by labeling, on the features' device. ``features``: the model's, by name; they get no gradient."""
        device = next(iter(features.values())).device
        known = {name: labels[batch.positions].long() for name, labels in self.labels.items()}
        known |= {name: torch.from_numpy(of_rows(batch.row_ids.numpy())).long() for name, of_rows in self.row_labels.items()}
        found = {name: labels.to(device, non_blocking=True) for name, labels in known.items()}
        for name in ("image", "text"):
            centroids_KP = self.centroids.get(f"{name}_centroids")
            if centroids_KP is None or (name in known and not (known[name] < 0).any()):
                continue
            nearest_B = nearest_rows(features[f"{name}_prototype"].detach().float(), centroids_KP)
            found[name] = torch.where(found[name] < 0, nearest_B, found[name]) if name in found else nearest_B
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Named for a checkpoint."""
        named = {f"prototypes/centroids/{name}": tensor for name, tensor in self.centroids.items()}
        return named | {f"prototypes/labels/{name}": tensor for name, tensor in self.labels.items()}

    @classmethod
    def from_tensors(cls, episode: int, tensors: dict[str, torch.Tensor], device: torch.device, row_labels: dict[str, RowLabels]) -> "EpisodePrototypes":
        """Back from a checkpoint; labels stay on the CPU."""
        kinds: dict[str, dict[str, torch.Tensor]] = {"centroids": {}, "labels": {}}
        for key, tensor in tensors.items():
            _, kind, name = key.split("/")
            kinds[kind][name] = tensor.to(device) if kind == "centroids" else tensor
        return cls(episode, **kinds, row_labels=row_labels)
