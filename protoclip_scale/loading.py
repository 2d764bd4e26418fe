"""A trained model to use: ``protoclip_scale.load(DIR)``."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from protoclip_scale.data.decode import BadImage, decode_image, pixels_of
from protoclip_scale.data.tokenizers import Tokens, tokenizer_for
from protoclip_scale.data.transforms import eval_transform
from protoclip_scale.errors import UserError
from protoclip_scale.models.build import is_export, load_export
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.recipe import schema

Picture = Image.Image | str | Path | bytes | torch.Tensor


class Encoder:
    """A model in evaluation mode with its preparation of pictures and texts. Embeddings are unit rows [n, embed_dim] in float32 on the CPU.

    ``settings``: the recipe's ``model`` section; ``model``: the network; ``logit_scale``: what cosines are multiplied by for the softmax over labels.
    """

    def __init__(self, settings: schema.Model, model: DualEncoder, device: torch.device | str = "cpu", batch: int = 64):
        self.settings, self.batch, self.device = settings, batch, torch.device(device)
        self.model = model.eval().to(self.device)
        self.tokenizer = tokenizer_for(settings.text)
        with torch.no_grad():
            self.logit_scale = model.logit_scale().item()

    def preprocess(self, picture: Picture) -> torch.Tensor:
        """uint8 [3, size, size] of a PIL image, a file or its bytes: upright, on white, shorter side resized, middle square, as evaluation sees it. The network
        normalises it itself. Raises UserError for what is no picture."""
        if isinstance(picture, torch.Tensor):
            return picture
        if isinstance(picture, Image.Image):
            return eval_transform(pixels_of(picture), self.settings.image.size)
        try:
            data = picture if isinstance(picture, bytes) else Path(picture).expanduser().read_bytes()
            return eval_transform(decode_image(data), self.settings.image.size)
        except (OSError, BadImage) as error:
            what = "these bytes" if isinstance(picture, bytes) else picture
            raise UserError(f"{what} cannot be read as a picture ({error}); name a PNG, JPEG, WebP, GIF or TIFF file") from error

    def tokenize(self, texts: str | Sequence[str]) -> Tokens:
        """Token ids [n, context_length] and lengths [n]."""
        return self.tokenizer([texts] if isinstance(texts, str) else list(texts))

    @torch.no_grad()
    def encode_image(self, pictures: Picture | Iterable[Picture]) -> torch.Tensor:
        """Of one picture, several, or a batch of ``preprocess``'s [n, 3, size, size]; read and encoded ``batch`` at a time."""
        one = isinstance(pictures, Image.Image | str | Path | bytes) or (isinstance(pictures, torch.Tensor) and pictures.dim() == 3)
        pictures = [pictures] if one else list(pictures)
        return self._in_batches(pictures, lambda part: self.model.encode_image(torch.stack([self.preprocess(each) for each in part]).to(self.device)))

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Of one text or several."""
        texts = [texts] if isinstance(texts, str) else list(texts)

        def encode(part: list[str]) -> torch.Tensor:
            tokens = self.tokenize(part)
            return self.model.encode_text(tokens.ids.to(self.device), tokens.lengths)

        return self._in_batches(texts, encode)

    def _in_batches(self, inputs: list[Any], encode: Callable[[list[Any]], torch.Tensor]) -> torch.Tensor:
        parts = [encode(inputs[start : start + self.batch]).float().cpu() for start in range(0, len(inputs), self.batch)]
        return torch.cat(parts) if parts else torch.empty(0, self.settings.embed_dim)


def load(folder: str | Path, checkpoint: str = "latest", weights: str | None = None, device: torch.device | str = "cpu") -> Encoder:
    """The model of an export of either layout, of a run directory, or of a transformers CLIP directory.

    ``checkpoint`` and ``weights`` (live or ema; None takes the average if there is one) are a run's. Raises UserError if nothing of the kind lies there.
    """
    folder = Path(folder).expanduser()
    if (folder / "recipe.yaml").is_file():
        from protoclip_scale.engine.saved_model import load_model

        saved = load_model(folder, checkpoint, weights)
        return Encoder(saved.recipe.model, saved.model, device)
    if not is_export(folder):
        what = "is neither an export nor a run directory" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}; name a folder that training, launch/export.py or tools/import_checkpoint.py wrote")
    return Encoder(*load_export(folder), device)
