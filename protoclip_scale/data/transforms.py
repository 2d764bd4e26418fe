"""Crops and augmentations on uint8 images; every parameter is drawn from the generator given, none from torch.

Resizing is bicubic with antialiasing. Definitions: methods 1.3 (clip) and 6.5 (protoclip_light, the reference's protoclip-light-augmentation).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torchvision.transforms.v2 import functional

NORMALIZATION = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
MAX_ASPECT = 8  # longer images lose their ends before they are resized: only the middle square is kept anyway, and a 60000 x 1 image would need gigabytes

Augmentation = Callable[[torch.Tensor, int, np.random.Generator], torch.Tensor]


def normalize(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 [B, 3, H, W] on any device -> float32 (x / 255 - mean) / std."""
    mean_C11 = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    std_C11 = torch.tensor(std, device=images.device).view(-1, 1, 1)
    return (images.float() / 255 - mean_C11) / std_C11


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [3, H, W] -> uint8 [3, height, width]."""
    if image.shape[1:] == (height, width):
        return image
    return torch.nn.functional.interpolate(image[None], size=(height, width), mode="bicubic", antialias=True)[0]


def center_crop(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The middle of an image at least that large; odd remainders are rounded as torchvision does."""
    top, left = round((image.shape[1] - height) / 2), round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]


def eval_transform(image: torch.Tensor, size: int) -> torch.Tensor:
    """Shorter side to ``size``, then the middle square: uint8 [3, size, size]."""
    shorter = min(image.shape[1:])
    image = center_crop(image, min(image.shape[1], MAX_ASPECT * shorter), min(image.shape[2], MAX_ASPECT * shorter))
    height, width = image.shape[1:]
    scaled = (size, size * width // height) if height <= width else (size * height // width, size)
    return center_crop(resize(image, *scaled), size, size)


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


def random_resized_crop(image: torch.Tensor, size: int, scale: tuple[float, float], rng: np.random.Generator) -> torch.Tensor:
    """uint8 [3, size, size]."""
    top, left, height, width = draw_crop(image.shape[1], image.shape[2], scale, rng)
    return resize(image[:, top : top + height, left : left + width], size, size)


def gaussian_blur(image: torch.Tensor, kernel: int, sigma: float) -> torch.Tensor:
    """torchvision's gaussian_blur (reflected borders), as two products with banded matrices: 8 times faster on a CPU at 72 and 224 px."""
    offsets = torch.arange(kernel) - kernel // 2
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum()

    def band(size: int) -> torch.Tensor:
        taps = (torch.arange(size)[:, None] + offsets).abs()
        taps = torch.where(taps >= size, 2 * size - 2 - taps, taps)
        return torch.zeros(size, size).scatter_add_(1, taps, weights.expand(size, kernel))

    height, width = image.shape[1:]
    return (band(height) @ image.float() @ band(width).T).round().clamp(0, 255).to(torch.uint8)


def color_jitter(image: torch.Tensor, strength: float, hue: float, rng: np.random.Generator) -> torch.Tensor:
    """Brightness, contrast and saturation times U(1 - strength, 1 + strength), hue shifted by U(-hue, hue) turns, in random order."""
    factors = [float(rng.uniform(max(0.0, 1 - strength), 1 + strength)) for _ in range(3)] + [float(rng.uniform(-hue, hue))]
    adjustments = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue)
    for which in rng.permutation(4):
        image = adjustments[which](image, factors[which])
    return image


def clip_augmentation(image: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """RandomResizedCrop of 90-100% of the area."""
    return random_resized_crop(image, size, (0.9, 1.0), rng)


def protoclip_light_augmentation(image: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """Crop of 50-100%, flip 0.5, jitter (0.8, 0.8, 0.8, 0.2) with 0.2, grayscale 0.2, blur (kernel 21, sigma U(0.1, 2)) 0.2."""
    image = random_resized_crop(image, size, (0.5, 1.0), rng).contiguous()
    flip, jitter, gray, blur = rng.random(4) < (0.5, 0.2, 0.2, 0.2)
    if flip:
        image = image.flip(-1)
    if jitter:
        image = color_jitter(image, 0.8, 0.2, rng)
    if gray:
        image = functional.rgb_to_grayscale(image, num_output_channels=3)
    if blur:
        kernel = min(21, size - 1 + size % 2)  # reflected borders must fit a small image
        image = gaussian_blur(image, kernel, float(rng.uniform(0.1, 2.0)))
    return image


def no_augmentation(image: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """The evaluation transform; draws nothing."""
    return eval_transform(image, size)


AUGMENTATIONS: dict[str, Augmentation] = {
    "clip": clip_augmentation,
    "protoclip_light": protoclip_light_augmentation,
    "none": no_augmentation,
}


def augment(name: str) -> Augmentation:
    """The function (uint8 [3, H, W], size, generator) -> uint8 [3, size, size] of ``data.augmentation``."""
    return AUGMENTATIONS[name]
