"""Fetch the npm and Debian packages the corpus is made of, and unpack what is needed from them with limits."""

import hashlib
import posixpath
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO

from protoclip_scale.errors import UserError

# name@version -> SHA-256 of the archive: an npm version never changes, so a differing archive is not the one we know.
NPM_PACKAGES = {
    "@iconify-json/noto@1.2.9": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "@lobehub/fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "@iconify-json/twemoji@1.2.5": "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    "emojibase-data@17.0.0": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}
DEBIAN_PACKAGES = ("openclipart-png", "openclipart-svg")  # their archives are checked by apt against the signed index
MAX_MEMBERS = 50_000
MAX_MEMBER_BYTES = 64 * 2**20
MAX_TOTAL_BYTES = 2**30


def fetch_npm(package: str, folder: Path) -> Path:
    """Archive of `package` (name@version, a key of `NPM_PACKAGES`) in `folder`, downloaded by `npm pack` unless it lies there."""
    name, version = package.rsplit("@", 1)
    archive = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.is_file():
        _run(["npm", "pack", "--silent", "--ignore-scripts", package], folder)
    if not archive.is_file():
        raise UserError(f"npm pack {package} left no {archive.name} in {folder}; run it there by hand to see why")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != NPM_PACKAGES[package]:
        raise UserError(f"{archive}: SHA-256 is {found}, expected {NPM_PACKAGES[package]}; delete the file and run again")
    return archive


def fetch_debian(package: str, folder: Path) -> Path:
    """Archive of the Debian `package` in `folder`, downloaded by `apt-get download` unless one lies there."""
    if not list(folder.glob(f"{package}_*.deb")):
        _run(["apt-get", "download", package], folder)
    archives = sorted(folder.glob(f"{package}_*.deb"))
    if len(archives) != 1:
        raise UserError(f"{folder}: {len(archives)} files match {package}_*.deb, one is needed; run `apt-get update` or delete the others")
    return archives[0]


def unpack_npm(archive: Path, folder: Path) -> Path:
    """Unpack an npm archive into `folder`; returns the folder that holds package.json."""
    with archive.open("rb") as stream:
        unpack_tar(stream, "r|gz", folder, str(archive))
    return folder / "package"


def unpack_debian(archive: Path, folder: Path) -> Path:
    """Unpack the clip art of a Debian archive into `folder`; returns the folder above `png/` or `svg/`."""
    prefix = "usr/share/openclipart/"
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        unpack_tar(process.stdout, "r|", folder, str(archive), lambda name: name.startswith(prefix))
        process.stdout.read()
    if process.returncode != 0:
        raise UserError(f"{archive}: dpkg-deb failed with exit code {process.returncode}; delete the file and run again")
    return folder / prefix


def unpack_tar(stream: IO[bytes], mode: str, folder: Path, origin: str, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Write the files of a tar stream below `folder`. A link becomes a copy of the file it names, or nothing if that is not unpacked.

    UserError, naming `origin`, for a path that leaves `folder` and for more or larger files than the limits of this module.
    """
    links: dict[Path, Path] = {}
    num_members = total_bytes = 0
    try:
        with tarfile.open(fileobj=stream, mode=mode) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                num_members += 1
                if num_members > MAX_MEMBERS:
                    raise UserError(f"{origin}: more than {MAX_MEMBERS} entries; this is not the package it should be")
                if not (member.isreg() or member.islnk() or member.issym()) or not wanted(name):
                    continue
                target = _safe_path(folder, name, origin)
                if not member.isreg():
                    start = "" if member.islnk() else posixpath.dirname(name)
                    links[target] = _safe_path(folder, posixpath.normpath(posixpath.join(start, member.linkname)), origin)
                    continue
                total_bytes += member.size
                if member.size > MAX_MEMBER_BYTES or total_bytes > MAX_TOTAL_BYTES:
                    raise UserError(f"{origin}: {name} is past the limit of {MAX_MEMBER_BYTES} bytes a file, {MAX_TOTAL_BYTES} in all")
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    shutil.copyfileobj(tar.extractfile(member), file)
        for target, source in links.items():
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{origin}: cannot be unpacked into {folder} ({error}); delete the archive and run again") from error


def _safe_path(folder: Path, name: str, origin: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UserError(f"{origin}: unsafe path {name!r}; this is not the package it should be")
    return folder / path


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise UserError(f"`{command[0]}` is not installed; install it, or put the package archives into {folder} yourself")
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"`{' '.join(command)}` failed in {folder}: {last_line}")
