"""Text files from front to back: their lines with a running hash; and what is said about a file that is no text."""

from collections.abc import Iterator
from typing import BinaryIO

from protoclip_scale.data.sources.formats import Place
from protoclip_scale.errors import UserError

CHUNK_BYTES = 1 << 20
UTF8_MARK = b"\xef\xbb\xbf"
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


def refuse_compressed(head: bytes, place: Place) -> None:
    """UserError if the first bytes of a file are those of a compressed one."""
    for magic, name in COMPRESSIONS.items():
        if head.startswith(magic):
            raise UserError(
                f"{place.url} is compressed with {name}, so its parts cannot be read one by one; unpack it and name the unpacked file"
            )


def check_text(chunk: bytes, first: bool, place: Place) -> None:
    """UserError if a chunk of a file is no UTF-8 text on the face of it."""
    if first:
        refuse_compressed(chunk, place)
    if b"\0" in chunk:
        wide = first and chunk[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise UserError(f"{place.url} {'is UTF-16' if wide else 'holds zero bytes, so it is no text file'}; save it as UTF-8 text")


def hashed_lines(file: BinaryIO, digest, place: Place) -> Iterator[bytes]:
    """The lines of a file, each with its end; ``digest`` is updated with their bytes. UserError as ``check_text``."""
    first = True
    while lines := file.readlines(CHUNK_BYTES):
        chunk = b"".join(lines)
        check_text(chunk, first, place)
        digest.update(chunk)
        first = False
        yield from lines


def not_utf8(place: Place, where: str) -> UserError:
    """The error for bytes that are no UTF-8."""
    return UserError(f"{place.url}: {where} is not UTF-8; convert the file, for instance with iconv")
