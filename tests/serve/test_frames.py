"""Frames: round trips in pieces of any size, and everything that is no frame is named."""

import asyncio
import json
import socket
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tarsia.serve.frames import MAGIC, BrokenFrame, Connection, Decoder, Frame, Limits, Stream, packed

FRAMES = st.builds(Frame, st.binary(max_size=300), st.lists(st.binary(max_size=200), max_size=4).map(tuple))
SMALL = Limits(text=20, blobs=2, bytes=30)


@given(st.lists(FRAMES, max_size=4), st.lists(st.integers(1, 120), min_size=1))
def test_what_is_packed_comes_out_whatever_the_pieces(frames, sizes):
    data, decoder, out, n = b"".join(map(packed, frames)), Decoder(), [], 0
    while data:
        size = sizes[n % len(sizes)]
        out += decoder.feed(data[:size])
        data, n = data[size:], n + 1
    decoder.end()
    assert out == frames


@given(FRAMES, st.data())
def test_a_frame_that_is_cut_off_is_told(frame, data):
    whole = packed(frame)
    cut = data.draw(st.integers(1, len(whole) - 1))
    decoder = Decoder()
    assert decoder.feed(whole[:cut]) == []
    with pytest.raises(BrokenFrame, match="cut off"):
        decoder.end()


@given(st.binary(min_size=12, max_size=200).filter(lambda data: data[:4] != MAGIC))
def test_bytes_that_are_no_frame_are_told_at_once(data):
    with pytest.raises(BrokenFrame, match="no frame"):
        Decoder().feed(data)


@pytest.mark.parametrize(
    "text, sizes, said",
    [(21, (), "text is too long"), (0, (1, 1, 1), "too many blobs"), (0, (30, 1), "blobs are too large")],
)
def test_a_frame_that_is_too_large_is_neither_sent_nor_awaited(text, sizes, said):
    with pytest.raises(BrokenFrame, match=said):
        packed(Frame(bytes(text), tuple(map(bytes, sizes))), SMALL)
    # The head alone is refused: nobody waits for, or keeps, what it announces.
    head = struct.pack("!4sII", MAGIC, text, len(sizes)) + b"".join(struct.pack("!Q", size) for size in sizes)
    with pytest.raises(BrokenFrame, match=said):
        Decoder(SMALL).feed(head)


def test_an_enormous_length_asks_for_no_memory():
    with pytest.raises(BrokenFrame, match="too large"):
        Decoder().feed(struct.pack("!4sIIQ", MAGIC, 2, 1, 2**63))


def test_exactly_as_much_as_is_allowed_passes():
    frame = Frame(bytes(20), (bytes(15), bytes(15)))
    assert Decoder(SMALL).feed(packed(frame, SMALL)) == [frame]


def test_both_sides_of_a_socket():
    ours, theirs = socket.socketpair()
    frames = [Frame(json.dumps({"n": n}).encode(), (bytes([n]) * n * 5000,)) for n in range(40)]

    def echo():
        connection = Connection(theirs)
        while (frame := connection.receive()) is not None:
            connection.send(frame)
        connection.close()

    async def talk():
        stream = await Stream.of(ours)
        sending = asyncio.create_task(_all(stream, frames))
        heard = [await stream.receive() for _ in frames]
        await sending
        stream.close()
        return heard

    other = threading.Thread(target=echo)
    other.start()
    assert asyncio.run(talk()) == frames
    other.join(10)
    assert not other.is_alive()


async def _all(stream, frames):
    for frame in frames:
        await stream.send(frame)


def test_the_end_and_a_cut_are_different():
    for data, said in ((b"", None), (packed(Frame(b"{}"))[:-1], "cut off")):
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(data)
        connection = Connection(ours)
        if said is None:
            assert connection.receive() is None
        else:
            with pytest.raises(BrokenFrame, match=said):
                connection.receive()
        connection.close()


def test_closing_wakes_the_thread_that_waits():
    ours, theirs = socket.socketpair()
    connection, heard = Connection(ours), []
    waiting = threading.Thread(target=lambda: heard.append(connection.receive()))
    waiting.start()
    connection.close()
    waiting.join(10)
    theirs.close()
    assert heard == [None]
