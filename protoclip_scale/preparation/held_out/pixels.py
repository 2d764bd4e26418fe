"""Images that are made: from raw pixels, or by cutting off a border; as PNG, without a loss."""

import io

import numpy as np
from PIL import Image

from protoclip_scale.data.decode import Limits, decode_image


def png(pixels: np.ndarray, max_bytes: int = 0) -> bytes:
    """uint8 [H, W] or [H, W, 3] as PNG; ``max_bytes`` is the form of other readers, whose images have no size of their own."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def without_border(encoded: bytes, border: int, limits: Limits) -> bytes:
    """An image without ``border`` pixels at each side. BadImage if it cannot be decoded."""
    image = decode_image(encoded, limits)
    return png(image[:, border : image.shape[1] - border, border : image.shape[2] - border].permute(1, 2, 0).numpy())
