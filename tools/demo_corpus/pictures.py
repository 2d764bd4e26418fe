"""Turn vector art and pictures with transparency into the small WebP squares of the corpus."""

import io

import resvg_py
from PIL import Image, ImageChops

from protoclip_scale.errors import UserError

SIZE = 72
MAX_PICTURE_PIXELS = 178_000_000  # Pillow refuses more
WORKING_SIZE = 1024
RENDER_SIZE = 256  # rendered larger and reduced: smoother edges than rendering at 72 pixels
WEBP_QUALITY = 82


def render_icon(body: str, left: float, top: float, width: float, height: float) -> Image.Image:
    """Render the `body` of an iconify icon (SVG without its outer element) into a square RGBA picture."""
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'
    )
    # System fonts would make the picture depend on the machine; the art has no text elements.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def on_white(picture: Image.Image) -> Image.Image:
    """The picture as RGB, its transparent parts white, its longer side below 2 x `WORKING_SIZE`.

    UserError when it has more than `MAX_PICTURE_PIXELS` pixels; one of the clip-art package has 169 million, and takes 700 MB.
    """
    if picture.width * picture.height > MAX_PICTURE_PIXELS:
        raise UserError(f"{getattr(picture, 'filename', 'picture')}: {picture.width} x {picture.height} pixels, limit {MAX_PICTURE_PIXELS}")
    picture = picture.convert("RGBA")
    picture = picture.reduce(max(1, max(picture.size) // WORKING_SIZE))
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    return canvas.convert("RGB")


def trim(picture: Image.Image, fill: float = 0.9, margin: float = 0.04) -> Image.Image:
    """Cut a small drawing out of its white page: only if it is longer than `fill` of the page nowhere; `margin` of it stays white."""
    difference = ImageChops.difference(picture, Image.new("RGB", picture.size, "white")).convert("L")
    box = difference.point(lambda value: 255 * (value > 8)).getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) >= fill * max(picture.size):
        return picture
    border = round(margin * max(box[2] - box[0], box[3] - box[1]))
    page = Image.new("RGB", (box[2] - box[0] + 2 * border, box[3] - box[1] + 2 * border), "white")
    page.paste(picture.crop(box), (border, border))
    return page


def square_webp(picture: Image.Image) -> bytes:
    """Bytes of a `SIZE` x `SIZE` WebP with the whole RGB picture in its middle, on white."""
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    buffer = io.BytesIO()
    canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(buffer, "WEBP", quality=WEBP_QUALITY, method=4)
    return buffer.getvalue()
