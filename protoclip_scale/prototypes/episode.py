"""What an episode's clustering hands to training: prototypes [K, P] and a label for each position."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class EpisodePrototypes:
    """Prototypes of one episode.

    ``centroids``: ``image_centroids``, ``text_centroids`` (plain means), ``image_from_text``, ``text_from_image``,
    ``image_from_teacher``, ``text_from_teacher`` (back translated), each [K, P] float32. ``labels``: for ``image``, ``text``
    and ``teacher`` the cluster of each position of the episode, int32 [S]: 4 bytes a row.
    """

    episode: int
    centroids: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]

    def labels_of(self, positions_B: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        """The clusters of a batch's positions, int64 [B] by name."""
        return {name: labels[positions_B].long().to(device) for name, labels in self.labels.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Named for a checkpoint."""
        named = {f"prototypes/centroids/{name}": tensor for name, tensor in self.centroids.items()}
        return named | {f"prototypes/labels/{name}": tensor for name, tensor in self.labels.items()}

    @classmethod
    def from_tensors(cls, episode: int, tensors: dict[str, torch.Tensor], device: torch.device) -> "EpisodePrototypes":
        """Back from a checkpoint; labels stay on the CPU."""
        kinds: dict[str, dict[str, torch.Tensor]] = {"centroids": {}, "labels": {}}
        for key, tensor in tensors.items():
            _, kind, name = key.split("/")
            kinds[kind][name] = tensor.to(device) if kind == "centroids" else tensor
        return cls(episode, **kinds)
