"""One image from one URL: limits on time, bytes, redirects and places; tried again where trying again can help."""

import asyncio
import contextlib
import email.utils
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Self

import aiohttp
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from protoclip_scale import __version__
from protoclip_scale.data.randomness import generator
from protoclip_scale.preparation.addresses import PrivateAddress, PublicResolver, check_literal

USER_AGENT = f"protoclip-scale-gather-images/{__version__} (collects image-text pairs from a published list)"
ACCEPT = "image/avif,image/webp,image/png,image/jpeg,image/*;q=0.8,*/*;q=0.5"
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex"})  # of X-Robots-Tag
REDIRECTS = frozenset({301, 302, 303, 307, 308})
LATER = frozenset({408, 425, 429, 500, 502, 503, 504})  # status codes that may be different in a moment
DNS_THREADS = 32
MAX_WAIT_SECONDS = 60.0
CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class DownloadSettings:
    """connections: in all. per_host: to one host. timeout: seconds for one answer with its body. retries: further tries after the first."""

    connections: int = 64
    per_host: int = 8
    timeout: float = 30.0
    retries: int = 3
    backoff: float = 1.0  # seconds before the first retry at most; doubled for each further one
    redirects: int = 5
    max_bytes: int = 20_000_000
    allow_private: bool = False
    ignore_opt_out: bool = False
    user_agent: str = USER_AGENT


class Failure(NamedTuple):
    """Why there is no image. ``reason``: one of few, for tables; ``detail``: for people."""

    reason: str
    detail: str = ""
    tries: int = 1


class _Refused(Exception):
    """One try failed. ``again``: another may not; ``wait``: seconds that the server asks for."""

    def __init__(self, reason: str, detail: str = "", again: bool = False, wait: float = 0.0):
        super().__init__(reason)
        self.reason, self.detail, self.again, self.wait = reason, detail, again, wait


@dataclass
class _Host:
    free: asyncio.Semaphore
    users: int = 0


class Downloader:
    """Fetches many URLs at once; an asynchronous context manager. A host never sees more than ``per_host`` requests at a time, and no more
    than ``backlog`` bodies wait to be used, so memory is at most (connections + backlog) x max_bytes."""

    def __init__(self, settings: DownloadSettings, backlog: int):
        self.settings, self.backlog = settings, backlog
        self._hosts: dict[str, _Host] = {}

    async def __aenter__(self) -> Self:
        settings = self.settings
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(DNS_THREADS, "dns"))
        self._connections, self._backlog = asyncio.Semaphore(settings.connections), asyncio.Semaphore(self.backlog)
        resolver = ThreadedResolver() if settings.allow_private else PublicResolver()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=settings.connections, resolver=resolver, ttl_dns_cache=600),
            timeout=aiohttp.ClientTimeout(total=settings.timeout),
            headers={"User-Agent": settings.user_agent, "Accept": ACCEPT},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    @contextlib.asynccontextmanager
    async def fetch(self, url: str) -> AsyncIterator[bytes | Failure]:
        """``async with downloader.fetch(url) as body: ...``; the body counts as waiting until the block ends."""
        body = await self._try(url)
        try:
            yield body
        finally:
            if isinstance(body, bytes):
                self._backlog.release()

    async def _try(self, url: str) -> bytes | Failure:
        """The body of the answer. Waits between tries grow twofold with jitter, which is a function of the URL and the try."""
        seed = int.from_bytes(blake2b(url.encode("utf-8", "replace"), digest_size=7).digest(), "big")
        tries = 0
        while True:
            tries += 1
            try:
                return await self._follow(url)
            except _Refused as refused:
                if not refused.again or tries > self.settings.retries:
                    return Failure(refused.reason, refused.detail, tries)
                jitter = generator(0, "gather back-off", seed, tries).random()
                wait = self.settings.backoff * 2 ** (tries - 1) * (0.5 + jitter / 2)
                await asyncio.sleep(min(max(wait, refused.wait), MAX_WAIT_SECONDS))
            except Exception as error:  # whatever one server says costs one row, not the list
                return Failure("bad answer", f"{type(error).__name__}: {error}", tries)

    async def _follow(self, text: str) -> bytes:
        try:
            url = URL(text)
        except ValueError as error:
            raise _Refused("bad url", str(error)) from None
        for _ in range(self.settings.redirects + 1):
            answer = await self._ask(url)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise _Refused("too many redirects", f"more than {self.settings.redirects}")

    async def _ask(self, url: URL) -> bytes | URL:
        """One request: the body, or where it is said to be."""
        if url.scheme not in ("http", "https") or not url.host:
            raise _Refused("bad url", f"{str(url)[:200]} is not an http or https URL")
        try:
            if not self.settings.allow_private:
                check_literal(url.host)
            async with self._slot(url.host):
                async with self._session.get(url, allow_redirects=False) as response:
                    answer = await self._read(url, response)
                if isinstance(answer, bytes):
                    await self._backlog.acquire()  # here, so that a full backlog holds connections back
                return answer
        except TimeoutError:
            raise _Refused("timeout", f"no whole answer within {self.settings.timeout:g} s", again=True) from None
        except PrivateAddress as error:
            raise _Refused("private address", str(error)) from None
        except aiohttp.ClientConnectorDNSError as error:
            if isinstance(error.os_error, PrivateAddress):
                raise _Refused("private address", str(error.os_error)) from None
            again = getattr(error.os_error, "errno", None) == socket.EAI_AGAIN
            raise _Refused("dns", f"{url.host}: {error.os_error.strerror or error.os_error}", again) from None
        except (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch) as error:
            raise _Refused("tls", str(error)) from None
        except aiohttp.InvalidURL as error:
            raise _Refused("bad url", str(error)) from None
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
            raise _Refused("connection", str(error) or type(error).__name__, again=True) from None
        except (aiohttp.ClientError, ValueError) as error:  # a host that cannot be encoded, headers that cannot be read
            raise _Refused("bad answer", str(error) or type(error).__name__) from None

    async def _read(self, url: URL, response: aiohttp.ClientResponse) -> bytes | URL:
        if response.status in REDIRECTS and "Location" in response.headers:
            return url.join(URL(response.headers["Location"]))
        if response.status != 200:
            wait = _seconds(response.headers.get("Retry-After", ""))
            raise _Refused(f"http {response.status}", response.reason or "", response.status in LATER, wait)
        if not self.settings.ignore_opt_out and (tag := _opt_out(response)):
            raise _Refused("opted out", f"X-Robots-Tag: {tag}")
        limit = self.settings.max_bytes
        if response.content_length is not None and response.content_length > limit:
            raise _Refused("too big", f"{response.content_length} bytes, more than {limit}")
        body = bytearray()
        async for chunk in response.content.iter_chunked(CHUNK_BYTES):  # decompressed, so the limit holds for that
            body += chunk
            if len(body) > limit:
                raise _Refused("too big", f"more than {limit} bytes")
        if not body:
            raise _Refused("empty answer")
        return bytes(body)

    @contextlib.asynccontextmanager
    async def _slot(self, name: str) -> AsyncIterator[None]:
        """A connection to a host. The time spent waiting for it counts for no timeout."""
        host = self._hosts.setdefault(name, _Host(asyncio.Semaphore(self.settings.per_host)))
        host.users += 1
        try:
            async with host.free, self._connections:
                yield
        finally:
            host.users -= 1
            if not host.users:
                del self._hosts[name]


def _seconds(retry_after: str) -> float:
    """Retry-After as seconds from now; 0 if it says nothing."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    with contextlib.suppress(ValueError, OverflowError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0.0


def _opt_out(response: aiohttp.ClientResponse) -> str:
    """The X-Robots-Tag that asks not to be used like this, for every robot; '' if there is none."""
    for tag in response.headers.getall("X-Robots-Tag", ()):
        if OPT_OUTS & {part.strip().lower() for part in tag.split(",")}:
            return tag
    return ""
