"""Messages: every one comes back as it was, and what is no message is told as such."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tarsia.core.errors import ConfigError, ServeError
from tarsia.serve import wire
from tarsia.serve.frames import BrokenFrame, Frame
from tarsia.serve.request import Sampling

TEXT = st.text(max_size=20)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
MAYBE = st.none() | TEXT
PARTS = st.lists(st.builds(wire.TextPart, text=TEXT) | st.just(wire.PicturePart()), max_size=4).map(tuple)
SAMPLING = st.builds(
    Sampling,
    max_tokens=st.none() | st.integers(1, 100),
    temperature=FINITE,
    stop=st.lists(TEXT, max_size=3).map(tuple),
    seed=st.none() | st.integers(0, 2**63 - 1),
    bias=st.dictionaries(st.integers(0, 300000), FINITE, max_size=3),
    schema=MAYBE,
)
GENERATE = st.builds(
    wire.Generate,
    id=TEXT,
    messages=st.lists(
        st.builds(wire.ChatMessage, role=st.sampled_from(["system", "user", "assistant"]), content=PARTS), max_size=3
    ).map(tuple),
    adapter=MAYBE,
    sampling=SAMPLING,
    tenant=TEXT,
    seconds=st.none() | FINITE,
)
COMMANDS = st.one_of(
    GENERATE,
    st.builds(wire.Configure, model=TEXT, four_bits=st.none() | st.just({"codec": "nf4"})),
    st.builds(wire.Cancel, id=TEXT),
    st.builds(wire.Load, id=TEXT, name=TEXT, source=TEXT),
    st.builds(wire.Unload, id=TEXT, name=TEXT),
    st.builds(wire.Models, id=TEXT),
    st.just(wire.Drain()),
    st.just(wire.Stop()),
)
LIKELY = {"token": TEXT, "bytes": st.lists(st.integers(0, 255), max_size=4).map(tuple), "logprob": FINITE}
LOGPROBS = st.builds(wire.Logprob, **LIKELY, top=st.lists(st.builds(wire.Likely, **LIKELY), max_size=2).map(tuple))
EVENTS = st.one_of(
    st.builds(wire.Opening, what=TEXT),
    st.builds(wire.Unable, kind=st.just("invalid"), message=TEXT, given=MAYBE),
    st.builds(
        wire.Started,
        id=TEXT,
        adapter=st.none() | st.builds(wire.ServedAdapter, name=TEXT, version=st.none() | st.integers(1), hash=TEXT),
        routed=st.none() | st.dictionaries(TEXT, TEXT | FINITE, max_size=2),
        prompt_tokens=st.integers(0),
    ),
    st.builds(wire.Text, id=TEXT, text=TEXT, logprobs=st.none() | st.lists(LOGPROBS, max_size=2).map(tuple)),
    st.builds(wire.Done, id=TEXT, reason=st.sampled_from(["stop", "length"]), completion_tokens=st.integers(0)),
    st.builds(wire.Failed, id=TEXT, kind=st.just("timeout"), message=TEXT, allowed=MAYBE, do=MAYBE),
    st.builds(wire.Answer, id=TEXT),
    st.builds(wire.Stats, adapters=st.dictionaries(TEXT, st.builds(wire.AdapterStats), max_size=2)),
    st.builds(wire.Log, level=st.just("info"), what=TEXT, facts=st.dictionaries(TEXT, TEXT, max_size=2)),
    st.just(wire.Drained()),
)


@given(COMMANDS)
def test_a_command_comes_back_as_it_was(command):
    pictures = [
        b"a picture"
        for message in getattr(command, "messages", ())
        for part in message.content
        if isinstance(part, wire.PicturePart)
    ]
    frame = wire.framed(command, pictures)
    assert wire.command_in(frame) == command
    assert frame.blobs == tuple(pictures)


@given(EVENTS)
def test_an_event_comes_back_as_it_was(event):
    assert wire.event_in(wire.framed(event)) == event


@given(st.binary(max_size=60) | st.dictionaries(TEXT, TEXT, max_size=3).map(lambda d: json.dumps(d).encode()))
def test_what_is_no_message_is_a_broken_frame(text):
    for read in (wire.command_in, wire.event_in):
        with pytest.raises(BrokenFrame, match="no message"):
            read(Frame(text))


def test_a_command_is_no_event_and_nothing_is_added_to_one():
    with pytest.raises(BrokenFrame):
        wire.event_in(wire.framed(wire.Cancel(id="1")))
    with pytest.raises(BrokenFrame, match="message"):
        wire.command_in(Frame(b'{"command":"cancel","id":"1","more":2}'))


def test_blobs_are_the_pictures_no_more_no_fewer():
    message = wire.ChatMessage(role="user", content=(wire.PicturePart(), wire.TextPart(text="what?")))
    asked = wire.Generate(id="1", messages=(message,))
    for blobs in ([], [b"a", b"b"]):
        with pytest.raises(BrokenFrame, match="blobs are not its pictures"):
            wire.command_in(wire.framed(asked, blobs))
    with pytest.raises(BrokenFrame, match="no blobs"):
        wire.event_in(wire.framed(wire.Drained(), [b"a"]))


def test_an_error_crosses_with_all_that_it_says():
    error = ServeError("too_long", "Too long.", given=9, allowed="up to 8", do="say less")
    back = wire.event_in(wire.framed(wire.Failed.about("7", error)))
    assert (back.id, back.error.kind, str(back.error)) == ("7", "too_long", str(error))
    assert wire.Failed.about("7", ConfigError("No.")).kind == "invalid"
    assert wire.Failure.of(ConfigError("No."), "refused").kind == "refused"


def test_the_logarithm_of_nothing_can_be_written():
    for value, written in ((-1.5, -1.5), (float("-inf"), wire.LEAST_LOGPROB), (float("nan"), wire.LEAST_LOGPROB)):
        assert wire.Likely(token="a", bytes=(), logprob=wire.finite(value)).logprob == written
    with pytest.raises(ValueError):
        wire.Likely(token="a", bytes=(), logprob=float("-inf"))


def test_the_side_that_speaks_http_needs_no_torch():
    code = "import sys, tarsia.serve.wire, tarsia.serve.supervise; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
