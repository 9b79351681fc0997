"""Frames over a stream of bytes: a JSON text and blobs beside it, with limits; no pickle.

A frame is, in network byte order::

    "TSR1" | u32 bytes of the JSON text | u32 number of blobs | u64 bytes of each blob ... | JSON text | blobs ...

``Decoder`` knows no socket: it is fed what has arrived, in pieces of any size. ``Connection`` is it over a blocking
socket, for threads; ``Stream`` over asyncio's. A frame that is broken, too large or cut off raises BrokenFrame, after
which nothing more can be read: there is no way to find where the next frame begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

from tarsia.core.errors import ServeError

MAGIC: Final = b"TSR1"
_PRELUDE = struct.Struct("!4sII")
_LENGTH = struct.Struct("!Q")
_PIECE = 1 << 16  # bytes asked of a socket at once


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one frame holds: bytes of its text, number of its blobs, bytes of these together."""

    text: int = 32 << 20
    blobs: int = 256
    bytes: int = 256 << 20


LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class Frame:
    """A JSON text, encoded as UTF-8, and the blobs that came with it."""

    text: bytes
    blobs: tuple[bytes, ...] = ()


class BrokenFrame(ServeError):
    """Bytes that are no frame, or one that is larger than is allowed: the end of the connection."""

    def __init__(self, what: str, *, given: object = None, allowed: object = None) -> None:
        super().__init__("lost", what, given=given, allowed=allowed)


def packed(frame: Frame, limits: Limits = LIMITS) -> bytes:
    """The bytes of a frame. Raises BrokenFrame where no one would read it."""
    sizes = [len(blob) for blob in frame.blobs]
    _check(len(frame.text), len(sizes), limits)
    _check_bytes(sum(sizes), limits)
    prelude = _PRELUDE.pack(MAGIC, len(frame.text), len(sizes))
    return b"".join([prelude, *map(_LENGTH.pack, sizes), frame.text, *frame.blobs])


def _check(text: int, blobs: int, limits: Limits) -> None:
    if text > limits.text:
        raise BrokenFrame("A frame's text is too long.", given=f"{text} bytes", allowed=f"up to {limits.text}")
    if blobs > limits.blobs:
        raise BrokenFrame("A frame has too many blobs.", given=blobs, allowed=f"up to {limits.blobs}")


def _check_bytes(total: int, limits: Limits) -> None:
    if total > limits.bytes:
        raise BrokenFrame("A frame's blobs are too large.", given=f"{total} bytes", allowed=f"up to {limits.bytes}")


class Decoder:
    """Frames out of bytes that arrive in pieces."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self._held = bytearray()
        self._at = 0  # where the next frame begins in what is held
        self._need = _PRELUDE.size  # nothing can be said of it before this many bytes of it are held

    def feed(self, piece: bytes) -> list[Frame]:
        """The frames that are whole with this piece. Raises BrokenFrame as soon as one can not become whole."""
        self._held += piece
        frames = []
        while len(self._held) - self._at >= self._need and (frame := self._next()) is not None:
            frames.append(frame)
        if self._at:
            self._held, self._at = self._held[self._at :], 0
        return frames

    def end(self) -> None:
        """Nothing more will come. Raises BrokenFrame where a frame was cut off."""
        if self._held:
            raise BrokenFrame("A frame was cut off.", given=f"{len(self._held)} bytes of it")

    def _next(self) -> Frame | None:
        """The first frame that is held, or None, with what is needed for it now known."""
        magic, text, blobs = _PRELUDE.unpack_from(self._held, self._at)
        if magic != MAGIC:
            raise BrokenFrame("These bytes are no frame.", given=magic, allowed=MAGIC)
        _check(text, blobs, self.limits)
        held, lengths = len(self._held) - self._at, self._at + _PRELUDE.size
        start = _PRELUDE.size + blobs * _LENGTH.size
        if held < start:
            self._need = start
            return None
        sizes = [_LENGTH.unpack_from(self._held, lengths + n * _LENGTH.size)[0] for n in range(blobs)]
        _check_bytes(sum(sizes), self.limits)
        self._need = start + text + sum(sizes)
        if held < self._need:
            return None
        ends = list(accumulate([text, *sizes], initial=self._at + start))
        parts = [bytes(self._held[first:last]) for first, last in pairwise(ends)]
        self._at += self._need
        self._need = _PRELUDE.size
        return Frame(parts[0], tuple(parts[1:]))


class Connection:
    """Frames over a blocking socket; one thread receives, any may send."""

    def __init__(self, sock: socket.socket, limits: Limits = LIMITS) -> None:
        self._socket = sock
        self._limits = limits
        self._decoder = Decoder(limits)
        self._ready: list[Frame] = []
        self._lock = threading.Lock()
        self._closed = False

    def send(self, *frames: Frame) -> None:
        """Send frames, in one piece. Raises OSError where nobody is there any more."""
        data = b"".join(packed(frame, self._limits) for frame in frames)
        with self._lock:
            self._socket.sendall(data)

    def receive(self) -> Frame | None:
        """The next frame; None at the end. Raises BrokenFrame, OSError."""
        while not self._ready:
            try:
                piece = self._socket.recv(_PIECE)
            except OSError:
                if self._closed:
                    return None
                raise
            if not piece:
                self._decoder.end()
                return None
            self._ready = self._decoder.feed(piece)
        return self._ready.pop(0)

    def close(self) -> None:
        """End the connection; a thread that waits in ``receive`` is told so."""
        self._closed = True
        with contextlib.suppress(OSError):  # the other side may have been first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Stream:
    """Frames over a socket, in asyncio."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limits: Limits = LIMITS) -> None:
        self._reader, self._writer = reader, writer
        self._limits = limits
        self._decoder = Decoder(limits)
        self._ready: list[Frame] = []

    @classmethod
    async def of(cls, sock: socket.socket, limits: Limits = LIMITS) -> Stream:
        """A stream over a connected socket, which it owns from here on."""
        reader, writer = await asyncio.open_connection(sock=sock)
        return cls(reader, writer, limits)

    def post(self, frame: Frame) -> None:
        """Send one frame without waiting for the other side."""
        self._writer.write(packed(frame, self._limits))

    async def send(self, frame: Frame) -> None:
        """Send one frame, and wait while the other side is behind. Raises OSError where nobody is there any more."""
        self.post(frame)
        await self._writer.drain()

    async def receive(self) -> Frame | None:
        """The next frame; None at the end. Raises BrokenFrame, OSError."""
        while not self._ready:
            piece = await self._reader.read(_PIECE)
            if not piece:
                self._decoder.end()
                return None
            self._ready = self._decoder.feed(piece)
        return self._ready.pop(0)

    def close(self) -> None:
        """End the connection."""
        self._writer.close()
