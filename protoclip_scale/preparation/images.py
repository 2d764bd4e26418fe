"""One encoded image in, one encoded image of training size out: decoded by the package's definition, made smaller, encoded again."""

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from protoclip_scale.data.decode import BadImage, Limits, decode_image
from protoclip_scale.data.headers import read_header
from protoclip_scale.data.transforms import resize


class Encoder(NamedTuple):
    """Pillow's name and settings of a format, and the longest side that it can hold."""

    name: str
    settings: dict
    longest_side: int


ENCODERS = {"jpeg": Encoder("JPEG", {}, 65_500), "webp": Encoder("WEBP", {"method": 4}, 16_383)}


class ImageSettings(NamedTuple):
    """short_side: pixels; larger images are made smaller, none larger. keep_small: bytes that need no change are kept as they are."""

    short_side: int = 256
    format: str = "jpeg"
    quality: int = 90
    keep_small: bool = True


class PreparedImage(NamedTuple):
    """encoded: what is written. pixels: uint8 [H, W, 3], what was encoded (before the loss of a JPEG or WebP encoder)."""

    encoded: bytes
    pixels: np.ndarray


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the shorter side at most ``short_side``, in the same ratio to the nearest pixel."""
    if min(height, width) <= short_side:
        return height, width
    return (short_side, round(short_side * width / height)) if height <= width else (round(short_side * height / width), short_side)


def load_small(data: bytes, short_side: int, limits: Limits = Limits()) -> tuple[np.ndarray, bool]:  # noqa: B008 (a tuple)
    """(uint8 [H, W, 3] at most ``short_side`` on its shorter side, whether it was made smaller). BadImage: not decodable, or over a limit."""
    image = decode_image(data, limits)
    size = scaled_size(*image.shape[1:], short_side)
    return np.ascontiguousarray(resize(image, *size).permute(1, 2, 0).numpy()), size != tuple(image.shape[1:])


def prepare_image(data: bytes, settings: ImageSettings, limits: Limits = Limits()) -> PreparedImage:  # noqa: B008 (a tuple)
    """Decode (upright, on white, first frame, 8 bits), resize with antialiasing, encode. BadImage: not decodable, over a limit, or too long to encode.

    With ``keep_small`` the bytes of an image that is small enough, plain and already of the format come back unchanged: no second loss.
    """
    pixels, was_larger = load_small(data, settings.short_side, limits)
    height, width, _ = pixels.shape
    encoder = ENCODERS[settings.format]
    if max(height, width) > encoder.longest_side:
        raise BadImage(f"too long for {encoder.name}: {width} x {height} pixels after resizing, at most {encoder.longest_side}")
    header = read_header(data)
    if settings.keep_small and not was_larger and header is not None and header.plain and header.kind == settings.format:
        return PreparedImage(data, pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, encoder.name, quality=settings.quality, **encoder.settings)
    return PreparedImage(buffer.getvalue(), pixels)


def use_one_thread() -> None:
    """For worker processes: each takes one core, and no thread of torch's competes with the others."""
    torch.set_num_threads(1)
