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
from protoclip_scale.export.manifest import read_manifest
from protoclip_scale.export.token_heads import load_with_tokens
from protoclip_scale.models.build import is_export
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives.compared import Compared, compared_by
from protoclip_scale.objectives.shared.late_interaction import late_similarities, present
from protoclip_scale.recipe import schema

Picture = Image.Image | str | Path | bytes | torch.Tensor


class Encoder:
    """A model in evaluation mode with its preparation of pictures and texts. Embeddings are unit rows [n, embed_dim] in float32 on the CPU.

    ``settings``: the recipe's ``model`` section; ``model``: the network; ``logit_scale``: what cosines are multiplied by for the softmax over labels; ``logit_bias``: None, or what is added then,
    for a sigmoid of each label instead (SigLIP). ``compared``: whether its embeddings were trained, and its tokens; ``token_scale``: what ``late_interaction`` is multiplied by for the softmax over labels, None without tokens.
    """

    def __init__(
        self,
        settings: schema.Model,
        model: DualEncoder,
        device: torch.device | str = "cpu",
        batch: int = 64,
        compared: Compared = Compared(),  # noqa: B008 (it is immutable)
        token_scale: float | None = None,
        logit_bias: float | None = None,
    ):
        self.settings, self.batch, self.device = settings, batch, torch.device(device)
        self.compared, self.token_scale = compared, token_scale
        self.model = model.eval().to(self.device)
        self.tokenizer = tokenizer_for(settings.text)
        self.logit_scale, self.logit_bias = _number(model, compared.logits[0]), logit_bias

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
        return self._of_pictures(pictures, self.model.encode_image, self.settings.embed_dim)

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Of one text or several."""
        return self._of_texts(texts, self.model.encode_text, self.settings.embed_dim)

    @torch.no_grad()
    def encode_image_tokens(self, pictures: Picture | Iterable[Picture]) -> torch.Tensor:
        """Unit rows [n, T, D] of the tokens of one picture or several. UserError for a model that has none."""
        kind = self._token_kinds()[0]
        return self._of_pictures(pictures, lambda images: self.model(images, wants=frozenset({kind}))[kind], 1, self._token_width())

    @torch.no_grad()
    def encode_text_tokens(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Unit rows [n, context_length, D] of the tokens of one text or several, rows of zeros where none counts. UserError for a model that has none."""
        kind = self._token_kinds()[1]
        return self._of_texts(texts, lambda ids, lengths: self.model(None, ids, lengths, wants=frozenset({kind}))[kind], 1, self._token_width())

    def late_interaction(self, asking: torch.Tensor, answering: torch.Tensor) -> torch.Tensor:
        """[n, m]: the mean over the tokens of each of the n of their best match among those of each of the m. Of images with texts it is S^I, by which an image asks for its text; of
        texts with images S^T. ``asking``, ``answering``: of ``encode_image_tokens`` and ``encode_text_tokens``."""
        return late_similarities(present(asking), present(answering))

    def _token_kinds(self) -> tuple[str, str]:
        if self.compared.tokens is None:
            raise UserError("this model has no token features; they come with runs that objectives.filip trains, and with their exports that hold token_heads.safetensors")
        return self.compared.tokens

    def _token_width(self) -> int:
        return self.model.filip_image_head.linear.out_features

    def _of_pictures(self, pictures: Picture | Iterable[Picture], encode: Callable[[torch.Tensor], torch.Tensor], *empty: int) -> torch.Tensor:
        """``empty``: a row's shape where there are no pictures."""
        one = isinstance(pictures, Image.Image | str | Path | bytes) or (isinstance(pictures, torch.Tensor) and pictures.dim() == 3)
        pictures = [pictures] if one else list(pictures)
        return self._in_batches(pictures, lambda part: encode(torch.stack([self.preprocess(each) for each in part]).to(self.device)), empty)

    def _of_texts(self, texts: str | Sequence[str], encode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *empty: int) -> torch.Tensor:
        def of_part(part: list[str]) -> torch.Tensor:
            tokens = self.tokenize(part)
            return encode(tokens.ids.to(self.device), tokens.lengths)

        return self._in_batches([texts] if isinstance(texts, str) else list(texts), of_part, empty)

    def _in_batches(self, inputs: list[Any], encode: Callable[[list[Any]], torch.Tensor], empty: tuple[int, ...]) -> torch.Tensor:
        parts = [encode(inputs[start : start + self.batch]).float().cpu() for start in range(0, len(inputs), self.batch)]
        return torch.cat(parts) if parts else torch.empty(0, *empty)


def load(folder: str | Path, checkpoint: str = "latest", weights: str | None = None, device: torch.device | str = "cpu") -> Encoder:
    """The model of an export of either layout, of a run directory, or of a transformers CLIP directory.

    ``checkpoint`` and ``weights`` (live or ema; None takes the average if there is one) are a run's. Raises UserError if nothing of the kind lies there.
    """
    folder = Path(folder).expanduser()
    if (folder / "recipe.yaml").is_file():
        from protoclip_scale.engine.saved_model import load_model

        saved = load_model(folder, checkpoint, weights)
        compared = compared_by(saved.recipe)
        token_scale = _number(saved.model, "filip_scale") if compared.tokens else None
        bias = compared.logits[1]
        return Encoder(saved.recipe.model, saved.model, device, compared=compared, token_scale=token_scale, logit_bias=_number(saved.model, bias) if bias else None)
    if not is_export(folder):
        what = "is neither an export nor a run directory" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}; name a folder that training, launch/export.py or tools/import_checkpoint.py wrote")
    settings, model, compared, token_scale = load_with_tokens(folder)
    return Encoder(settings, model, device, compared=compared, token_scale=token_scale, logit_bias=(read_manifest(folder) or {}).get("logit_bias"))


@torch.no_grad()
def _number(model: DualEncoder, kind: str) -> float:
    """Of a temperature or a bias."""
    return getattr(model, model.heads[kind].part(kind) if kind in model.heads else kind)().item()
