"""A picture of how large the clusters of each labeling are."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from protoclip_scale.prototypes.diagnostics import imbalance
from protoclip_scale.report.drawing import BORDER, CARD, COLORS, GREY, INK, PAGE, save_png
from protoclip_scale.report.plain import number

PANEL_WIDTH, PLOT_HEIGHT, MARGIN, AXIS, HEAD, FOOT = 560, 300, 18, 56, 70, 48
TITLE_SIZE, TEXT_SIZE = 18, 14
MAX_BINS, SINGLE_BINS = 48, 32
LABEL_DISTANCE = 60  # pixels, at least


def bins_of(sizes: Mapping[str, np.ndarray]) -> np.ndarray:
    """Edges [bins + 1] that hold every size from 0 on: one bin for each size where that fits, else for sizes below 32, and bins that grow beyond."""
    largest = max(int(counts.max(initial=0)) for counts in sizes.values())
    if largest < MAX_BINS:
        return np.arange(largest + 2)
    growing = np.geomspace(SINGLE_BINS, largest + 1, MAX_BINS - SINGLE_BINS + 1).round().astype(int)
    return np.concatenate([np.arange(SINGLE_BINS), np.unique(growing)])


def draw_sizes(path: str | Path, title: str, sizes: Mapping[str, np.ndarray]) -> None:
    """Writes a PNG with one histogram per labeling, side by side on the same axes; ``sizes`` are the rows of each cluster, int [K].

    Upwards: clusters, on a logarithmic scale, so that a single huge or empty one is seen beside thousands of usual ones. A number on the lower axis is the
    smallest size in its bar. Under each title: the largest cluster, empty ones, and the imbalance K sum(n^2) / N^2.
    """
    edges = bins_of(sizes)
    counts = {name: np.histogram(values, edges)[0] for name, values in sizes.items()}
    decades = max(1, int(np.ceil(np.log10(max(2, max(int(found.max()) for found in counts.values()))))))
    page = Image.new("RGB", (2 * MARGIN + len(sizes) * PANEL_WIDTH, 2 * MARGIN + TITLE_SIZE + HEAD + PLOT_HEIGHT + FOOT), PAGE)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(TITLE_SIZE + 2))
    for place, (name, found) in enumerate(counts.items()):
        _panel(draw, MARGIN + place * PANEL_WIDTH, MARGIN + TITLE_SIZE + HEAD, name, sizes[name], found, edges, decades)
    save_png(page, path)


def _panel(draw: ImageDraw.ImageDraw, left: int, top: int, name: str, sizes: np.ndarray, counts: np.ndarray, edges: np.ndarray, decades: int) -> None:
    large, small = ImageFont.load_default(TITLE_SIZE), ImageFont.load_default(TEXT_SIZE)
    draw.text((left + AXIS, top - 50), f"{name} clusters", COLORS.get(name, INK), large)
    draw.text((left + AXIS, top - 26), _summary(sizes), GREY, small)
    first, last, bottom = left + AXIS, left + PANEL_WIDTH - 2 * MARGIN, top + PLOT_HEIGHT
    draw.rectangle((first, top, last, bottom), fill=CARD, outline=BORDER)
    floor = 0.5  # half a cluster: a bin of one cluster still has a height
    height = PLOT_HEIGHT / (decades - np.log10(floor))
    for decade in range(decades + 1):
        y = bottom - round(height * (decade - np.log10(floor)))
        draw.line((first, y, last, y), BORDER)
        label = f"{10**decade:,}"
        draw.text((first - 6 - draw.textlength(label, small), y - TEXT_SIZE // 2 - 2), label, GREY, small)
    step = (last - first) / (len(edges) - 1)
    for bin_number, count in enumerate(counts):
        if count:
            x = first + bin_number * step
            y = bottom - round(height * (np.log10(count) - np.log10(floor)))
            draw.rectangle((round(x) + 1, y, max(round(x) + 1, round(x + step) - 1), bottom - 1), fill=COLORS.get(name, INK))
    for place in range(0, len(edges) - 1, max(1, round(LABEL_DISTANCE / step))):
        label = f"{edges[place]:,}"
        centre = first + (place + 0.5) * step
        draw.text((centre - draw.textlength(label, small) / 2, bottom + 6), label, GREY, small)
    caption = "rows in a cluster" + (f" (bars from {SINGLE_BINS} on stand for several sizes)" if edges[-1] - edges[-2] > 1 else "")
    draw.text(((first + last - draw.textlength(caption, small)) / 2, bottom + 26), caption, INK, small)


def _summary(sizes: np.ndarray) -> str:
    facts = f"largest {int(sizes.max()):,}, {int((sizes == 0).sum()):,} empty, imbalance {number(imbalance(sizes), 3)}"
    return f"{len(sizes):,} of {int(sizes.sum()):,} rows: {facts}"
