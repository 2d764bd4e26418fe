"""Encoded bytes to a uint8 image, by one definition with two ways to compute it.

Definition (``decode_with_pil``): the first frame, turned upright as its EXIF says, 16 bits cut to 8 by a shift, put on white where transparent, RGB.
Plain JPEG and WebP go through torchvision's decoders, up to twice as fast; they return the same bits (tests/test_data_decode.py). PNG does not:
on a damaged one torchvision 0.29 ends the process with a segmentation fault, and on an intact one it is no faster.
Anything that cannot be decoded raises BadImage and nothing else.
"""

import importlib.machinery
import importlib.util
import io
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from protoclip_scale.data.headers import read_header

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")  # no format that runs a program or follows a path
RGB = 3  # torchvision.io.ImageReadMode.RGB
EXTENSIONS = ("image_stable", "image")  # torchvision's library of decoders since 0.29, and before

Decoder = Callable[[torch.Tensor], torch.Tensor]


def extension_decoders() -> dict[str, Decoder] | None:
    """torchvision's decoders out of its image library, without importing torchvision: that takes 5 s, its models bring torch's compiler.

    The operators are the ones torchvision.io calls, and loading the library again, before or after, does nothing. None if they are not found.
    """
    folder = Path(importlib.util.find_spec("torchvision").submodule_search_locations[0])
    paths = [folder / (name + suffix) for name in EXTENSIONS for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    try:
        torch.ops.load_library(next(path for path in paths if path.exists()))
        jpeg, webp = torch.ops.image.decode_jpeg.default, torch.ops.image.decode_webp.default
    except (StopIteration, OSError, AttributeError):
        return None
    return {"jpeg": lambda encoded: jpeg(encoded, RGB), "webp": lambda encoded: webp(encoded, RGB)}


def public_decoders() -> dict[str, Decoder]:
    """The same by torchvision's public functions, those that it has: 0.29 announces that they will go. Without one, PIL decodes."""
    from torchvision import io

    functions = {"jpeg": getattr(io, "decode_jpeg", None), "webp": getattr(io, "decode_webp", None)}
    return {kind: partial(function, mode=io.ImageReadMode.RGB) for kind, function in functions.items() if function}


TORCHVISION_DECODERS = extension_decoders() or public_decoders()


class BadImage(Exception):
    """The bytes are not an image that can be used; the message is the reason."""


class Limits(NamedTuple):
    """What is refused unread."""

    max_pixels: int = 100_000_000
    max_bytes: int = 50_000_000


def decode_image(data: bytes | None, limits: Limits = Limits()) -> torch.Tensor:  # noqa: B008 (a tuple)
    """uint8 [3, H, W]. Raises BadImage: no bytes, over a limit (by the header, before decoding), truncated, corrupt or not an image.

    About 0.1 ms for a 72 px WebP; memory is 3 bytes a pixel, about 10 on the PIL path.
    """
    if data is None:
        raise BadImage("no image: its file or member is missing, unreadable or over data.max_bytes")
    if not data:
        raise BadImage("zero bytes")
    if len(data) > limits.max_bytes:
        raise BadImage(f"{len(data)} bytes, more than data.max_bytes {limits.max_bytes}")
    header = read_header(data)
    if header is not None:
        _check_pixels(header.width, header.height, limits)
        decoder = TORCHVISION_DECODERS.get(header.kind)
        if header.plain and decoder:
            try:
                return decoder(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            except RuntimeError:
                pass  # the reference decides what is wrong with it
    return decode_with_pil(data, limits)


def problem_of(data: bytes | None, limits: Limits = Limits()) -> str | None:  # noqa: B008 (a tuple)
    """Why encoded bytes cannot be used; None if they can."""
    try:
        decode_image(data, limits)
    except BadImage as error:
        return str(error)
    return None


def decode_with_pil(data: bytes, limits: Limits = Limits()) -> torch.Tensor:  # noqa: B008 (a tuple)
    """The definition; see ``decode_image``. Pillow itself refuses more than 179 million pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_pixels(*image.size, limits)
                image.load()
                return pixels_of(image)
    except (BadImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"too many pixels: {error}") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise BadImage(f"truncated or corrupt: {error}") from None


def pixels_of(image: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W] of an opened image: upright, its first frame, on white."""
    return torch.from_numpy(np.array(_opaque_rgb(_upright(image)))).permute(2, 0, 1)


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise BadImage(f"{width} x {height} pixels, more than data.max_pixels {limits.max_pixels}")
    if not width or not height:
        raise BadImage("no pixels")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata do not make the pixels bad
        return image


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        pixels = np.clip(np.asarray(image, dtype=np.int32), 0, 65535)
        gray = (pixels >> 8).astype(np.uint8)
        if isinstance(image.info.get("transparency"), int):
            gray[pixels == image.info["transparency"]] = 255
        return Image.fromarray(gray).convert("RGB")
    if image.mode == "F":
        raise BadImage("floating-point pixels")
    if image.has_transparency_data:
        colors = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")
    return image.convert("RGB")
