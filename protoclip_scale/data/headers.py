"""What the first bytes of an image say: its size, and whether it is plain, so that torchvision's decoders return what PIL would."""

import struct
import warnings
from typing import NamedTuple

from PIL import ExifTags, Image


class Header(NamedTuple):
    """``plain``: 8 bits, gray or RGB, opaque, one frame, upright."""

    kind: str  # jpeg or webp
    width: int
    height: int
    plain: bool


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG or WebP; None for anything else or if it cannot be followed. Some microseconds."""
    try:
        if data[:2] == b"\xff\xd8":
            return _jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError):
        pass
    return None


def _jpeg(data: bytes) -> Header | None:
    at, upright, num_exif = 2, True, 0
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker == 0xE1:
            segment = data[at + 4 : at + 2 + length]
            if segment[:6] == b"Exif\0\0":
                num_exif += 1
                upright = upright and num_exif == 1 and _is_upright(segment)
            elif b"tiff:Orientation" in segment:  # PIL turns images by XMP too
                upright = False
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            plain = marker in (0xC0, 0xC1, 0xC2) and precision == 8 and components in (1, 3) and height > 0
            return Header("jpeg", width, height, plain and upright)
        at += 2 + length
    return None


def _is_upright(segment: bytes) -> bool:
    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif.load(segment)
            return exif.get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # a broken block of metadata: PIL's reading of it decides
        return False


def _webp(data: bytes) -> Header | None:
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("webp", width & 0x3FFF, height & 0x3FFF, True)
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, not bits >> 28 & 1)
    if kind == b"VP8X":
        size = [int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27)]
        return Header("webp", *size, not data[20] & 0b11110)  # alpha, EXIF, XMP, animation
    return None
