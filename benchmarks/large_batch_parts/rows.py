"""Rows of a corpus as one batch in memory: small pictures, and captions as token ids."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from protoclip_scale.data.batches import Batch
from protoclip_scale.data.decode import Limits, decode_image
from protoclip_scale.data.tokenizers import ClipTokenizer, Tokens
from protoclip_scale.data.transforms import eval_transform
from protoclip_scale.errors import UserError

LIMITS = Limits(10**8, 10**8)


def _columns(corpus: Path, names: list[str], num_rows: int) -> list[dict]:
    """A seeded draw of rows of a parquet file, or of the train*.parquet files of a folder; the same ones again where they are fewer."""
    files = sorted(corpus.glob("train*.parquet")) if corpus.is_dir() else [corpus]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{corpus} is neither a parquet file nor a folder with train*.parquet; name one with --corpus")
    table = pa.concat_tables([pq.read_table(file, columns=names) for file in files])
    return table.take(np.resize(np.random.default_rng(0).permutation(len(table)), num_rows)).to_pylist()


def read_captions(corpus: Path, num_rows: int, context_length: int) -> Tokens:
    return ClipTokenizer(context_length)([row["caption"][0] for row in _columns(corpus, ["caption"], num_rows)])


def read_batch(corpus: Path, num_rows: int, image_size: int, context_length: int) -> Batch:
    """All rows as the local rows of one rank."""
    rows = _columns(corpus, ["image", "caption"], num_rows)
    pixels: dict[bytes, torch.Tensor] = {}
    for row in rows:
        encoded = row["image"]["bytes"]
        if encoded not in pixels:
            pixels[encoded] = eval_transform(decode_image(encoded, LIMITS), image_size)
    images = torch.stack([pixels[row["image"]["bytes"]] for row in rows]).contiguous(memory_format=torch.channels_last)
    tokens = ClipTokenizer(context_length)([row["caption"][0] for row in rows])
    numbers = torch.from_numpy(np.arange(num_rows))
    return Batch(0, images, tokens.ids, tokens.lengths, numbers, numbers, numbers)
