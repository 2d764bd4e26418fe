"""How the two modalities lie in the shared space (methods 7.5)."""

import torch

from protoclip_scale.prototypes.quality import feature_figures


def modality_figures(images: torch.Tensor, texts: torch.Tensor) -> dict[str, float]:
    """Figures of n pairs of unit rows [n, D], an image and its first caption each.

    ``modality_gap``: norm of the difference of the two means, 0 to 2. ``positive_cosine``: mean cosine of a pair.
    ``image_feature_std``, ``text_feature_std``: standard deviation over rows, averaged over dimensions; near 0 for a collapsed tower.
    """
    images, texts = images.double(), texts.double()
    return {
        "modality_gap": (images.mean(0) - texts.mean(0)).norm().item(),
        "positive_cosine": (images * texts).sum(1).mean().item(),
        "image_feature_std": images.std(0, correction=0).mean().item(),
        "text_feature_std": texts.std(0, correction=0).mean().item(),
    }


def space_figures(images: torch.Tensor, texts: torch.Tensor) -> dict[str, float]:
    """How much of the space n pairs of unit rows [n, D] fill: ``image_effective_rank``, ``text_effective_rank``: exp of the entropy of the singular values, 1 for a
    collapsed tower, D for rows that fill all directions evenly. ``image_self_similarity``, ``text_self_similarity``: mean cosine of two different rows, 1 for a collapsed
    tower. None of one row. Cost: an SVD of each.
    """
    found = feature_figures({"image": images.numpy(), "text": texts.numpy()})
    return {key.replace("/", "_"): value for key, value in found.items() if "/" in key}
