"""Pictures from hosts that the server's owner named, and from nowhere else.

A host is allowed by its exact name. Its name is looked up once, every address that comes back is looked at, and the
connection goes to one of those very addresses, so a second look-up can not lead elsewhere (DNS rebinding); the
certificate is still held against the name. Addresses that are not the public's (this machine, its network, link-local
and metadata addresses, and IPv6 forms of these) are refused, unless the owner allowed just that address.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from tarsia.core.errors import ConfigError
from tarsia.serve.http.errors import Refusal, shown
from tarsia.serve.http.pictures import MEDIA, Seen, checked
from tarsia.serve.http.room import Share
from tarsia.serve.http.settings import Limits, Remote

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
_PORTS: Final = {"http": 80, "https": 443}
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


async def look_up(host: str, port: int) -> list[str]:
    """Addresses of a host by the system's resolver."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: Address) -> bool:
    """Whether an address is anybody's. IPv6 forms of IPv4 addresses are what they hold; NAT64's are nobody's."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        inner = [address.sixtofour, *(address.teredo or ())]
        if address.is_site_local or any(one is not None and not is_public(one) for one in inner):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


@dataclass(frozen=True, slots=True)
class Allowed:
    """A host that pictures may come from; ``address`` where the owner wrote one, ``port`` None: 80 and 443."""

    host: str
    port: int | None
    address: Address | None

    @classmethod
    def parse(cls, text: str) -> Allowed:
        """``host``, ``host:port``, ``10.0.0.7``, ``[::1]:80``. Raises ConfigError for patterns, paths and URLs."""
        try:
            url = httpx.URL(f"http://{text}")
            if (
                not url.host
                or str(url.raw_path, "ascii") != "/"
                or url.userinfo
                or set(text) & set("*/?#@ \\%")
                or (url.port or 0) > 65_535
            ):
                raise ValueError
        except (ValueError, httpx.InvalidURL):
            raise ConfigError(
                "A host that pictures may come from is a name or an address.", given=text, allowed="HOST or HOST:PORT"
            ) from None
        port = url.port if url.port is not None else 80 if text.endswith(":80") else None
        return cls(url.raw_host.decode("ascii").lower(), port, _address(url.host))


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


@dataclass(eq=False)
class Fetcher:
    """Fetches pictures within ``remote`` and ``limits``; ``look_up`` resolves names."""

    remote: Remote
    limits: Limits
    look_up: Lookup = look_up
    allowed: tuple[Allowed, ...] = field(init=False)
    _turns: asyncio.Semaphore = field(init=False)
    _trust: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        self.allowed = tuple(Allowed.parse(host) for host in self.remote.hosts)
        self._turns = asyncio.Semaphore(self.remote.at_once)
        if self.allowed:  # read once, here: certificates are many
            self._trust = httpx.create_ssl_context(trust_env=False)

    async def fetch(self, text: str, where: str, share: Share) -> Seen:
        """The picture at an address, which ``share`` then holds.

        Raises Refusal: 400, what the host says is never repeated; 429 where there is no room for it now.
        """
        if not self.allowed:
            raise Refusal.invalid(
                "Pictures are not fetched from other hosts here.", where, do="send the picture as a data URL"
            )
        try:
            async with asyncio.timeout(self.remote.seconds), self._turns:
                return await self._follow(text, where, share)
        except TimeoutError:
            raise _failed("it took too long", where) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError, ValueError) as error:
            raise _failed(type(error).__name__, where) from None

    async def _follow(self, text: str, where: str, share: Share) -> Seen:
        url = _parsed(text, where)
        for _ in range(self.remote.redirects + 1):
            found = await self._get(url, await self._pinned(url, where), where, share)
            if isinstance(found, Seen):
                return found
            url = _parsed(str(url.join(found)), where)
        raise _failed("it is sent on too often", where)

    async def _pinned(self, url: httpx.URL, where: str) -> str:
        """The address to connect to, which was looked at. Raises Refusal for a host that is not allowed."""
        host, port = url.raw_host.decode("ascii").lower(), url.port or _PORTS[url.scheme]
        entry = next(
            (one for one in self.allowed if one.host == host and port in (one.port or 80, one.port or 443)), None
        )
        if entry is None:
            raise Refusal.invalid(
                "Pictures are not fetched from this host.", where, given=shown(f"{host}:{port}"),
                do="send the picture as a data URL",
            )  # fmt: skip
        if entry.address is not None:
            return str(entry.address)
        found = [ipaddress.ip_address(one.partition("%")[0]) for one in await self.look_up(host, port)]
        if not found or not all(map(is_public, found)):
            raise _failed("its name leads to an address that is not the public's", where)
        return str(found[0])

    async def _get(self, url: httpx.URL, address: str, where: str, share: Share) -> Seen | str:
        """The picture, or where it is said to be instead."""
        port = url.port or _PORTS[url.scheme]
        extensions = {"sni_hostname": url.raw_host.decode("ascii")} if _address(url.host) is None else {}
        headers = {"host": url.netloc.decode("ascii"), "accept": ", ".join(MEDIA), "accept-encoding": "identity"}
        assert self._trust is not None
        more: dict[str, Any] = {"trust_env": False, "follow_redirects": False, "timeout": self.remote.seconds}
        async with (
            httpx.AsyncClient(verify=self._trust, **more) as client,
            client.stream(
                "GET", url.copy_with(host=address, port=port, fragment=None), headers=headers, extensions=extensions
            ) as answer,
        ):
            if answer.status_code in _REDIRECTS:
                return str(answer.headers.get("location", ""))
            if answer.status_code != 200:
                raise _failed(f"it answered {answer.status_code}", where)
            media = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
            if media not in MEDIA or answer.headers.get("content-encoding", "identity") != "identity":
                raise _failed("it is no picture of a type that is taken", where)
            raw = await self._body(answer, where, share)
        return checked(raw, media, self.limits, where)

    async def _body(self, answer: httpx.Response, where: str, share: Share) -> bytes:
        """All that is sent, where it is not more than a picture may have."""
        raw = bytearray()
        async for piece in answer.aiter_raw():
            share.take(len(piece))
            raw += piece
            if len(raw) > self.limits.picture:
                raise _failed(f"it has more than {self.limits.picture} bytes", where)
        return bytes(raw)


def _parsed(text: str, where: str) -> httpx.URL:
    """An address that says no more than a scheme, a host, a path and a query."""
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, UnicodeError, ValueError):
        raise Refusal.invalid("This is no address of a picture.", where, given=shown(text)) from None
    plain = url.scheme in _PORTS and url.host and not url.userinfo and not set(text) & set("\\ \t\r\n\x00")
    if not plain or len(text) > 2048:
        raise Refusal.invalid(
            "This is no address that a picture could be fetched from.", where, given=shown(text),
            allowed="http://HOST/..., https://HOST/..., without user and password",
        )  # fmt: skip
    return url


def _failed(why: str, where: str) -> Refusal:
    return Refusal.invalid("The picture could not be fetched.", where, given=why, do="send it as a data URL")
