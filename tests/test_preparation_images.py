"""Images of training size: decoded by the package's definition, never enlarged, not encoded twice without need."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from protoclip_scale.data.decode import BadImage, Limits, decode_image, decode_with_pil
from protoclip_scale.preparation.images import ImageSettings, load_small, prepare_image, scaled_size
from tests.support import CORPUS

SMALL = ImageSettings(short_side=48)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    table = pq.read_table(CORPUS / "val-00000-of-00001.parquet", columns=["image"])
    return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in table.slice(0, 12).to_pylist()]


def encoded(picture: Image.Image, kind: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def test_sizes_keep_their_ratio_and_never_grow():
    assert scaled_size(600, 400, 256) == (384, 256)
    assert scaled_size(400, 601, 256) == (256, 385)
    assert scaled_size(256, 9000, 256) == (256, 9000)
    assert scaled_size(30, 40, 256) == (30, 40)
    assert scaled_size(60_000, 300, 256) == (51_200, 256)


@pytest.mark.parametrize(("kind", "loss"), [("jpeg", 4.0), ("webp", 4.0)])
def test_what_is_written_looks_like_what_was_read(pictures, kind, loss):
    for picture in pictures:
        made = prepare_image(encoded(picture.resize((90, 72))), SMALL._replace(format=kind))
        assert Image.open(io.BytesIO(made.encoded)).format == kind.upper()
        again = decode_image(made.encoded).permute(1, 2, 0).numpy().astype(int)
        assert again.shape == made.pixels.shape == (48, 60, 3)
        reference = np.asarray(picture.resize((90, 72)).resize((60, 48), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(made.pixels - reference).mean() < 0.5
        assert np.abs(again - made.pixels).mean() < loss


def test_quality_is_obeyed(pictures):
    sizes = [len(prepare_image(encoded(pictures[0]), SMALL._replace(quality=quality)).encoded) for quality in (10, 50, 95)]
    assert sizes == sorted(set(sizes))


def test_small_plain_images_of_the_format_keep_their_bytes(pictures):
    jpeg, png = encoded(pictures[0], "JPEG", quality=60), encoded(pictures[0])
    large = SMALL._replace(short_side=72)
    assert prepare_image(jpeg, large).encoded == jpeg
    assert prepare_image(jpeg, large._replace(keep_small=False)).encoded != jpeg
    assert prepare_image(jpeg, SMALL).encoded != jpeg, "it is larger"
    assert prepare_image(jpeg, large._replace(format="webp")).encoded != jpeg
    assert prepare_image(png, large).encoded[:2] == b"\xff\xd8"
    turned = Image.Exif()
    turned[0x0112] = 6
    sideways = encoded(pictures[0].resize((72, 80)), "JPEG", exif=turned)
    made = prepare_image(sideways, large)
    assert made.encoded != sideways and made.pixels.shape == (72, 80, 3)
    assert (decode_image(made.encoded).float() - decode_with_pil(sideways).float()).abs().mean() < 3, "upright without EXIF"


def test_odd_images_follow_the_definition(pictures):
    see_through = pictures[0].convert("RGBA")
    see_through.putalpha(0)
    deep = Image.fromarray(np.full((60, 60), 40_000, dtype=np.uint16))
    for image in (see_through, deep):
        pixels, was_larger = load_small(encoded(image), 72)
        assert not was_larger and torch.equal(torch.from_numpy(pixels).permute(2, 0, 1), decode_with_pil(encoded(image)))
    assert (prepare_image(encoded(see_through), SMALL).pixels == 255).all()
    assert (prepare_image(encoded(deep), SMALL).pixels == 40_000 >> 8).all()


def test_what_cannot_be_used_says_why(pictures):
    jpeg = encoded(pictures[0], "JPEG")
    for data, reason in ((b"", "zero bytes"), (b"GIF? no", "not an image"), (jpeg[:300], "truncated")):
        with pytest.raises(BadImage, match=reason):
            prepare_image(data, SMALL)
    with pytest.raises(BadImage, match="72 x 72 pixels"):
        prepare_image(jpeg, SMALL, Limits(max_pixels=5000))
    long = encoded(Image.new("RGB", (17_000, 8)))
    with pytest.raises(BadImage, match="too long for WEBP: 17000 x 8"):
        prepare_image(long, SMALL._replace(format="webp"))
    assert decode_image(prepare_image(long, SMALL).encoded).shape == (3, 8, 17_000)
