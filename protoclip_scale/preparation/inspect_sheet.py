"""The contact sheet as one PNG: a card per row, its picture, its views and its captions."""

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from protoclip_scale.preparation.inspect_rows import Column, Inspection, ShownRow
from protoclip_scale.report.drawing import BORDER, CARD, GREY, INK, PAGE, Font, cut, fitted, wrapped

VIEW, ORIGINAL_WIDTH, GAP, PADDING, MARGIN = 144, 192, 10, 14, 20
LARGE, SMALL, LINE, HEADER = 17, 13, 19, 54
MIN_WIDTH = 900
CAPTIONS, LINES_OF_TEXT = 4, 2
ACCENT, WARNING, EMPTY = "#3b5bdb", "#b42318", "#fbeae8"


def draw_sheet(path: str | Path, inspection: Inspection) -> None:
    """Writes the PNG by one atomic rename. Letters outside ASCII lose their accents or are left out: the HTML sheet has them all."""
    columns, rows = inspection.columns, inspection.rows
    width = max(MIN_WIDTH, 2 * (MARGIN + PADDING) + ORIGINAL_WIDTH + len(columns) * (VIEW + GAP))
    cards = [_card(row, width - 2 * MARGIN) for row in rows]
    page = Image.new("RGB", (width, 2 * MARGIN + HEADER + sum(card.height + GAP for card in cards)), PAGE)
    _header(ImageDraw.Draw(page), columns)
    top = MARGIN + HEADER
    for card in cards:
        page.paste(card, (MARGIN, top))
        top += card.height + GAP
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    page.save(temporary, format="PNG", optimize=True)
    os.replace(temporary, path)


def _left(column: int) -> int:
    return PADDING + ORIGINAL_WIDTH + GAP + column * (VIEW + GAP)


def _header(draw: ImageDraw.ImageDraw, columns: Sequence[Column]) -> None:
    large, small = ImageFont.load_default(LARGE), ImageFont.load_default(SMALL)
    draw.text((MARGIN + PADDING, MARGIN), "original", INK, large)
    draw.text((MARGIN + PADDING, MARGIN + LARGE + 6), "as it is stored", GREY, small)
    for number, column in enumerate(columns):
        left = MARGIN + _left(number)
        first = number == 0 or columns[number - 1].title != column.title
        if first:
            draw.text((left, MARGIN), cut(column.title, draw, large, VIEW + GAP), INK, large)
        draw.text((left, MARGIN + LARGE + 6), column.note, GREY, small)


def _card(row: ShownRow, width: int) -> Image.Image:
    small, measure = ImageFont.load_default(SMALL), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text_width = width - _left(0) - PADDING
    half = (text_width - 2 * GAP) // 2 if row.texts else text_width
    captions = _caption_lines(row, measure, small, half)
    facts = facts_lines(row)
    below = max(len(facts), len(captions), len(row.texts)) * LINE
    card = Image.new("RGB", (width, 2 * PADDING + VIEW + GAP + below), CARD)
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, 0, width - 1, card.height - 1), outline=BORDER)
    _picture(card, draw, row.original, PADDING, ORIGINAL_WIDTH)
    for number, picture in enumerate(row.pictures):
        _picture(card, draw, picture, _left(number), VIEW)
    if row.problem is not None:
        draw.text((_left(0), PADDING + 4), "cannot be used", WARNING, ImageFont.load_default(LARGE))
        _lines(draw, small, _left(0), PADDING + 34, wrapped(row.problem, draw, small, text_width, 3), INK)
    top = PADDING + VIEW + GAP
    _lines(draw, small, PADDING, top, [cut(line, draw, small, ORIGINAL_WIDTH) for line in facts], GREY)
    _lines(draw, small, _left(0), top, captions, INK)
    if row.texts:
        right = _left(0) + half + 2 * GAP
        labels = max(int(draw.textlength(label, small)) for label, _ in row.texts) + GAP
        _lines(draw, small, right, top, [label for label, _ in row.texts], ACCENT)
        _lines(draw, small, right + labels, top, [cut(text, draw, small, half - labels) for _, text in row.texts], INK)
    return card


def _lines(draw: ImageDraw.ImageDraw, font: Font, left: int, top: int, lines: Sequence[str], colour: str) -> None:
    for number, line in enumerate(lines):
        draw.text((left, top + number * LINE), line, colour, font)


def _picture(card: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image | None, left: int, width: int) -> None:
    if picture is None:
        draw.rectangle((left, PADDING, left + width - 1, PADDING + VIEW - 1), fill=EMPTY)
    else:
        card.paste(fitted(picture, width, VIEW), (left, PADDING))
    draw.rectangle((left, PADDING, left + width - 1, PADDING + VIEW - 1), outline=BORDER)


def facts_lines(row: ShownRow) -> list[str]:
    """Size and format of the picture, and where it lies."""
    size = f"{row.facts.width} x {row.facts.height}, " if row.facts.width else ""
    return [f"{size}{row.facts.kind}, {row.facts.num_bytes / 1000:.1f} kB", posixpath.basename(row.file), f"row {row.row:,}"]


def _caption_lines(row: ShownRow, draw: ImageDraw.ImageDraw, font: Font, width: int) -> list[str]:
    lines = [part for caption in row.captions[:CAPTIONS] for part in wrapped(caption, draw, font, width, LINES_OF_TEXT)]
    hidden = len(row.captions) - CAPTIONS
    return [*(lines or ["(no caption)"]), *([f"... and {hidden} more"] if hidden > 0 else [])]
