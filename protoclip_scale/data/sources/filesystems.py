"""Filesystems of places, through fsspec: finite timeouts, no read-ahead, no stale listings; and what messages show of a URL."""

import logging
import os
import posixpath
import re
import urllib.parse
from typing import Any

import fsspec

from protoclip_scale.data.sources.formats import Place
from protoclip_scale.errors import UserError

CONNECT_SECONDS, READ_SECONDS = 15, 30  # a hung connection becomes an error, which is retried
EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def is_url(path: str) -> bool:
    return "://" in path


def is_remote(path: str) -> bool:
    """Whether errors of reading it may be a network's."""
    return is_url(path) and not path.startswith(("file://", "local://"))


def protocol_of(path: str) -> str:
    return path.split("://")[0] if is_url(path) else "file"


def join(root: str, pattern: str) -> str:
    """``pattern`` under ``root``; an absolute path or a URL stays what it is."""
    if is_url(pattern) or os.path.isabs(pattern):
        return pattern
    if is_url(root) and pattern in (".", "./"):
        return root
    return posixpath.join(root, pattern) if is_url(root) else os.path.normpath(os.path.join(root, pattern))


def options(url: str) -> dict[str, Any]:
    """fsspec's storage options: timeouts, and no read-ahead, so that each read is one request of exactly its bytes."""
    protocol = protocol_of(url)
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        return {"client_kwargs": {"trust_env": True, "timeout": timeout}, "cache_type": "none"}
    if protocol in ("s3", "s3a"):
        config = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "retries": {"max_attempts": 1}}
        return {"config_kwargs": config, "use_listings_cache": False, "default_cache_type": "none", "default_fill_cache": False}
    if protocol == "hf":
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # it warns of each of its own retries
        return {"block_size": 1 << 16}  # it always reads ahead
    return {}


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """(filesystem, path in it) of a path or URL. UserError for a protocol that is unknown or whose package is not installed."""
    try:
        return fsspec.core.url_to_fs(url, **options(url))
    except ImportError as error:
        package = EXTRAS.get(protocol_of(url))
        hint = f"pip install {package}" if package else f"install the package that fsspec needs for it ({error})"
        raise UserError(f"{shown(url)}: reading {protocol_of(url)}:// needs a package that is not installed: {hint}") from error
    except ValueError as error:
        if "rotocol" not in str(error):
            raise
        raise UserError(f"{shown(url)}: the protocol {protocol_of(url)}:// is not known; use a local path, http(s)://, s3:// or hf://") from error


def full_url(place: Place) -> str:
    """What opens the place's file again, in another process too; never shown, for it may hold a signature."""
    return full_url_of(place.filesystem, place.path)


def full_url_of(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    """The URL of a path in a filesystem; a local path stays one."""
    protocols = (filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol
    return path if "file" in protocols or is_url(path) else str(filesystem.unstrip_protocol(path))


def without_query(url: str) -> str:
    """An http(s) URL without a query that follows a file name with a suffix: a signature, not part of the name."""
    if protocol_of(url) in ("http", "https"):
        path, mark, _ = url.partition("?")
        if mark and re.search(r"\.\w+$", posixpath.basename(path)):
            return path
    return url


def shown(url: str) -> str:
    """The URL as messages show it: no password, no signature."""
    if not is_url(url):
        return url
    parts = urllib.parse.urlsplit(without_query(url))
    if "@" in parts.netloc and parts.scheme in ("http", "https", "ftp", "sftp"):
        return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return without_query(url)


def shown_pattern(pattern: str, root: str) -> str:
    """A pattern as messages show it."""
    full = join(root, pattern)
    return shown(pattern) if is_url(pattern) or without_query(full) == full else pattern.partition("?")[0]
