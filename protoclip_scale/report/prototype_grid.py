"""A picture of prototypes: for each one some of its images, its size and its captions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from protoclip_scale.report.drawing import BORDER, CARD, GREY, INK, PAGE, cut, fitted, save_png

Prototype = tuple[str, int, Sequence[Image.Image], Sequence[str]]

CARDS_PER_ROW = 2
IMAGES_PER_CARD = 6
CAPTION_LINES = 3
THUMBNAIL, GAP, PADDING, MARGIN = 96, 8, 14, 18
HEADING_SIZE, TITLE_SIZE, TEXT_SIZE, LINE = 20, 18, 14, 20
CARD_WIDTH = 2 * PADDING + IMAGES_PER_CARD * THUMBNAIL + (IMAGES_PER_CARD - 1) * GAP
CARD_HEIGHT = 2 * PADDING + TITLE_SIZE + 2 * GAP + THUMBNAIL + GAP + CAPTION_LINES * LINE
HEADING_HEIGHT = HEADING_SIZE + 2 * GAP
PAGE_WIDTH = 2 * MARGIN + CARDS_PER_ROW * CARD_WIDTH + (CARDS_PER_ROW - 1) * GAP


def draw_prototypes(path: str | Path, title: str, sections: Mapping[str, Sequence[Prototype]]) -> None:
    """Writes a PNG with a title and, under a heading for each section, one card per prototype (name, number of rows, images, captions), two to a row.

    Images of any mode and size are fitted into squares on white; six are shown. Equal captions are shown once, with how often they
    occur, the commonest first; three lines of them, cut to the card's width. Letters outside ASCII lose their accents or are left out.
    """
    page = Image.new("RGB", (PAGE_WIDTH, 2 * MARGIN + HEADING_HEIGHT + sum(map(section_height, sections.values()))), PAGE)
    draw = ImageDraw.Draw(page)
    top = MARGIN
    _heading(draw, top, title, INK)
    top += HEADING_HEIGHT
    for heading, prototypes in sections.items():
        _heading(draw, top + GAP, heading, GREY)
        for number, prototype in enumerate(prototypes):
            row, column = divmod(number, CARDS_PER_ROW)
            page.paste(_card(*prototype), (MARGIN + column * (CARD_WIDTH + GAP), top + GAP + HEADING_HEIGHT + row * (CARD_HEIGHT + GAP)))
        top += section_height(prototypes)
    save_png(page, path)


def section_height(prototypes: Sequence[Prototype]) -> int:
    """Pixels of a heading with its cards."""
    return GAP + HEADING_HEIGHT + -(-len(prototypes) // CARDS_PER_ROW) * (CARD_HEIGHT + GAP)


def _heading(draw: ImageDraw.ImageDraw, top: int, text: str, color: str) -> None:
    font = ImageFont.load_default(HEADING_SIZE)
    draw.text((MARGIN, top), cut(text, draw, font, PAGE_WIDTH - 2 * MARGIN), color, font)


def _card(title: str, size: int, images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    card = Image.new("RGB", (CARD_WIDTH, CARD_HEIGHT), CARD)
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, 0, CARD_WIDTH - 1, CARD_HEIGHT - 1), outline=BORDER)
    large, small = ImageFont.load_default(TITLE_SIZE), ImageFont.load_default(TEXT_SIZE)
    rows = f"{size:,} row{'' if size == 1 else 's'}"
    rows_width = draw.textlength(rows, small)
    draw.text((PADDING, PADDING), cut(title, draw, large, CARD_WIDTH - 2 * PADDING - GAP - rows_width), INK, large)
    draw.text((CARD_WIDTH - PADDING - rows_width, PADDING + TITLE_SIZE - TEXT_SIZE), rows, GREY, small)
    top = PADDING + TITLE_SIZE + 2 * GAP
    for number, image in enumerate(images[:IMAGES_PER_CARD]):
        card.paste(fitted(image, THUMBNAIL, THUMBNAIL), (PADDING + number * (THUMBNAIL + GAP), top))
    top += THUMBNAIL + GAP
    for number, line in enumerate(_caption_lines(captions)):
        draw.text((PADDING, top + number * LINE), cut(line, draw, small, CARD_WIDTH - 2 * PADDING), INK if number == 0 else GREY, small)
    return card


def _caption_lines(captions: Sequence[str]) -> list[str]:
    counts: dict[str, int] = {}
    for caption in captions:
        text = " ".join(caption.split())
        counts[text] = counts.get(text, 0) + 1
    commonest = sorted(counts, key=lambda text: -counts[text])
    lines = [f"{text}  (x{counts[text]})" if counts[text] > 1 else text for text in commonest[:CAPTION_LINES]]
    hidden = len(commonest) - len(lines)
    return lines if hidden <= 0 else [*lines[:-1], f"{lines[-1]}   ... and {hidden} more"]
