"""Who is compared: functions that yield batches of images (and tokens), each over the same rows, in one process and one thread."""

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import webdataset
from PIL import Image, ImageFilter
from torchvision import transforms as tv

from data_parts.pictures import Pictures, write_parquet, write_tar
from protoclip_scale.data.batches import EpisodeBatches
from protoclip_scale.data.decode import decode_image
from protoclip_scale.data.index import index_of, open_readers
from protoclip_scale.data.plan import Plan
from protoclip_scale.data.randomness import generator
from protoclip_scale.data.spool import Spool
from protoclip_scale.data.tokenizers import ClipTokenizer
from protoclip_scale.data.transforms import augment
from protoclip_scale.recipe import schema

BATCH = 64
CONTEXT = 77
BICUBIC = tv.InterpolationMode.BICUBIC

Contestant = Callable[[], Iterator[torch.Tensor]]


class PillowBlur:
    """SLIP's and MoCo's blur."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(np.random.uniform(0.1, 2.0))))


def _pillow(scale: tuple[float, float], interpolation, *operations) -> Callable:
    normalization = tv.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    return lambda size: tv.Compose([tv.RandomResizedCrop(size, scale, interpolation=interpolation), *operations, tv.ToTensor(), normalization])


def _simclr(scale: tuple[float, float]) -> Callable:
    jitter, blur = tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), tv.RandomApply([PillowBlur()], 0.5)
    return _pillow(scale, tv.InterpolationMode.BILINEAR, jitter, tv.RandomGrayscale(0.2), blur, tv.RandomHorizontalFlip())


# The definitions of ``data.augmentation`` on PIL images, as the original repositories write them; clip is open_clip's own.
PILLOW: dict[str, Callable] = {
    "clip": lambda size: open_clip.image_transform(size, is_train=True),
    "protoclip_light": _pillow(
        (0.5, 1.0),
        BICUBIC,
        tv.RandomHorizontalFlip(),
        tv.RandomApply([tv.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.2),
        tv.RandomGrayscale(0.2),
        tv.RandomApply([tv.GaussianBlur(21, (0.1, 2.0))], 0.2),
    ),
    "slip": _pillow((0.5, 1.0), tv.InterpolationMode.BILINEAR),
    "slip_ssl": _simclr((0.08, 1.0)),
    "declip": _simclr((0.2, 1.0)),
}


class Way(NamedTuple):
    """From encoded bytes to a picture, from pictures to a batch, and from captions to token ids."""

    image: Callable[[bytes], torch.Tensor]
    batch: Callable[[list[torch.Tensor]], torch.Tensor]
    tokens: Callable[[list[str]], torch.Tensor]


def ours(augmentation: str, size: int) -> Way:
    """uint8 in channels_last memory, random draws by row, as ``EpisodeBatches`` makes them."""
    tokenizer, drawn, numbers = ClipTokenizer(CONTEXT), augment(augmentation), iter(range(1 << 62))

    def image(data: bytes) -> torch.Tensor:
        return drawn(decode_image(data), size, generator(0, "augmentation", 0, next(numbers), 0))

    def batch(images: list[torch.Tensor]) -> torch.Tensor:
        stacked = torch.empty((len(images), 3, size, size), dtype=torch.uint8, memory_format=torch.channels_last)
        for place, each in zip(stacked, images, strict=True):
            place.copy_(each)
        return stacked

    return Way(image, batch, lambda texts: tokenizer(texts).ids)


def pillow(augmentation: str, size: int) -> Way:
    """As open_clip does it: PIL throughout, normalised float32."""
    transform, tokenizer = PILLOW[augmentation](size), open_clip.tokenizer.SimpleTokenizer(context_length=CONTEXT)
    return Way(lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB")), torch.stack, tokenizer)


def from_memory(pictures: Pictures, way: Way, tokens: bool) -> Iterator[torch.Tensor]:
    """Without any reading."""
    for first in range(0, len(pictures.images), BATCH):
        some = slice(first, first + BATCH)
        images = way.batch([way.image(data) for data in pictures.images[some]])
        if tokens:
            way.tokens(pictures.captions[some])
        yield images


def from_tar(path: Path, suffix: str, way: Way, tokens: bool) -> Iterator[torch.Tensor]:
    """The webdataset package reading a local shard: its own pipeline around a way's functions."""
    dataset = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    dataset = dataset.map_dict(**{suffix: way.image, "txt": bytes.decode}).to_tuple(suffix, "txt")
    for images, texts in dataset.batched(BATCH, collation_fn=lambda rows: tuple(zip(*rows, strict=True))):
        stacked = way.batch(list(images))
        if tokens:
            way.tokens(list(texts))
        yield stacked


def from_spool(pictures: Pictures, folder: Path, augmentation: str, size: int) -> EpisodeBatches:
    """Our loader as training uses it, without its processes: an episode in the spool, batches with tokens."""
    write_parquet(pictures, folder / "rows.parquet")
    count = len(pictures.images) // BATCH * BATCH
    data = schema.Data(
        root=str(folder),
        sources=[{"files": "rows.parquet"}],
        plan={"episode_size": count, "lanes": 1, "global_batch": BATCH},
        augmentation=augmentation,
    )
    readers = open_readers(data)
    episode = Plan(index_of(readers), data.plan).episode(0)
    spool = Spool(folder / "spool", "benchmark")
    spool.fill(episode, 0, [0], readers)
    return EpisodeBatches(data, size, ClipTokenizer(CONTEXT), episode, spool, [0])


def contestants(pictures: Pictures, folder: Path, augmentation: str, size: int) -> dict[str, Contestant]:
    """All of them by name, on one set of pictures; ``folder`` holds their files."""
    folder.mkdir(parents=True)
    tar = folder / "rows.tar"
    write_tar(pictures, tar)
    spooled = from_spool(pictures, folder, augmentation, size)
    found: dict[str, Contestant] = {}
    for suffix, tokens in (("", False), (" + tokens", True)):
        mine, theirs = ours(augmentation, size), pillow(augmentation, size)
        found["ours" + suffix] = partial(from_memory, pictures, mine, tokens)
        if tokens:
            found["ours, loader + tokens"] = lambda: (spooled[step].images for step in range(len(spooled)))
        found["PIL" + suffix] = partial(from_memory, pictures, theirs, tokens)
        found["webdataset, PIL" + suffix] = partial(from_tar, tar, pictures.suffix, theirs, tokens)
        found["webdataset, ours" + suffix] = partial(from_tar, tar, pictures.suffix, mine, tokens)
    return found
