"""What a sample of a source's rows says about its images: sizes, formats, what cannot be decoded, what repeats."""

import hashlib
import io
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from protoclip_scale.data.caption_statistics import CaptionStatistics
from protoclip_scale.data.decode import FORMATS, BadImage, Limits, decode_image
from protoclip_scale.data.headers import read_header
from protoclip_scale.data.sources import BlockReader
from protoclip_scale.report.plain import count, number, percent

NOT_KNOWN = "not known"
MEASURES = ("least", "5%", "median", "95%", "most")  # columns of SourceStatistics.image_table


class ImageFacts(NamedTuple):
    """Of one encoded image. kind: format and mode as Pillow names them. fast: a plain JPEG or WebP, which is decoded faster. problem: why it cannot be used, or None."""

    num_bytes: int
    kind: str
    width: int
    height: int
    fast: bool
    problem: str | None
    digest: bytes


def image_facts(encoded: bytes, limits: Limits) -> ImageFacts:
    """Decodes the image. Sizes are those after turning it upright; 0 if they are not known."""
    kind, width, height, problem = NOT_KNOWN, 0, 0, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                kind, (width, height) = f"{image.format} {image.mode}", image.size
    except Exception:  # the decoder below says what is wrong with it
        pass
    try:
        height, width = decode_image(encoded, limits).shape[1:]
    except BadImage as error:
        problem = str(error)
    header = read_header(encoded)
    return ImageFacts(len(encoded), kind, width, height, header is not None and header.plain, problem, hashlib.blake2b(encoded, digest_size=16).digest())


class Percentiles(NamedTuple):
    """Of one number per image."""

    least: float
    percentile_5: float
    median: float
    percentile_95: float
    most: float


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """None for no values."""
    return Percentiles(*(float(value) for value in np.quantile(values, [0, 0.05, 0.5, 0.95, 1], method="nearest"))) if len(values) else None


@dataclass(frozen=True)
class SourceStatistics:
    """Of one source: what it holds in all, and what a sample of it looks like."""

    name: str
    layout: str
    files: int
    blocks: int
    rows: int
    bytes: int  # of the used columns, about
    sampled: int
    width: Percentiles | None  # these five of decodable images, in pixels
    height: Percentiles | None
    shorter_side: Percentiles | None
    aspect: Percentiles | None  # longer side by shorter
    encoded_bytes: Percentiles | None
    kinds: dict[str, int]  # images by format and mode, the commonest first
    fast_share: float  # of the decodable ones
    undecodable: dict[str, int]  # images by reason, with n for numbers
    examples: dict[str, str]  # of each reason: where one such image lies
    repeated_images: int  # sampled images whose bytes an earlier one has
    captions: CaptionStatistics

    def totals(self) -> list[tuple[str, str]]:
        """(label, text) of what the source holds."""
        return [
            ("layout", self.layout),
            ("files", count(self.files)),
            ("blocks", count(self.blocks)),
            ("rows", count(self.rows)),
            ("bytes", f"about {number(self.bytes / 1e6, 3)} MB in the used columns"),
        ]

    def image_table(self) -> list[tuple[str, ...]]:
        """(label, least, 5%, median, 95%, most) of what is measured in each decodable image."""
        measured = {"width": self.width, "height": self.height, "shorter side": self.shorter_side, "longer / shorter": self.aspect, "encoded kB": self.encoded_bytes}
        scale = {"encoded kB": 1000}
        return [(label, *(number(value / scale.get(label, 1), 3) for value in values)) for label, values in measured.items() if values]

    def image_facts(self) -> list[tuple[str, str]]:
        """(label, text) of the other facts about sampled images."""
        problems = [("", f"{count(times)}: {reason}; for instance {self.examples[reason]}") for reason, times in self.undecodable.items()]
        return [
            ("images sampled", count(self.sampled)),
            ("formats", ", ".join(f"{kind} {percent(times / self.sampled)}" for kind, times in self.kinds.items())),
            ("decoded the fast way", percent(self.fast_share)),
            ("undecodable", f"{count(sum(self.undecodable.values()))}, {percent(sum(self.undecodable.values()) / max(1, self.sampled), 2)}"),
            *problems,
            ("same bytes as another", f"{count(self.repeated_images)} of the sample"),
        ]


def source_statistics(reader: BlockReader, facts: Sequence[ImageFacts], places: Sequence[str], captions: CaptionStatistics) -> SourceStatistics:
    """``facts`` and ``places`` (file and row) of the sampled rows of one source."""
    good = [each for each in facts if each.problem is None]
    reasons = [None if each.problem is None else re.sub(r"\d+", "n", each.problem) for each in facts]
    examples = {reason: place for reason, place in reversed(list(zip(reasons, places, strict=True))) if reason}
    return SourceStatistics(
        name=reader.name,
        layout=reader.layout,
        files=len(reader.files),
        blocks=len(reader.block_rows),
        rows=int(reader.block_rows.sum()),
        bytes=int(reader.block_bytes.sum()),
        sampled=len(facts),
        width=percentiles([each.width for each in good]),
        height=percentiles([each.height for each in good]),
        shorter_side=percentiles([min(each.width, each.height) for each in good]),
        aspect=percentiles([max(each.width, each.height) / min(each.width, each.height) for each in good]),
        encoded_bytes=percentiles([each.num_bytes for each in good]),
        kinds=dict(Counter(each.kind for each in facts).most_common()),
        fast_share=sum(each.fast for each in good) / max(1, len(good)),
        undecodable=dict(Counter(reason for reason in reasons if reason).most_common()),
        examples=examples,
        repeated_images=len(facts) - len({each.digest for each in facts}),
        captions=captions,
    )
