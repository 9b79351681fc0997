"""How requests are framed, how large, how slow, how many: over bare sockets where clients would not do it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.http_world import SECRETS, Running, chat, keyring, running
from uvicorn.server import ServerState

from tarsia.core.errors import ConfigError
from tarsia.serve.http import gate, listen, strict
from tarsia.serve.http import running as http_running
from tarsia.serve.http.errors import Refusal
from tarsia.serve.http.keys import ANYBODY, Key, Keyring, new_key
from tarsia.serve.http.limits import Admission, Bucket
from tarsia.serve.http.room import Room, Share
from tarsia.serve.http.settings import Limits, Settings

LIMITS = Limits(
    body=200_000, structure=5000, messages=5, text=5000, tokens=64, choices=4, stops=3, stop=10, biases=5, schema=500,
    seconds=0.4, body_seconds=1.0, rate=100_000_000, bodies=600_000, write_seconds=0.4,
)  # fmt: skip


@pytest.fixture(scope="module")
def tight() -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch, running(Settings(limits=LIMITS)) as server:
        for module, name in ((gate, "_GRACE"), (gate, "_LINGER"), (http_running, "_OVER")):
            patch.setattr(module, name, 0.3)
        yield server


@pytest.fixture(scope="module")
def keyed() -> Iterator[Running]:
    with running(Settings(keys=keyring(), limits=Limits(queue=3, tenant_queue=2))) as server:
        yield server


def raw(server: Running, sent: bytes, *, half: bool = False) -> bytes:
    """What comes back for these bytes until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as link:
        link.sendall(sent)
        if half:
            link.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := link.recv(65536):
            answer += piece
        return answer


def head(*lines: str, path: str = "/v1/chat/completions", host: str = "localhost") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode("latin-1")


JSON = "Content-Type: application/json"
SAID = json.dumps(chat()).encode()


def post(server: Running, body: bytes | dict[str, Any], **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json", **headers}
    return httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=sent, timeout=20)


# Framing -------------------------------------------------------------------------------------------------------------


def test_a_length_and_chunks_together_are_refused_and_the_connection_ends(tight: Running) -> None:
    """A second request hidden behind the first one's end is never read."""
    hidden = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for lines in (
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Content-Length: 5"),
    ):
        answer = raw(tight, head(JSON, *lines) + b"0\r\n\r\n" + hidden)
        assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1
        assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: -1",),
        ("Content-Length: 5x",),
        ("Content-Length: 0x10",),
        ("Content-Length: +5",),
        ("Transfer-Encoding: gzip, chunked",),
        ("Transfer-Encoding: xchunked",),
        ("Transfer-Encoding : chunked",),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        ("Content-Length: 5", "X: a\0b"),
        ("Host: other", "Content-Length: 5"),
        ("Authorization: a", "Authorization: b", "Content-Length: 5"),
        ("Content-Type: application/json", "Content-Type: text/plain", "Content-Length: 5"),
    ],
)
def test_what_two_readers_would_read_differently(tight: Running, lines: tuple[str, ...]) -> None:
    before = len(tight.fake.asked)
    assert raw(tight, head(*lines) + b"12345", half=True)[:12] == b"HTTP/1.1 400"
    assert len(tight.fake.asked) == before


def test_a_bare_line_feed_in_a_header_makes_no_header(tight: Running) -> None:
    answer = raw(tight, head(JSON, f"Content-Length: {len(SAID)}", "X: a\rY: b") + SAID, half=True)
    assert answer.startswith(b"HTTP/1.1 400")


def test_a_name_that_a_web_page_made_up_is_not_answered(tight: Running) -> None:
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "", "127.0.0.1.nip.io", "[::2]"):
        answer = httpx.get(f"{tight.url}/health", headers={"host": host})
        assert answer.status_code in (400, 421), host
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:8000"):
        assert httpx.get(f"{tight.url}/health", headers={"host": host}).status_code == 200, host


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_page_in_a_browser_can_not_ask(tight: Running, media: str) -> None:
    """What a form or a script may send to any host without being asked is no JSON by its media type."""
    assert post(tight, SAID, **{"content-type": media, "origin": "https://evil.example"}).status_code == 415
    answer = httpx.options(f"{tight.url}/v1/chat/completions", headers={"origin": "https://evil.example"})
    assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers


def test_no_websocket_no_slash_no_proxy_header(tight: Running) -> None:
    upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13", "sec-websocket-key": "x"}
    assert httpx.get(f"{tight.url}/v1/ws", headers=upgrade).status_code == 404
    assert httpx.get(f"{tight.url}/v1/models/", headers={"x-forwarded-host": "evil"}).status_code == 404
    answer = httpx.get(f"{tight.url}//evil.example/v1/models")
    assert answer.status_code == 404 and "location" not in answer.headers
    assert "server" not in answer.headers and answer.headers["x-content-type-options"] == "nosniff"


# Size and time -------------------------------------------------------------------------------------------------------


def test_too_large_by_its_length_or_by_what_comes(tight: Running) -> None:
    answer = raw(tight, head(JSON, "Content-Length: 200001"))
    assert answer.startswith(b"HTTP/1.1 413")
    assert raw(tight, head(JSON, f"Content-Length: {10**15}"))[:12] == b"HTTP/1.1 413"
    chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    assert raw(tight, head(JSON, "Transfer-Encoding: chunked") + chunk * 4)[:12] == b"HTTP/1.1 413"
    assert post(tight, b"[" * 199_000).status_code == 400


def test_a_body_that_comes_slowly_or_not_at_all(tight: Running) -> None:
    assert raw(tight, head(JSON, "Content-Length: 100") + b"{")[:12] == b"HTTP/1.1 408"
    assert raw(tight, head(JSON, "Transfer-Encoding: chunked") + b"1\r\n{\r\n")[:12] == b"HTTP/1.1 408"


def test_a_body_whose_framing_breaks_off(tight: Running, caplog: pytest.LogCaptureFixture) -> None:
    """It is answered where it is seen, below the application, which says nothing more."""
    sent = head(JSON, "Transfer-Encoding: chunked") + b"1\r\n{\r\n"
    before = len(tight.logged())
    assert raw(tight, sent + b"xyz\r\n").count(b"HTTP/1.1 400") == 1
    assert tight.soon(lambda: len(tight.logged()) == before + 1)
    assert tight.logged()[-1]["code"] in ("broken_framing", "gone")
    assert "Traceback" not in caplog.text


def test_a_head_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "_HEADER_SECONDS", 0.3)
    with running() as server:
        assert raw(server, b"") == b""
        assert raw(server, b"POST / HTTP/1.1\r\nHost: loc") == b""
        ok = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as link:
            link.sendall(ok)
            assert link.recv(65536).startswith(b"HTTP/1.1 200")
            link.sendall(b"GET /hea")  # a second one on the same connection
            while link.recv(65536):
                pass
        answer = raw(server, b"X" * 70_000)
        assert answer[:12] == b"HTTP/1.1 400"
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_request"


def sending(server: Running, size: int, *lines: str) -> socket.socket:
    """A client that has sent so much of a body, and does not go on."""
    link = socket.create_connection(("127.0.0.1", server.port))
    before = server.gate.room.held
    link.sendall(head(JSON, f"Content-Length: {size + 10_000}", *lines) + b" " * size)
    assert server.soon(lambda: server.gate.room.held == before + size)
    return link


def test_all_bodies_together() -> None:
    """While one large body is being read, another of the same size finds no room; then there is room again."""
    piece = b"{" + b" " * 180_000
    with running(Settings(limits=Limits(body=200_000, bodies=400_000, rate=1000))) as server:
        with sending(server, 180_000):
            answer = post(server, piece)
            assert answer.status_code == 429 and answer.headers["retry-after"]
        assert server.soon(lambda: server.gate.room.held == 0)  # it has left
        assert post(server, piece).status_code == 400
        assert post(server, chat()).status_code == 200
        assert server.soon(lambda: server.gate.room.held == 0)


def test_one_tenant_can_not_take_all_the_room_for_bodies() -> None:
    with running(Settings(keys=keyring(), limits=Limits(body=200_000, bodies=300_000, rate=1000))) as server:
        acme, root = (f"Authorization: Bearer {SECRETS[name]}" for name in ("acme", "root"))
        with sending(server, 140_000, acme):
            more = post(server, b" " * 100_000, authorization=f"Bearer {SECRETS['acme']}")
            assert (more.status_code, more.json()["error"]["code"]) == (429, "overloaded")
            with sending(server, 70_000, root):
                third = post(server, b" " * 40_000, authorization=f"Bearer {SECRETS['rival']}")
                assert third.status_code == 400  # it was read, and is no JSON
        assert server.soon(lambda: server.gate.room.held == 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400)), max_size=60))
def test_there_is_always_room_for_one_more_tenant(takes: list[tuple[str, int]]) -> None:
    room = Room(1000)
    shares = {name: Share(room, name) for name in "abc"}
    for name, count in takes:
        with contextlib.suppress(Refusal):
            shares[name].take(count)
    assert room.held == sum(share.held for share in shares.values()) <= 875
    held = room.held
    Share(room, "d").take((1000 - held) // 2)
    for share in shares.values():
        share.leave()
        share.leave()
    assert room.held == (1000 - held) // 2
    Share(room, "e").take(200)


def test_an_answer_that_has_begun_holds_no_body() -> None:
    with running() as server, socket.create_connection(("127.0.0.1", server.port)) as link:
        sent = json.dumps(chat("!stall", stream=True)).encode() + b" " * 100_000
        link.sendall(head(JSON, f"Content-Length: {len(sent)}") + sent)
        assert link.recv(100).startswith(b"HTTP/1.1 200")
        assert server.soon(lambda: server.gate.room.held == 0) and server.fake.open


@pytest.mark.parametrize("line", ["Content-Length: 100000", "Transfer-Encoding: chunked", "Content-Length: 1"])
@pytest.mark.parametrize("path", sorted(gate.OPEN))
def test_no_body_is_read_from_who_needs_no_key(keyed: Running, path: str, line: str) -> None:
    """It is refused before anything of it has come."""
    answer = raw(keyed, head(JSON, line, path=path).replace(b"POST", b"GET"), half=True)
    assert answer.startswith(b"HTTP/1.1 400") and b"send no body" in answer and b"connection: close" in answer
    answer = raw(keyed, head("Content-Length: 0", "Connection: close", path=path).replace(b"POST", b"GET"))
    assert answer.startswith(b"HTTP/1.1 200")


def test_an_answer_that_takes_too_long(tight: Running) -> None:
    answer = post(tight, chat("!never"))
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    streamed = post(tight, chat("!stall", stream=True))
    assert streamed.status_code == 200 and "[DONE]" not in streamed.text and '"code":"timeout"' in streamed.text
    assert tight.soon(lambda: not tight.fake.open)


def test_a_client_that_does_not_read_is_left(tight: Running) -> None:
    with socket.create_connection(("127.0.0.1", tight.port)) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sent = json.dumps(chat("!flood", stream=True)).encode()
        link.sendall(head(JSON, f"Content-Length: {len(sent)}") + sent)
        assert tight.soon(lambda: bool(tight.fake.open))
        assert tight.soon(lambda: not tight.fake.open)


def pages(link: socket.socket, count: int) -> None:
    """Ask for as many pages of some tens of kB one after the other, without a key."""
    link.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * count)


@pytest.mark.parametrize("how", ["stream", "pages", "half"])
def test_a_client_that_does_not_read_has_no_connection(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of a stream, not of answers that wait for each other, and not where it has said that it says no more."""
    monkeypatch.setattr(listen, "_CLOSE_SECONDS", 0.2)
    with (
        running(Settings(limits=Limits(write_seconds=0.3 if how != "half" else 60))) as server,
        socket.create_connection(("127.0.0.1", server.port)) as link,
    ):
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        if how != "pages":
            sent = json.dumps(chat("!flood", stream=True)).encode()
            link.sendall(head(JSON, f"Content-Length: {len(sent)}") + sent)
        else:
            pages(link, 300)
        assert server.soon(lambda: any(one.transport.get_write_buffer_size() > 65_536 for one in server.connections))
        if how == "half":
            link.shutdown(socket.SHUT_WR)
        assert server.soon(lambda: not server.connections)


def test_a_client_that_reads_slowly_is_waited_for() -> None:
    """As long as it takes 1024 bytes a second of what is too much to wait with."""
    timers: list[Callable[[], None]] = []
    left = [200_000]
    loop = SimpleNamespace(call_later=lambda seconds, what, *args: timers.append(partial(what, *args)) or MagicMock())
    ends = MagicMock(**{"get_write_buffer_size.side_effect": lambda: left[0]})
    made = listen.config(MagicMock(), Settings())
    made.loaded, made.loaded_app, made.ws_protocol_class, made.interface = True, MagicMock(), None, "asgi3"
    protocol = listen.Protocol(made, ServerState(), {}, loop)
    protocol.connection_made(ends)
    timers.clear()
    protocol.pause_writing()
    for _ in range(3):
        left[0] -= 31_000
        timers.pop()()
    assert not ends.abort.called
    left[0] -= 30_000
    timers.pop()()
    assert ends.abort.called and not timers


def test_too_many_connections() -> None:
    """The answer is an error object as any other's, and says when to come again."""
    with running(Settings(limits=Limits(connections=2))) as server:
        links = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        assert server.soon(lambda: len(server.connections) == 2)
        answer = post(server, chat())
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert answer.json()["error"]["code"] == "overloaded" and answer.headers["connection"] == "close"
        assert server.soon(lambda: [line["status"] for line in server.logged()] == [503])
        links[0].close()
        assert server.soon(lambda: len(server.connections) == 1)
        assert post(server, chat()).status_code == 200
        links[1].close()


# Leaving -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["!never", "!stall"])
def test_who_leaves_cancels(stream: bool, text: str) -> None:
    with running() as server:
        with socket.create_connection(("127.0.0.1", server.port)) as link:
            sent = json.dumps(chat(text, stream=stream)).encode()
            link.sendall(head(JSON, f"Content-Length: {len(sent)}") + sent)
            assert server.soon(lambda: bool(server.fake.open))
        assert server.soon(lambda: len(server.fake.cancelled) == 1 and not server.fake.open)
        assert server.soon(lambda: bool(server.log.getvalue()))
        (line,) = server.logged()
        assert (line["status"], line["outcome"]) == (499, "cancelled")
        assert b"tarsia_queue_requests 0.0" in httpx.get(f"{server.url}/metrics").content
        assert b"tarsia_running_requests 0.0" in httpx.get(f"{server.url}/metrics").content


def test_places_of_a_key_a_tenant_and_all(keyed: Running) -> None:
    def stalled(name: str) -> socket.socket:
        link = socket.create_connection(("127.0.0.1", keyed.port))
        sent = json.dumps(chat("!never", model="acme-ocr" if name != "rival" else "rival-plan")).encode()
        key = f"Authorization: Bearer {SECRETS[name]}"
        before = len(keyed.fake.open)
        link.sendall(head(JSON, key, f"Content-Length: {len(sent)}") + sent)
        assert keyed.soon(lambda: len(keyed.fake.open) == before + 1)
        return link

    def tried(name: str) -> httpx.Response:
        return post(keyed, chat(model="acme-ocr"), authorization=f"Bearer {SECRETS[name]}")

    links = [stalled("single")]
    assert "the key's places" in tried("single").text
    links.append(stalled("acme"))
    links.append(stalled("acme"))
    full = tried("root")
    assert full.status_code == 429 and "the server's places" in full.text and full.headers["retry-after"] == "2"
    links[0].close()
    assert keyed.soon(lambda: len(keyed.fake.open) == 2)
    assert "the tenant's places" in tried("acme").text
    assert tried("root").status_code == 200
    for link in links:
        link.close()
    assert keyed.soon(lambda: not keyed.fake.open)
    assert tried("acme").status_code == 200


# JSON ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"{}{}", b'{"a": NaN}', b'{"a": -Infinity}',
        b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1, "a": 2}', b"[" * 4000,
        b'{"a":' * 400 + b"1" + b"}" * 400,
        b'{"a": "\\ud800"}', b'{"\\ud800": 1}', b"{'a': 1}", b'{"a": "\n"}', b"[" + b"{}," * 4000 + b"{}]",
    ],
)  # fmt: skip
def test_what_json_should_not_have(body: bytes, tight: Running) -> None:
    answer = post(tight, body)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_name_twice_is_refused_where_all_else_is_right(tight: Running) -> None:
    assert post(tight, SAID).status_code == 200
    answer = post(tight, SAID.replace(b'{"model"', b'{"model": "acme-ocr", "model"', 1))
    assert answer.status_code == 400 and "'model' twice" in answer.json()["error"]["message"]


def test_a_pair_of_surrogates_is_a_letter() -> None:
    assert strict.loads(b'{"a": "\\ud83d\\ude00 \\u0000"}', Limits()) == {"a": "\U0001f600 \0"}


def test_what_a_refusal_says_back_is_short_and_of_one_line(tight: Running) -> None:
    for body in ({"model": "x" * 100_000, "messages": []}, {**chat(), "a\nb" * 1000: 1}, chat(model="x\x1b[31m" * 20)):
        answer = post(tight, body)
        assert answer.status_code in (400, 404) and len(answer.content) < 1500
        assert not any(letter in answer.json()["error"]["message"] for letter in "\x1b\0\x7f")


# Keys and buckets ----------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    assert [bucket.take(30), bucket.take(30)] == [0, 0]
    assert bucket.take(10) == pytest.approx(10)
    clock.now = 10
    assert bucket.take(10) == 0
    bucket.charge(30)
    assert bucket.take(1) == pytest.approx(31)
    clock.now = 10_000
    assert bucket.level == 60
    bucket.charge(-500)
    assert bucket.level == 60


def test_tokens_are_set_aside_so_that_nobody_spends_them_twice() -> None:
    clock = Clock()
    key = Key(name="a", sha256="0" * 64, tenant="a", adapters=["*"], tokens_per_minute=100)
    admission = Admission(Limits(), clock)
    first = admission.seat(key, 70)
    with pytest.raises(Refusal) as caught:
        admission.seat(key, 70)
    assert caught.value.again == pytest.approx(24)
    first.spend(10)
    first.leave()
    first.leave()
    admission.seat(key, 70).leave()
    assert admission.most(key, 1) == 100 and admission.most(key, 3) == 33 and admission.most(ANYBODY, 3) == 4096
    assert admission.seated == 0


def test_a_file_of_keys(tmp_path: Any) -> None:
    secret, text = new_key("laptop", "acme", ["acme-*"])
    path = tmp_path / "keys.yaml"
    path.write_text("keys:\n" + text)
    path.chmod(0o600)
    ring = Keyring.read(path)
    found = ring.find(secret)
    assert found is not None and found.may("acme-x") and not found.may("rival") and secret not in path.read_text()
    assert ring.find(secret + "x") is None and ring.find("") is None and ring.find("\udcff") is None
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="Others may write"):
        Keyring.read(path)
    path.chmod(0o600)
    hashed = "0" * 64
    for wrong in (
        "keys: []", "keys: 3", "[", "a: !!python/object:os.system {}", "keys: [{name: a}]", f"keys:\n{text}{text}",
        f"keys: [{{name: a, sha256: '{hashed}', tenant: a, adapterz: [x]}}]",
        f"keys: [{{name: a, sha256: '{hashed}', tenant: a, at_once: 0}}]",
        f"keys: [{{name: a, sha256: '{hashed}', tenant: t}},"
        f" {{name: b, sha256: '1{hashed[1:]}', tenant: t, weight: 2}}]",
    ):  # fmt: skip
        path.write_text(wrong)
        with pytest.raises(ConfigError):
            Keyring.read(path)
    with pytest.raises(ConfigError, match="can not be read"):
        Keyring.read(tmp_path / "none")


def test_others_are_not_answered_without_keys() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(ConfigError, match="needs a key"):
            listen.check_host(host, Settings())
        listen.check_host(host, Settings(keys=Keyring((ANYBODY,))))
    listen.check_host("127.0.0.1", Settings())


def test_twenty_clients_at_once(tight: Running) -> None:
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(post(tight, chat()).status_code)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 20
