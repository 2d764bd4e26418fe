"""A map of prototypes: the principal plane of each student's space, with its own clusters and those translated into it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from protoclip_scale.report.drawing import BORDER, CARD, COLORS, GREY, INK, PAGE, drawable, save_png

SCALE = 2  # drawn larger and reduced, which smooths the dots
PANEL, MARGIN, HEAD, LEGEND, INSET = 620, 18, 64, 24, 34
TITLE_SIZE, TEXT_SIZE = 18, 14
LABELLED = 12  # largest clusters of each set


@dataclass(frozen=True)
class MappedSet:
    """Prototypes [K, P] of the clustering ``name`` (image, text or teacher), its own or translated into the panel's space; the rows of each cluster [K];
    words for some of them by number."""

    name: str
    translated: bool
    centroids: np.ndarray
    sizes: np.ndarray
    words: Mapping[int, str]


def principal_plane(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coordinates [n, 2], shares of the variance [2]) of rows [n, d] on their two principal axes; each axis points to where its largest loading is positive."""
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :2]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1, 1)
    shares = variances[::-1][:2] / max(variances.sum(), np.finfo(np.float64).tiny)
    return centred @ axes, shares


def draw_map(path: str | Path, title: str, spaces: Mapping[str, Sequence[MappedSet]]) -> None:
    """Writes a PNG with one panel per space. A dot is a prototype, its area grows with its cluster; empty clusters are left out; the largest have a word.

    The plane is found by principal components (exact, the same at every drawing). What stands in one panel lies in one space, so distances in it mean
    what they mean to the loss; image and text prototypes as such lie in two spaces that nothing ties together.
    """
    width, height = 2 * MARGIN + len(spaces) * (PANEL + MARGIN) - MARGIN, 2 * MARGIN + TITLE_SIZE + HEAD + PANEL + LEGEND
    page = Image.new("RGB", (SCALE * width, SCALE * height), PAGE)
    draw = ImageDraw.Draw(page)
    draw.text((SCALE * MARGIN, SCALE * MARGIN), title, INK, ImageFont.load_default(SCALE * (TITLE_SIZE + 2)))
    for number, (space, sets) in enumerate(spaces.items()):
        _panel(draw, SCALE * (MARGIN + number * (PANEL + MARGIN)), SCALE * (MARGIN + TITLE_SIZE + HEAD), space, sets)
    save_png(page.resize((width, height), Image.Resampling.LANCZOS), path)


def _panel(draw: ImageDraw.ImageDraw, left: int, top: int, space: str, sets: Sequence[MappedSet]) -> None:
    large, small = ImageFont.load_default(SCALE * TITLE_SIZE), ImageFont.load_default(SCALE * TEXT_SIZE)
    side = SCALE * PANEL
    draw.rectangle((left, top, left + side, top + side), fill=CARD, outline=BORDER, width=SCALE)
    used = [np.flatnonzero(mapped.sizes) for mapped in sets]
    points, shares = principal_plane(np.concatenate([mapped.centroids[kept] for mapped, kept in zip(sets, used, strict=True)]))
    draw.text((left, top - SCALE * 50), space, INK, large)
    axes = ", ".join(f"axis {number + 1} {share:.0%}" for number, share in enumerate(shares))
    draw.text((left, top - SCALE * 26), f"two principal axes; share of the variance: {axes}", GREY, small)
    low, high = points.min(axis=0), points.max(axis=0)
    reach = (side - 2 * SCALE * INSET) / max(float((high - low).max()), 1e-12)
    places = np.array([left, top]) + side / 2 + (points - (low + high) / 2) * np.array([reach, -reach])
    dots = []
    for mapped, kept, own in zip(sets, used, np.split(places, np.cumsum([len(kept) for kept in used])[:-1]), strict=True):
        unit = SCALE * 5 * min(1.0, (400 / max(len(kept), 1)) ** 0.35)  # radius of a cluster of mean size
        sizes = mapped.sizes[kept]
        radii = unit * np.sqrt(sizes / max(sizes.mean(), 1e-12)).clip(0.35, 4) if len(kept) else sizes
        dots += [(float(x), float(y), float(radius), mapped.name, mapped.words.get(int(cluster))) for (x, y), radius, cluster in zip(own, radii, kept, strict=True)]
    for x, y, radius, name, _ in sorted(dots, key=lambda dot: -dot[2]):  # small ones lie on top
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[name], outline=CARD if radius > SCALE * 2 else None, width=SCALE // 2)
    _words(draw, (left, top, left + side, top + side), sorted((dot for dot in dots if dot[4]), key=lambda dot: -dot[2]), small)
    _legend(draw, left, top + side + SCALE * 8, sets, small)


def _words(draw: ImageDraw.ImageDraw, frame: tuple[int, int, int, int], dots: Sequence[tuple], font: ImageFont.FreeTypeFont) -> None:
    """Each word beside its dot, where it neither leaves the frame nor covers another word or dot of these; one without a place is left out."""
    height = SCALE * (TEXT_SIZE + 2)
    taken = [(x - radius, y - radius, x + radius, y + radius) for x, y, radius, _, _ in dots]
    words = []
    for x, y, radius, name, word in dots:
        text = drawable(word)[:18]
        width, gap = draw.textlength(text, font), radius + SCALE * 2
        for left, top in ((x + gap, y - height / 2), (x - gap - width, y - height / 2), (x - width / 2, y - gap - height), (x - width / 2, y + gap)):
            box = (left, top, left + width, top + height)
            inside = box[0] > frame[0] and box[1] > frame[1] and box[2] < frame[2] and box[3] < frame[3]
            if inside and not any(box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken):
                taken.append(box)
                words.append((left, top, text))
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[name], outline=INK, width=SCALE)
                break
    for left, top, text in words:
        draw.text((left, top), text, INK, font, stroke_width=SCALE * 2, stroke_fill=CARD)


def _legend(draw: ImageDraw.ImageDraw, left: float, top: int, sets: Sequence[MappedSet], font: ImageFont.FreeTypeFont) -> None:
    for mapped in sets:
        radius = SCALE * 6
        draw.ellipse((left, top + SCALE * 2, left + 2 * radius, top + SCALE * 2 + 2 * radius), fill=COLORS[mapped.name])
        text = f"{mapped.name}{', translated' if mapped.translated else ''} ({np.count_nonzero(mapped.sizes):,})"
        draw.text((left + 3 * radius, top), text, INK, font)
        left += 5 * radius + draw.textlength(text, font)
