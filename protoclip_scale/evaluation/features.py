"""What an evaluation asks of a model beside embeddings, from the forward pass that gives them."""

import torch
import torch.nn.functional as F

from protoclip_scale.errors import UserError
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives.compared import Compared

PROBED = {"projected": "image_projected", "tower": "image_pooled"}  # evaluation.probe.features -> what the model calls them


class WithFeatures:
    """An encoder whose rows are a unit embedding [D] and further features side by side.

    ``probe_features``: of images, see ``recipe.schema.measures.Probe``; ``prototypes``: unit prototype features [P] of both modalities, the heads being all that they cost
    more. Where ``compared`` has no embeddings, the mean of an image's tokens, scaled to unit length, stands for its embedding, and texts have none. Raises UserError for features
    that only a run's own model gives, and for those that nothing has trained.
    """

    def __init__(self, model: torch.nn.Module, probe_features: str = "embedding", prototypes: bool = False, compared: Compared = Compared()):  # noqa: B008 (it is immutable)
        if probe_features != "embedding" and not isinstance(model, DualEncoder):
            raise UserError(f"evaluation.probe.features {probe_features}: only a run's checkpoints give them; set it to embedding for this model")
        if probe_features == "projected" and not compared.embeddings:
            raise UserError("evaluation.probe.features projected: no objective trains this model's projections; set it to tower, or to embedding for the mean of an image's tokens")
        self.model = model
        self.tokens = None if compared.embeddings else compared.tokens[0]
        self.image_features = (self.tokens or "image", *([PROBED[probe_features]] if probe_features != "embedding" else []), *(["image_prototype"] if prototypes else []))
        self.text_features = ("text", *(["text_prototype"] if prototypes else []))
        self.image_widths: tuple[int, ...] = ()  # known once an image has been encoded

    @property
    def training(self) -> bool:
        return self.model.training

    def train(self, mode: bool = True) -> "WithFeatures":
        self.model.train(mode)
        return self

    def eval(self) -> "WithFeatures":
        return self.train(False)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        if self.image_features == ("image",):
            return self.model.encode_image(images)
        features = self.model(images, None, None, wants=frozenset(self.image_features))
        if self.tokens:
            features[self.tokens] = F.normalize(features[self.tokens].float().sum(1), dim=-1)
        self.image_widths = tuple(features[name].shape[1] for name in self.image_features)
        return torch.cat([features[name].float() for name in self.image_features], dim=1)

    def encode_text(self, token_ids: torch.Tensor, token_lengths: torch.Tensor) -> torch.Tensor:
        if len(self.text_features) == 1:
            return self.model.encode_text(token_ids, token_lengths)
        features = self.model(None, token_ids, token_lengths, wants=frozenset(self.text_features))
        return torch.cat([features[name] for name in self.text_features], dim=1)

    def split_images(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """What ``encode_image`` laid side by side, by name: ``image``, the unit embeddings, ``probe`` and ``image_prototype``."""
        widths = self.image_widths or (rows.shape[1],)
        return dict(zip(("image", *("probe" if name in PROBED.values() else name for name in self.image_features[1:])), rows.split(widths, dim=1), strict=True))
