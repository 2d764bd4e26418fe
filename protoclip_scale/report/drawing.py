"""Text and pictures for Pillow's drawings: colours, what fits into how many pixels, and how a page is saved."""

import bisect
import os
import textwrap
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
PAGE, CARD, BORDER, INK, GREY = "#f3f4f6", "#ffffff", "#d5d8de", "#1d2433", "#667085"
COLORS = {"image": "#2f6fd0", "text": "#e07b22", "teacher": "#2f9466"}  # of what a clustering is made of


def save_png(page: Image.Image, path: str | Path) -> None:
    """Written whole or not at all, by one atomic rename; missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    page.save(temporary, format="PNG", compress_level=4)  # optimize would take six times as long for 3% fewer bytes
    os.replace(temporary, path)


def drawable(text: str) -> str:
    """ASCII alone, which is what Pillow's own font has, the only font that is everywhere; letters lose their accents."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode() or ("(caption in another script)" if text else "")


def cut(text: str, draw: ImageDraw.ImageDraw, font: Font, width: float) -> str:
    """The text, its end replaced by ... if it is wider than ``width`` pixels."""
    text = drawable(text)
    if draw.textlength(text, font) <= width:
        return text
    letters = bisect.bisect_right(range(1, len(text) + 1), width, key=lambda number: draw.textlength(text[:number] + "...", font))
    return text[:letters] + "..."


def fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """The whole image on white, centred in a box; small pictures are enlarged without blur."""
    image = image.convert("RGBA")
    scale = min(width / image.width, height / image.height)
    shape = tuple(max(1, round(side * scale)) for side in image.size)
    image = image.resize(shape, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
    box = Image.new("RGBA", (width, height), "white")
    box.alpha_composite(image, ((width - shape[0]) // 2, (height - shape[1]) // 2))
    return box.convert("RGB")


def wrapped(text: str, draw: ImageDraw.ImageDraw, font: Font, width: float, lines: int) -> list[str]:
    """The text in at most so many lines of ``width`` pixels; the last is cut."""
    text = drawable(text)
    letters = max(1, int(width / max(1.0, draw.textlength(text, font)) * len(text)))
    parts = textwrap.wrap(text, letters) or [text]
    if len(parts) > lines:
        parts = [*parts[: lines - 1], " ".join(parts[lines - 1 :])]
    return [cut(part, draw, font, width) for part in parts]
