"""Which network addresses a list from the web may lead to: public ones, so that no line of it makes this machine ask its own network.

The check stands where names become addresses, and before every request for addresses written as such; connections go to the very
addresses that were checked, also after redirects.
"""

import ipaddress
import socket

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # NAT64: the last four bytes are an IPv4 address


class PrivateAddress(OSError):
    """The host is, or its name stands for, an address that is not public."""


def is_public(text: str) -> bool:
    """False for loopback, private, link-local, shared, reserved and multicast addresses, and for IPv6 forms of such IPv4 addresses."""
    address = ipaddress.ip_address(text.split("%")[0])
    if address.version == 6:
        inner = address.ipv4_mapped or address.sixtofour
        if address in TRANSLATED:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return address.is_global and not address.is_multicast and not address.is_reserved


def check_literal(host: str) -> None:
    """PrivateAddress if ``host`` is written as an address and is not public; names are left to the resolver.

    127.1, 0x7f000001, 0177.0.0.1 and 2130706433 are addresses to the system's functions, and not to ``ipaddress``: what ends in a number, as no name does, is refused.
    """
    try:
        public = is_public(host)
    except ValueError:
        if _ends_in_number(host):
            raise PrivateAddress(f"{host} is an address in a form that is not accepted; only 1.2.3.4 and IPv6 are") from None
        return
    if not public:
        raise PrivateAddress(f"{host} is not a public address")


def _ends_in_number(host: str) -> bool:
    """The rule of the WHATWG URL standard, by which such a host is an IPv4 address or nothing: its last part is decimal, or hexadecimal after 0x."""
    last = host.rstrip(".").rpartition(".")[2].lower()
    return last.isdecimal() or (last.startswith("0x") and not last[2:].strip("0123456789abcdef")) or not last


class PublicResolver(AbstractResolver):
    """Names to their public addresses; PrivateAddress if a name has others only."""

    def __init__(self):
        self._resolver = ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        public = [entry for entry in found if is_public(entry["host"])]
        if found and not public:
            raise PrivateAddress(f"{host} stands for {found[0]['host']}, which is not a public address")
        return public

    async def close(self) -> None:
        await self._resolver.close()
