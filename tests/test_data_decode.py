"""Decoding: both paths give the same bits; odd images are decoded as the definition says; broken ones are refused, never a crash."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from protoclip_scale.data import decode
from protoclip_scale.data.decode import BadImage, Limits, decode_image, decode_with_pil, extension_decoders, public_decoders
from protoclip_scale.data.headers import read_header
from tests.support import CORPUS, ROOT

RED, BLUE = (200, 30, 20), (10, 40, 220)


def picture(height=61, width=83, seed=0) -> Image.Image:
    """Smooth colours with an edge."""
    pixels = np.random.default_rng(seed).integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    image.paste(RED, (0, 0, max(1, width // 3), max(1, height // 3)))
    return image


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def fast(data: bytes) -> bool:
    header = read_header(data)
    return header is not None and header.plain


def plain_images() -> dict[str, bytes]:
    images = {}
    for height, width in ((61, 83), (64, 64), (1, 1), (7, 201), (300, 17)):
        image = picture(height, width)
        for mode in ("RGB", "L"):
            for quality in (35, 90):
                for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
                    for progressive in (False, True):
                        name = f"jpeg {height}x{width} {mode} {quality} {subsampling} {progressive}"
                        images[name] = encoded(
                            image.convert(mode), "JPEG", quality=quality, subsampling=subsampling, progressive=progressive
                        )
            for lossless in (False, True):
                images[f"webp {height}x{width} {mode} {lossless}"] = encoded(image.convert(mode), "WEBP", lossless=lossless)
        for mode in ("RGB", "L"):
            images[f"png {height}x{width} {mode}"] = encoded(image.convert(mode), "PNG")
    profile = Image.new("RGB", (1, 1)).info.get("icc_profile", b"profile" * 20)
    images["webp with a colour profile"] = encoded(picture(), "WEBP", icc_profile=profile)
    images["jpeg with EXIF that says upright"] = encoded(picture(), "JPEG", exif=orientation(1))
    return images


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    exif[0x010E] = "a description"
    return exif


def test_torchvision_returns_what_the_definition_says():
    images = plain_images()
    assert all(fast(data) == (not name.startswith("png")) for name, data in images.items())
    for name, data in images.items():
        assert torch.equal(decode_image(data), decode_with_pil(data)), name
        assert decode_image(data).dtype == torch.uint8
        if header := read_header(data):
            assert (header.height, header.width) == tuple(decode_image(data).shape[1:]), name


def test_the_library_alone_and_the_public_functions_return_the_same_bits():
    """torchvision's package is imported after its library was loaded, and the library loaded once more after that."""
    alone, public = extension_decoders(), public_decoders()
    again = extension_decoders()
    assert alone is not None and alone.keys() == public.keys()
    for name, data in plain_images().items():
        if header := read_header(data):
            pictures = [each[header.kind](torch.frombuffer(bytearray(data), dtype=torch.uint8)) for each in (alone, public, again)]
            assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2]), name


def test_without_the_library_the_public_functions_are_used(monkeypatch, tmp_path):
    """Another torchvision may keep it elsewhere, or under another name."""
    monkeypatch.setattr(decode, "EXTENSIONS", ("no_such_library",))
    assert extension_decoders() is None
    (tmp_path / f"image{decode.importlib.machinery.EXTENSION_SUFFIXES[-1]}").write_bytes(b"not a library")
    spec = decode.importlib.machinery.ModuleSpec("torchvision", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(decode, "EXTENSIONS", ("image",))
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: spec)
    assert extension_decoders() is None
    monkeypatch.setattr(decode, "TORCHVISION_DECODERS", extension_decoders() or public_decoders())
    data = encoded(picture(), "JPEG")
    assert fast(data) and torch.equal(decode_image(data), decode_with_pil(data))
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    assert public_decoders().keys() == {"webp"}
    monkeypatch.setattr(decode, "TORCHVISION_DECODERS", public_decoders())
    assert torch.equal(decode_image(data), decode_with_pil(data))


def test_what_makes_a_batch_imports_neither_torchvision_nor_a_compiler_nor_a_model_library():
    """They take ten seconds, and a resumed run has five to its first batch. In an interpreter of its own."""
    program = (
        "import sys\n"
        "from protoclip_scale.data import batches\n"
        "from protoclip_scale.data.tokenizers import ClipTokenizer\n"
        "from protoclip_scale.data.decode import decode_image\n"
        "from protoclip_scale.data.transforms import AUGMENTATIONS\n"
        "from protoclip_scale.data.randomness import generator\n"
        "image = decode_image(sys.stdin.buffer.read())\n"
        "assert all(each(image, 32, generator(0, 'test', number)).shape == (3, 32, 32) for each in AUGMENTATIONS.values() for number in range(9))\n"
        "assert ClipTokenizer(16)(['a photo of a cat']).lengths.tolist() == [7]\n"
        "print(*sorted({'torchvision', 'open_clip', 'timm', 'transformers', 'datasets', 'pandas', 'sympy', 'torch._dynamo'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], input=encoded(picture(), "JPEG"), capture_output=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split() == []


def test_torchvision_equals_the_definition_on_the_demo_corpus():
    table = pq.read_table(sorted(CORPUS.glob("train-*.parquet"))[0], columns=["image"])
    rows = table.column("image").to_pylist()[::3]
    assert all(fast(row["bytes"]) for row in rows)
    assert all(torch.equal(decode_image(row["bytes"]), decode_with_pil(row["bytes"])) for row in rows)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_is_applied(kind, value):
    data = encoded(picture(), kind, exif=orientation(value), **({"lossless": True} if kind == "WEBP" else {}))
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (turned.size == (61, 83)) == (value >= 5)
    assert torch.equal(decode_image(data), pixels(turned))


def test_orientation_in_xmp_is_applied():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(picture(), "JPEG", xmp=xmp)
    assert decode_image(data).shape == (3, 83, 61)


def test_broken_exif_does_not_lose_the_image():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert torch.equal(decode_image(data), pixels(Image.open(io.BytesIO(encoded(picture(), "JPEG")))))


def test_transparency_is_put_on_white():
    image = Image.new("RGBA", (10, 10), (*RED, 255))
    image.paste((*BLUE, 0), (0, 0, 5, 10))
    image.paste((0, 0, 0, 128), (0, 0, 2, 2))
    for kind, settings in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        decoded = decode_image(encoded(image, kind, **settings))
        assert decoded[:, 5, 2].tolist() == [255, 255, 255]
        assert decoded[:, 5, 7].tolist() == list(RED)
        assert decoded[:, 0, 0].tolist() == [127, 127, 127]
    gray = decode_image(encoded(image.convert("LA"), "PNG"))
    assert gray[:, 5, 2].tolist() == [255, 255, 255]


def test_palette_with_transparency_is_put_on_white():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([*BLUE, *RED])
    image.paste(0, (0, 0, 4, 8))
    for kind in ("PNG", "GIF"):
        opaque, transparent = encoded(image, kind), encoded(image, kind, transparency=0)
        assert decode_image(opaque)[:, 0, 0].tolist() == list(BLUE)
        assert decode_image(transparent)[:, 0, 0].tolist() == [255, 255, 255]
        assert decode_image(transparent)[:, 0, 7].tolist() == list(RED)
    partly = encoded(image, "PNG", transparency=bytes([128, 255]))
    assert decode_image(partly)[:, 0, 0].tolist() == [132, 147, 237]  # half of BLUE, half of white
    keyed = encoded(Image.new("RGB", (4, 4), RED), "PNG", transparency=RED)
    assert decode_image(keyed).unique().tolist() == [255]


def test_16_bits_are_cut_to_8_by_a_shift():
    values = np.array([[0, 255, 256, 0x12FF], [0x7F00, 0xFF00, 0xFFFF, 1]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        decoded = decode_image(encoded(Image.fromarray(values), kind))
        assert decoded[0].tolist() == (values >> 8).tolist()
        assert torch.equal(decoded[0], decoded[2])
    color = png(struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), b"\0" + struct.pack(">HHH", 0x12FF, 0xABCD, 0x00FF))
    assert decode_image(color)[:, 0, 0].tolist() == [0x12, 0xAB, 0x00]


def png(header: bytes, rows: bytes, *chunks: bytes) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_cmyk_becomes_rgb():
    image = Image.new("RGB", (16, 16), RED).convert("CMYK")
    decoded = decode_image(encoded(image, "JPEG", quality=100))
    assert (decoded.float().mean((1, 2)) - torch.tensor(RED)).abs().max() < 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_used(kind):
    frames = [Image.new("RGB", (12, 9), color) for color in (RED, BLUE)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert decode_image(data)[:, 4, 4].tolist() == list(RED)


def test_other_formats_and_modes_are_decoded():
    image = picture()
    for kind in ("BMP", "TIFF", "PPM", "GIF"):
        assert decode_image(encoded(image, kind)).shape == (3, 61, 83)
    assert decode_image(encoded(image.convert("1"), "PNG")).unique().tolist() == [0, 255]
    assert decode_image(encoded(image.convert("YCbCr"), "JPEG")).shape == (3, 61, 83)
    assert decode_image(encoded(Image.new("RGB", (20_000, 40), RED), "JPEG")).shape == (3, 40, 20_000)


def test_the_first_picture_of_a_multi_picture_jpeg_is_used():
    data = encoded(Image.new("RGB", (16, 16), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16), BLUE)])
    assert torch.equal(decode_image(data), decode_with_pil(data))
    assert (decode_image(data)[:, 8, 8].int() - torch.tensor(RED)).abs().max() < 6


def reason(data: bytes, limits: Limits = Limits()) -> str:  # noqa: B008 (a tuple)
    with pytest.raises(BadImage) as caught:
        decode_image(data, limits)
    return str(caught.value)


def test_bytes_that_are_no_image_are_refused_with_a_reason():
    assert reason(b"") == "zero bytes"
    for data in (b"<html>404</html>", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBPVP8 ", b"GIF89a", bytes(1000)):
        assert reason(data)
    assert reason(b"<html>404 not found</html>") == "not an image"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not an image"  # never handed to an interpreter
    assert "floating-point" in reason(encoded(Image.fromarray(np.ones((3, 3), dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_images_are_refused(kind):
    data = encoded(picture(), kind)
    for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
        assert reason(data[: int(len(data) * share)])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_damaged_bytes_give_an_image_or_a_reason_and_nothing_else(kind):
    data = encoded(picture(), kind)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(len(data), size=rng.integers(1, 6)):
            damaged[at] = rng.integers(256)
        try:
            decoded = decode_image(bytes(damaged), Limits(max_pixels=10**6))
            assert decoded.dtype == torch.uint8 and decoded.ndim == 3 and decoded.shape[0] == 3
            outcomes.add("image")
        except BadImage as error:
            assert str(error)
            outcomes.add("refused")
    assert outcomes == {"image", "refused"}


def test_limits_are_checked_on_the_header():
    bomb = png(struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"")
    assert "3600000000 pixels" in reason(bomb)
    transparent = png(struct.pack(">IIBBBBB", 13_000, 13_000, 8, 6, 0, 0, 0), b"")
    assert "13000 x 13000 pixels" in reason(transparent)
    gif = encoded(picture(), "GIF")
    gif = gif[:6] + struct.pack("<HH", 60_000, 60_000) + gif[10:]
    assert "pixels" in reason(gif)
    small = encoded(picture(), "JPEG")
    assert "data.max_pixels 5000" in reason(small, Limits(max_pixels=5000))
    assert "data.max_bytes 100" in reason(small, Limits(max_bytes=100))
    assert decode_image(small, Limits(max_pixels=61 * 83, max_bytes=len(small))).shape == (3, 61, 83)


def test_no_warnings_reach_the_log(recwarn):
    decode_image(encoded(picture().convert("P"), "PNG", transparency=bytes([3, 200, 255])))
    with pytest.raises(BadImage):
        decode_image(png(struct.pack(">IIBBBBB", 11_000, 11_000, 8, 6, 0, 0, 0), b""))
    assert not recwarn.list
