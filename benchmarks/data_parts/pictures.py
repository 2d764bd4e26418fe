"""What is read: rows of a corpus, and JPEGs of 256 pixels that are like photographs in what they cost."""

import io
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from protoclip_scale.data.headers import read_header
from protoclip_scale.errors import UserError

WORDS = ["a", "photo", "of", "the", "red", "small", "old", "house", "near", "river", "with", "two", "people", "and", "their", "dog", "in", "front", "bridge", "at", "night", "market", "street", "view", "from", "hill"]


class Pictures(NamedTuple):
    """Encoded images with one caption each."""

    name: str
    images: list[bytes]
    captions: list[str]

    @property
    def suffix(self) -> str:
        return {"jpeg": "jpg", "webp": "webp"}[read_header(self.images[0]).kind]

    def describe(self) -> str:
        kilobytes = np.mean([len(image) for image in self.images]) / 1000
        header = read_header(self.images[0])
        return f"{self.name}: {len(self.images)} {header.kind} images, the first of {header.width} x {header.height} pixels, {kilobytes:.1f} kB on average"


def from_corpus(path: Path, count: int) -> Pictures:
    """``count`` JPEG or WebP images and first captions, evenly spread over a parquet file, or over the train shards of a folder."""
    files = sorted(path.glob("train*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"--corpus {path}: no parquet file there; name a file, or a folder with train*.parquet")
    table = pa.concat_tables([pq.read_table(file, columns=["image", "caption"]) for file in files])
    rows = table.take(np.linspace(0, table.num_rows - 1, min(count, table.num_rows)).astype(np.int64)).to_pylist()
    rows = [row for row in rows if row["caption"] and read_header(row["image"]["bytes"] or b"")]
    if not rows:
        raise UserError(f"--corpus {path}: none of the rows looked at has a caption and a JPEG or WebP image")
    return Pictures(path.stem, [row["image"]["bytes"] for row in rows], [row["caption"][0] for row in rows])


def like_photographs(count: int, seed: int = 0) -> Pictures:
    """JPEGs of quality 90 with a short side of 256 pixels, two in three landscape, made from noise with the spectrum of photographs.

    Amplitudes fall with frequency as its power 1.5, and the colour differences have a fifth of the brightness's contrast: some 28 kB each at
    341 x 256, which is what photographs of that size take. The bytes are a function of the seed (and of the JPEG encoder).
    """
    rng = np.random.default_rng(seed)
    images, captions = [], []
    for number in range(count):
        height, width = (341, 256) if number % 3 == 2 else (256, 341)
        brightness = _noise(height, width, 1.5, rng) * 60 + 120
        red, blue = (_noise(height, width, 1.5, rng) * 12 for _ in range(2))
        pixels = np.stack([brightness + red, brightness - 0.5 * red - 0.2 * blue, brightness + blue], axis=-1)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        images.append(file.getvalue())
        captions.append(" ".join(rng.choice(WORDS, int(rng.integers(5, 20)))))
    return Pictures("photo-like 256 px", images, captions)


def _noise(height: int, width: int, power: float, rng: np.random.Generator) -> np.ndarray:
    """[height, width] of mean 0 and deviation 1, amplitudes falling as frequency ** -power."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency**power, s=(height, width))
    return (noise - noise.mean()) / noise.std()


def write_tar(pictures: Pictures, path: Path) -> None:
    """A shard in webdataset's layout."""
    with tarfile.open(path, "w") as tar:
        for number, (image, caption) in enumerate(zip(pictures.images, pictures.captions, strict=True)):
            for suffix, content in ((pictures.suffix, image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_parquet(pictures: Pictures, path: Path) -> None:
    """A shard for our own reader."""
    table = pa.table({"image": pa.array(pictures.images, pa.binary()), "caption": pictures.captions})
    pq.write_table(table, path, row_group_size=256, compression="none")
