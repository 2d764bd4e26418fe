"""How the clusters of held-out rows' prototype features agree with class labels."""

from collections.abc import Sequence

import torch

from protoclip_scale.prototypes.agreement import label_agreement
from protoclip_scale.prototypes.episode import EpisodePrototypes


def cluster_figures(
    prototypes: EpisodePrototypes, images_NP: torch.Tensor, texts_MP: torch.Tensor, with_text: Sequence[int], classes: dict[str, list[str]]
) -> dict[str, float]:
    """``COLUMN/PROTOTYPES/{ari,ami}`` (see ``label_agreement``) of rows with these prototype features and class names.

    ``texts_MP``: of the rows that have a caption, whose numbers are ``with_text``.
    """
    of_texts = {column: [names[row] for row in with_text] for column, names in classes.items()}
    return label_agreement(prototypes, {"image": images_NP}, classes) | label_agreement(prototypes, {"text": texts_MP}, of_texts)
