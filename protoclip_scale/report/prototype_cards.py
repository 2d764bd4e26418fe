"""Prototypes with some of their images and captions as data, for the HTML report; the same cards as in the picture of prototype_grid.py."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from protoclip_scale.files import publish_json
from protoclip_scale.report.drawing import fitted
from protoclip_scale.report.prototype_grid import IMAGES_PER_CARD, Prototype

THUMBNAIL = 88  # pixels; about 2 kB of WebP each


def write_cards(path: Path, labeling: str, episode: int, sections: Mapping[str, Sequence[Prototype]]) -> None:
    """Writes ``{labeling, episode, sections: [{heading, cards: [{name, rows, captions, images}]}]}``; images are base64 WebP on white."""
    found = [{"heading": heading, "cards": [_card(*prototype) for prototype in prototypes]} for heading, prototypes in sections.items()]
    publish_json(path, {"labeling": labeling, "episode": episode, "sections": found})


def _card(name: str, rows: int, images: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, Any]:
    return {"name": name, "rows": rows, "captions": [" ".join(caption.split()) for caption in captions], "images": [_encoded(image) for image in images[:IMAGES_PER_CARD]]}


def _encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    fitted(image, THUMBNAIL, THUMBNAIL).save(buffer, format="WEBP", quality=72)
    return base64.b64encode(buffer.getvalue()).decode()
