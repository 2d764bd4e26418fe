"""The picture of prototypes: every image and every card stands where it should, in any mode and size."""

import numpy as np
import pytest
from PIL import Image

from protoclip_scale.report import prototype_grid
from protoclip_scale.report.prototype_grid import (
    CARD_HEIGHT,
    CARD_WIDTH,
    GAP,
    HEADING_HEIGHT,
    IMAGES_PER_CARD,
    MARGIN,
    PADDING,
    PAGE_WIDTH,
    THUMBNAIL,
    draw_prototypes,
    section_height,
)

TOP = MARGIN + 2 * HEADING_HEIGHT + GAP  # of the first cards: below the title and the first heading
COLORS = ["red", "lime", "blue", "yellow", "cyan", "magenta", "black"]


def centre(card: int, image: int, before: int = 0) -> tuple[int, int]:
    """Where the middle of an image of a card should be, ``before`` pixels of sections stand above its own."""
    row, column = divmod(card, 2)
    left = MARGIN + column * (CARD_WIDTH + GAP) + PADDING + image * (THUMBNAIL + GAP) + THUMBNAIL // 2
    top = TOP + before + row * (CARD_HEIGHT + GAP) + PADDING + prototype_grid.TITLE_SIZE + 2 * GAP + THUMBNAIL // 2
    return left, top


def test_images_stand_in_their_cards(tmp_path):
    pictures = [Image.new("RGB", (8 * (i + 1), 30), color) for i, color in enumerate(COLORS)]
    cards = [("first", 7, pictures, ["a"]), ("second", 1, pictures[3:5], []), ("third", 12345, pictures[::-1], ["x"] * 9)]
    draw_prototypes(tmp_path / "new" / "grid.png", "a title", {"largest": cards, "random": cards[2:]})
    page = Image.open(tmp_path / "new" / "grid.png")
    assert page.size == (PAGE_WIDTH, 2 * MARGIN + HEADING_HEIGHT + section_height(cards) + section_height(cards[2:]))
    for before, section in ((0, cards), (section_height(cards), cards[2:])):
        for card, (_, _, images, _) in enumerate(section):
            for number, image in enumerate(images[:IMAGES_PER_CARD]):
                assert page.getpixel(centre(card, number, before)) == image.convert("RGB").getpixel((4, 15))
    assert page.getpixel(centre(1, 2)) == (255, 255, 255), "a prototype of two images shows two"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_any_mode_and_shape_is_drawn_on_white(tmp_path):
    images = [
        Image.new("RGBA", (50, 50), (255, 0, 0, 0)),
        Image.new("L", (3000, 200), 0),
        Image.new("P", (1, 1), 0),
        Image.new("CMYK", (20, 20), (0, 0, 0, 255)),
        Image.new("1", (9, 9), 0),
        Image.new("LA", (9, 9), (0, 255)),
    ]
    draw_prototypes(tmp_path / "grid.png", "", {"": [("modes", 6, images, [])]})
    page = Image.open(tmp_path / "grid.png")
    assert page.getpixel(centre(0, 0)) == (255, 255, 255)
    assert all(sum(page.getpixel(centre(0, number))) < 60 for number in range(1, 6))


@pytest.mark.parametrize("captions", [["line " * 200], ["Türkiye", "日本語のキャプション"], [f"caption {number}" for number in range(500)], ["a\nb\tc"]])
def test_no_caption_leaves_its_card(tmp_path, captions):
    draw_prototypes(tmp_path / "grid.png", "title " * 30, {"heading " * 25: [("title " * 50, 10**9, [], captions), ("", 0, [], [])]})
    page = np.asarray(Image.open(tmp_path / "grid.png").convert("L")).astype(int)
    left, right, bottom = MARGIN + CARD_WIDTH, MARGIN + CARD_WIDTH + GAP, TOP + CARD_HEIGHT
    assert np.ptp(page[TOP:, left:right]) == 0 and np.ptp(page[bottom:, :]) == 0, "nothing between or below the cards"
    assert np.ptp(page[:, :MARGIN]) == 0 and np.ptp(page[:, -MARGIN:]) == 0, "titles and headings end in time"
    assert page[TOP + PADDING + 3 * GAP + THUMBNAIL : bottom - 2, MARGIN + 2 : MARGIN + CARD_WIDTH - 2].min() < 128, "there is text"


def test_equal_captions_are_counted_and_the_rest_is_named():
    lines = prototype_grid._caption_lines(["a cat", "a  dog", "a dog", "a bird", "a fish", "a dog "])
    assert lines == ["a dog  (x3)", "a cat", "a bird   ... and 1 more"]
    assert prototype_grid._caption_lines([]) == [] and prototype_grid._caption_lines(["a"]) == ["a"]
