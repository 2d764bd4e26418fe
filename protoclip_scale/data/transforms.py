"""Crops and augmentations on uint8 images; every parameter is drawn from the generator given, none from torch.

Images are views of channels_last memory, as decoders return them: torch's uint8 kernels are fastest on it, and batches keep it (see ``normalize``).
Resizing is antialiased. Definitions: methods 1.3 (clip), 6.5 (protoclip_light, the reference's protoclip-light-augmentation), 2.1 (slip, slip_ssl)
and 3.1 (declip).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from protoclip_scale.data import color

NORMALIZATION = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
MAX_ASPECT = 8  # longer images lose their ends before they are resized: only the middle square is kept anyway, and a 60000 x 1 image would need gigabytes

Augmentation = Callable[[torch.Tensor, int, np.random.Generator], torch.Tensor]


@functools.lru_cache(maxsize=16)
def _row_levels(values: tuple[float, ...], width: int, device: torch.device) -> torch.Tensor:
    """Channel values in levels, repeated over a row of pixels. Kept, because copying them to a GPU at every step would wait for all work queued there."""
    return 255 * torch.tensor(values, device=device).repeat(width)


def normalize(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 [B, 3, H, W] on any device -> float32 (x / 255 - mean) / std in channels_last memory.

    Works on rows of W x 3 numbers: over an innermost dimension of 3, broadcasting is 5 times slower on a CPU. 0.05 ms an image of 224 px there.
    """
    batch, channels, height, width = images.shape
    rows = images.permute(0, 2, 3, 1).reshape(batch, height, width * channels).float()  # a view of channels_last batches
    rows = rows.sub_(_row_levels(tuple(mean), width, images.device)).div_(_row_levels(tuple(std), width, images.device))
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def resize(image: torch.Tensor, height: int, width: int, interpolation: str = "bicubic") -> torch.Tensor:
    """uint8 [3, H, W] -> uint8 [3, height, width], channels_last."""
    if image.shape[1:] == (height, width):
        return image
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # not image[None]: its strides would not be known for channels_last, and take half as long again
    batch = batch.contiguous(memory_format=torch.channels_last)
    return torch.nn.functional.interpolate(batch, size=(height, width), mode=interpolation, antialias=True)[0]


def center_crop(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The middle of an image at least that large; odd remainders are rounded as torchvision does."""
    top, left = round((image.shape[1] - height) / 2), round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]


def eval_transform(image: torch.Tensor, size: int, interpolation: str = "bicubic", square: bool = True) -> torch.Tensor:
    """Shorter side to ``size``, then the middle square: uint8 [3, size, size]; without ``square`` the whole of what was resized."""
    shorter = min(image.shape[1:])
    image = center_crop(image, min(image.shape[1], MAX_ASPECT * shorter), min(image.shape[2], MAX_ASPECT * shorter))
    height, width = image.shape[1:]
    scaled = (size, size * width // height) if height <= width else (size * height // width, size)
    resized = resize(image, *scaled, interpolation)
    return center_crop(resized, size, size) if square else resized


def draw_crop(height: int, width: int, scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of torchvision's RandomResizedCrop: area share U(scale), log aspect U(log 3/4, log 4/3), ten tries, else the middle."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return int(rng.integers(height - crop_height + 1)), int(rng.integers(width - crop_width + 1)), crop_height, crop_width
    crop_width = min(width, max(1, round(height * 4 / 3)))
    crop_height = min(height, max(1, round(width * 4 / 3)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def random_resized_crop(
    image: torch.Tensor, size: int, scale: tuple[float, float], rng: np.random.Generator, interpolation: str = "bicubic"
) -> torch.Tensor:
    """uint8 [3, size, size]."""
    top, left, height, width = draw_crop(image.shape[1], image.shape[2], scale, rng)
    return resize(image[:, top : top + height, left : left + width], size, size, interpolation)


def color_jitter(levels: np.ndarray, strength: float, hue: float, rng: np.random.Generator) -> None:
    """Brightness, contrast and saturation times U(1 - strength, 1 + strength), hue shifted by U(-hue, hue) turns, in random order; in place."""
    factors = [float(rng.uniform(max(0.0, 1 - strength), 1 + strength)) for _ in range(3)] + [float(rng.uniform(-hue, hue))]
    adjustments = (color.brightness, color.contrast, color.saturation, color.hue)
    for which in rng.permutation(4):
        adjustments[which](levels, factors[which])


@dataclass(frozen=True)
class RandomView:
    """A random crop, perhaps mirrored, recoloured and blurred, in this order; the original definitions that mirror last mean the same, since
    mirroring commutes with all that follows it."""

    scale: tuple[float, float]  # share of the area that the crop keeps
    interpolation: str = "bicubic"
    flip: float = 0.0  # probabilities, independent of each other
    jitter: float = 0.0
    gray: float = 0.0
    blur: float = 0.0
    strength: float = 0.0  # of the jitter's brightness, contrast and saturation
    hue: float = 0.0  # of the jitter, in turns
    sigma: tuple[float, float] = (0.1, 2.0)  # of the blur, in pixels
    blur_like: str = "pillow"  # or torchvision, see ``color.gaussian_blur``

    def __call__(self, image: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
        image = random_resized_crop(image, size, self.scale, rng, self.interpolation)
        flip, jitter, gray, blur = rng.random(4) < (self.flip, self.jitter, self.gray, self.blur)
        if flip:
            image = image.flip(-1)
        if jitter or gray:
            levels = color.to_levels(image)
            if jitter:
                color_jitter(levels, self.strength, self.hue, rng)
            if gray:
                color.grayscale(levels)
            image = color.to_image(levels)
        if blur:
            image = color.gaussian_blur(image, float(rng.uniform(*self.sigma)), self.blur_like)
        return image


def no_augmentation(image: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """The evaluation transform; draws nothing."""
    return eval_transform(image, size)


SIMCLR = {"interpolation": "bilinear", "flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.5, "strength": 0.4, "hue": 0.1}

AUGMENTATIONS: dict[str, Augmentation] = {
    "clip": RandomView((0.9, 1.0)),
    "protoclip_light": RandomView((0.5, 1.0), flip=0.5, jitter=0.2, gray=0.2, blur=0.2, strength=0.8, hue=0.2, blur_like="torchvision"),
    "slip": RandomView((0.5, 1.0), interpolation="bilinear"),
    "slip_ssl": RandomView((0.08, 1.0), **SIMCLR),
    "declip": RandomView((0.2, 1.0), **SIMCLR),
    "none": no_augmentation,
}


def augment(name: str) -> Augmentation:
    """The function (uint8 [3, H, W], size, generator) -> uint8 [3, size, size] of ``data.augmentation``."""
    return AUGMENTATIONS[name]
