"""Decoded evaluation images, kept in memory between evaluations as far as a budget goes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from protoclip_scale.data.decode import BadImage, Limits, decode_image
from protoclip_scale.data.transforms import center_crop, eval_transform
from protoclip_scale.data.transforms import resize as resize_to
from protoclip_scale.evaluation.sets import HeldOutRows
from protoclip_scale.models.dual_encoder import NORMALIZATION
from protoclip_scale.recipe import schema

BUDGET_BYTES = 1_000_000_000
NUM_DECODING_THREADS = 4


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its images: the shorter side to ``resize`` pixels (``squash``: both sides, whatever the shape), then the middle square of ``size``.
    ``mean`` and ``std`` are told here and applied by the model."""

    size: int
    resize: int | None = None  # size, if not told otherwise
    interpolation: str = "bicubic"
    squash: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def of(cls, value: "int | Preprocessing") -> Self:
        """A size alone stands for our own: the shorter side to it, bicubic."""
        return value if isinstance(value, cls) else cls(value)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"resize": self.resize or self.size}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [3, H, W] -> uint8 [3, size, size]."""
        resize = self.resize or self.size
        if self.squash:
            return eval_transform(resize_to(image, resize, resize, self.interpolation), self.size)
        return center_crop(eval_transform(image, resize, self.interpolation, square=False), self.size, self.size)


def own_preprocessing(image: schema.ImageTower) -> Preprocessing:
    """What the models of recipes get."""
    mean, std = NORMALIZATION[image.normalization]
    return Preprocessing(image.size, mean=tuple(mean), std=tuple(std))


class PixelStore:
    """uint8 images of held-out sets, [3, size, size] each: decoded once where they fit, otherwise each time they are asked for.

    A set is kept if all its images and those of the sets kept before fit into ``budget_bytes``, in each process; of a kept set a process
    holds only the rows that it was asked for.
    """

    def __init__(self, preprocessing: int | Preprocessing, limits: Limits, budget_bytes: int = BUDGET_BYTES):
        self.preprocessing = Preprocessing.of(preprocessing)
        self.size = self.preprocessing.size
        self.limits = limits
        self.bytes_left = budget_bytes
        self._kept: dict[HeldOutRows, dict[int, torch.Tensor | None] | None] = {}

    def pixels_of(self, rows: HeldOutRows) -> Callable[[range], tuple[torch.Tensor, torch.Tensor]]:
        """A function from a range of a set's rows to ``(pixels uint8 [b, 3, size, size], decodable bool [b])``; undecodable ones are black."""
        if rows not in self._kept:
            num_bytes = len(rows) * 3 * self.size**2
            self._kept[rows] = {} if num_bytes <= self.bytes_left else None
            if num_bytes <= self.bytes_left:
                self.bytes_left -= num_bytes
        kept = self._kept[rows]

        def pixels(places: range) -> tuple[torch.Tensor, torch.Tensor]:
            if kept is None:
                return self._batch(self._decode(rows.image_bytes(places)))
            missing = [place for place in places if place not in kept]
            kept.update(zip(missing, self._decode(rows.image_bytes(missing)), strict=True))
            return self._batch([kept[place] for place in places])

        return pixels

    def _batch(self, images: list[torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
        decodable = torch.tensor([image is not None for image in images])
        black = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        return torch.stack([black if image is None else image for image in images]), decodable

    def _decode(self, encoded: list[bytes]) -> list[torch.Tensor | None]:
        with ThreadPoolExecutor(NUM_DECODING_THREADS) as pool:
            return list(pool.map(self._decode_one, encoded))

    def _decode_one(self, encoded: bytes) -> torch.Tensor | None:
        try:
            return self.preprocessing(decode_image(encoded, self.limits))
        except BadImage:
            return None
