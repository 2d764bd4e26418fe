"""Prototype features of held-out rows, from the forward pass that gives their embeddings; how their clusters agree with class labels."""

from collections.abc import Sequence

import torch

from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.prototypes.agreement import label_agreement
from protoclip_scale.prototypes.episode import EpisodePrototypes


class WithPrototypes:
    """An encoder whose rows are a unit embedding [D] and a unit prototype feature [P] side by side; the heads are all that it costs more."""

    def __init__(self, model: DualEncoder):
        self.model = model

    @property
    def training(self) -> bool:
        return self.model.training

    def train(self, mode: bool = True) -> "WithPrototypes":
        self.model.train(mode)
        return self

    def eval(self) -> "WithPrototypes":
        return self.train(False)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        features = self.model(images, None, None, wants=frozenset({"image", "image_prototype"}))
        return torch.cat([features["image"], features["image_prototype"]], dim=1)

    def encode_text(self, token_ids: torch.Tensor, token_lengths: torch.Tensor) -> torch.Tensor:
        features = self.model(None, token_ids, token_lengths, wants=frozenset({"text", "text_prototype"}))
        return torch.cat([features["text"], features["text_prototype"]], dim=1)


def cluster_figures(
    prototypes: EpisodePrototypes, images_NP: torch.Tensor, texts_MP: torch.Tensor, with_text: Sequence[int], classes: dict[str, list[str]]
) -> dict[str, float]:
    """``COLUMN/PROTOTYPES/{ari,ami}`` (see ``label_agreement``) of rows with these prototype features and class names.

    ``texts_MP``: of the rows that have a caption, whose numbers are ``with_text``.
    """
    of_texts = {column: [names[row] for row in with_text] for column, names in classes.items()}
    return label_agreement(prototypes, {"image": images_NP}, classes) | label_agreement(prototypes, {"text": texts_MP}, of_texts)
