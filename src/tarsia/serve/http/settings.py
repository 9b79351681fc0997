"""What the HTTP side may do and how much of it, as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from tarsia.serve.bounds import BOUNDS, PICTURES
from tarsia.serve.http.keys import Keyring

MIB: Final = 2**20
LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
"""What a client on this machine may call it where nobody needs a key."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request, then of all together. Bytes, pixels, seconds, tokens, pieces."""

    body: int = 32 * MIB
    structure: int = 300_000
    """Commas and opening brackets in a body: what is made of JSON takes at most about 100 times as many bytes."""
    messages: int = 256
    text: int = 1_000_000
    """Characters of all texts together."""
    pictures: int = PICTURES
    picture: int = BOUNDS.bytes
    pixels: int = BOUNDS.pixels
    stretch: float = BOUNDS.stretch
    """A picture's longer side against its shorter."""
    all_pixels: int = 128_000_000
    all_pictures: int = 64 * MIB
    """Bytes of a request's pictures together."""
    tokens: int = 4096
    choices: int = 8
    logprobs: int = 20
    stops: int = 16
    stop: int = 256
    biases: int = 1024
    schema: int = 64 * 1024
    seconds: float = 600.0
    body_seconds: float = 60.0
    rate: int = 1024
    """Bytes a second that a body must come with, after its first two seconds, and an answer be read with."""
    write_seconds: float = 30.0
    """How long a client may take to read what is sent."""
    connections: int = 768
    queue: int = 512
    tenant_queue: int = 256
    bodies: int = 512 * MIB
    """All that came from clients, or for them from other hosts, and is not with the worker yet (see ``room``)."""


@dataclass(frozen=True, slots=True)
class Remote:
    """From where pictures may be fetched: ``host`` (ports 80 and 443), ``host:port``, or an address. None: nowhere."""

    hosts: tuple[str, ...] = ()
    seconds: float = 10.0
    redirects: int = 3
    at_once: int = 8


@dataclass(frozen=True, slots=True)
class Settings:
    """How the HTTP side behaves.

    ``name`` is what the base is asked for by (None: what the worker calls it). ``keys`` None: nobody needs a key, and
    only ``hosts`` (None: loopback names) are answered, so that no web page can ask by a name that it made up.
    ``loading``: aliases may be made, of references of the library and of folders below ``sources``.
    ``counted``: how many adapters have metrics of their own.
    """

    name: str | None = None
    keys: Keyring | None = None
    hosts: tuple[str, ...] | None = None
    limits: Limits = field(default_factory=Limits)
    remote: Remote = field(default_factory=Remote)
    loading: bool = False
    sources: tuple[str, ...] = ()
    counted: int = 100
    docs: bool = True

    @property
    def called(self) -> tuple[str, ...] | None:
        """Host names that are answered, in small letters; None: any."""
        if self.hosts is not None:
            return tuple(host.lower() for host in self.hosts)
        return LOOPBACK if self.keys is None else None
