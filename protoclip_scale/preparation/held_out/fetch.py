"""Downloads that go on where they stopped, and archives unpacked without trusting a name in them."""

import gzip
import hashlib
import os
import posixpath
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import requests

from protoclip_scale.data.sources.filesystems import shown
from protoclip_scale.data.sources.retry import retry
from protoclip_scale.errors import UserError
from protoclip_scale.files import sync
from protoclip_scale.preparation.held_out.schema import Download

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60.0
MAX_MEMBERS = 2_000_000  # of an archive
MAX_RATIO = 100  # unpacked bytes to packed ones: beyond it an archive is a bomb


def download(wanted: Download, folder: Path, retry_seconds: float) -> Path:
    """The file in ``folder`` under its own name; a part of it that is there is continued, a whole one is kept.

    Raises UserError: no answer for ``retry_seconds``, a refusal, no room, or another MD5.
    """
    name = posixpath.basename(urlsplit(wanted.url).path)
    path, part = folder / name, folder / f".{name}.part"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    retry(lambda: _continue(wanted.url, part), retry_seconds, "downloading", shown(wanted.url), True)
    if wanted.md5 and (found := _md5(part)) != wanted.md5:
        part.unlink()
        raise UserError(f"{shown(wanted.url)}: its MD5 is {found}, not {wanted.md5}: it has changed or arrived damaged; run again, or get the file elsewhere and give its folder with --source")
    sync(part)
    os.replace(part, path)
    return path


def _continue(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    with requests.get(url, headers={"Range": f"bytes={have}-"} if have else {}, stream=True, timeout=TIMEOUT_SECONDS) as answer:
        if have and answer.status_code == 416:  # nothing is left
            return
        answer.raise_for_status()
        have = have if answer.status_code == 206 else 0
        expected = answer.headers.get("Content-Length")
        free = shutil.disk_usage(part.parent).free
        if expected is not None and int(expected) > free:
            raise UserError(f"{shown(url)}: {int(expected) / 1e9:.1f} GB to fetch, but only {free / 1e9:.1f} GB are free in {part.parent}; choose another --out")
        with part.open("ab" if have else "wb") as file:
            for chunk in answer.iter_content(CHUNK_BYTES):
                file.write(chunk)
        if expected is not None and answer.headers.get("Content-Encoding") is None and part.stat().st_size < have + int(expected):
            raise requests.ConnectionError(f"the connection ended after {part.stat().st_size} of {have + int(expected)} bytes")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """A tar, zip or gz into ``folder``, once; files that are no archive are linked there. A killed unpacking is done again.

    Raises UserError for members with a path that leads out, links and devices, too many members, far more bytes than the archive has, and damaged archives.
    """
    done = folder / f".{archive.name}.unpacked"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    budget = [max(MAX_RATIO * archive.stat().st_size, CHUNK_BYTES)]
    try:
        if tarfile.is_tarfile(archive):
            _write_all(_tar_members(archive), archive, folder, budget)
        elif zipfile.is_zipfile(archive):
            _write_all(_zip_members(archive), archive, folder, budget)
        elif archive.suffix == ".gz":
            with gzip.open(archive) as content:
                _write(content, folder / archive.stem, budget, archive)
        else:
            shutil.copyfile(archive, folder / archive.name)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is damaged ({' '.join(str(error).split())}); remove it and run again") from error
    done.touch()


def _tar_members(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    with tarfile.open(archive) as opened:
        for member in opened:
            if member.isdir():
                continue
            yield member.name, opened.extractfile(member) if member.isreg() else None


def _zip_members(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            if member.is_dir():
                continue
            is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
            yield member.filename, None if is_link else opened.open(member)


def _write_all(members: Iterator[tuple[str, IO[bytes] | None]], archive: Path, folder: Path, budget: list[int]) -> None:
    for number, (name, content) in enumerate(members):
        plain = posixpath.normpath(name.replace("\\", "/"))
        if content is None or plain.startswith(("/", "..")) or ":" in plain.split("/")[0]:
            raise UserError(f"{archive} holds {name[:200]!r}, a link or a path that leads out of it; it is not unpacked: get it elsewhere, or unpack it yourself and give the folder with --source")
        if number >= MAX_MEMBERS:
            raise UserError(f"{archive} holds more than {MAX_MEMBERS:,} files; it is not unpacked further")
        _write(content, folder / plain, budget, archive)


def _write(content: IO[bytes], path: Path, budget: list[int], archive: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        while chunk := content.read(CHUNK_BYTES):
            budget[0] -= len(chunk)
            if budget[0] < 0:
                raise UserError(f"{archive} unpacks to more than {MAX_RATIO} times its size; it is not unpacked: get it elsewhere")
            file.write(chunk)
