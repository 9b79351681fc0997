"""Pictures of strangers: nothing is decoded here, and nothing is fetched from where it should not be."""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from serve.http_world import data_url, picture_chat, png, running

from tarsia.core.errors import ConfigError, ServeError
from tarsia.serve import frames, read, shown
from tarsia.serve.bounds import Bounds
from tarsia.serve.http.errors import Refusal
from tarsia.serve.http.pictures import MEDIA, checked, of_data
from tarsia.serve.http.remote import Allowed, Fetcher, is_public
from tarsia.serve.http.room import Room, Share
from tarsia.serve.http.settings import Limits, Remote, Settings

LIMITS = Limits(picture=20_000, pixels=10_000)


def refused(url: str, limits: Limits = LIMITS) -> str:
    with pytest.raises(Refusal) as caught:
        of_data(url, limits, "here")
    assert caught.value.status == 400 and caught.value.param == "here"
    return caught.value.message


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def huge_webp(width: int, height: int) -> bytes:
    body = (
        b"VP8X"
        + struct.pack("<I", 10)
        + bytes(4)
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def huge_gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b"\x2c" + bytes(20) + b"\x3b"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_what_is_taken(kind: str) -> None:
    for size in ((1, 1), (3, 5), (100, 100)):
        raw = png(*size, kind)
        seen = of_data(data_url(raw, f"image/{kind.lower()}"), LIMITS, "here")
        assert (seen.raw, seen.pixels) == (raw, size[0] * size[1])
    out = io.BytesIO()
    Image.new("RGB", (9, 7)).save(out, "WEBP", lossless=True)
    assert checked(out.getvalue(), "image/webp", LIMITS, "").pixels == 63
    out = io.BytesIO()
    Image.new("RGBA", (9, 7), (1, 2, 3, 4)).save(out, "WEBP", exif=b"Exif\0\0")
    assert checked(out.getvalue(), "image/webp", LIMITS, "").pixels == 63


@pytest.mark.parametrize(
    "bomb, media",
    [
        (huge_png(60_000, 60_000), "png"),
        (huge_png(2**31 - 1, 2**31 - 1), "png"),
        (huge_png(101, 100), "png"),
        (huge_webp(16_383, 16_383), "webp"),
        (huge_webp(2**24, 2**24), "webp"),
        (huge_gif(65_535, 65_535), "gif"),
    ],
    ids=["wide", "widest", "by-one", "webp", "webp-widest", "gif"],
)
def test_bombs_are_refused_by_their_header(bomb: bytes, media: str) -> None:
    begun = time.process_time()
    assert "pixels" in refused(data_url(bomb, f"image/{media}"))
    assert time.process_time() - begun < 1


def test_what_the_worker_may_show_is_what_is_handed_on_to_it() -> None:
    limits, worker = Limits(), read.Limits()
    assert (limits.pictures, limits.picture, limits.pixels, limits.stretch) == (
        worker.pictures, worker.bounds.bytes, worker.bounds.pixels, worker.bounds.stretch,
    )  # fmt: skip
    assert limits.body + limits.all_pictures <= frames.LIMITS.bytes and limits.pictures <= frames.LIMITS.blobs


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(70, 120))
def test_no_picture_is_handed_on_that_the_worker_would_not_decode(width: int, height: int, size: int) -> None:
    bounds, raw = Bounds(pixels=1000, stretch=7, bytes=size), png(width, height)
    taken = []
    for look in (
        lambda: checked(raw, "image/png", Limits(picture=size, pixels=1000, stretch=7), "here"),
        lambda: shown.decoded(raw, 1, bounds, None),
    ):
        try:
            look()
            taken.append("")
        except (Refusal, ServeError) as error:
            taken.append(str(error))
    assert (taken[0] == "") == (taken[1] == ""), taken


def test_a_png_with_a_text_that_unpacks_to_much() -> None:
    """60 kB that would be 60 MB: PIL refuses it, which is a refusal of ours."""
    packed = zlib.compress(bytes(60_000_000), 9)
    header = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    text = chunk(b"zTXt", b"a\0\0" + packed)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text + chunk(b"IDAT", zlib.compress(bytes(52)))
    limits = Limits()
    with pytest.raises(Refusal, match="damaged"):
        checked(raw, "image/png", limits, "here")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_what_moves_is_refused(kind: str) -> None:
    out = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), (i, 99, 0)) for i in (1, 200, 90)]
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=50)
    assert "moves" in refused(data_url(out.getvalue(), f"image/{kind.lower()}"))


@pytest.mark.parametrize(
    "url",
    [
        "data:", "data:image/png,abc", "data:image/png;base64", "data:;base64,AAAA", "data:text/html;base64,AAAA",
        "data:image/svg+xml;base64,AAAA", "data:image/tiff;base64,AAAA", "data:image/png;charset=x;base64,AAAA",
        "data:image/png;base64,", "data:image/png;base64,AAA", "data:image/png;base64,AA A",
        "data:image/png;base64,AAAA\n",
        "data:image/png;base64,AAAA====", "data:image/png;base64,\u0661AAA", "data:image/png;base64,%41%41%41%41",
        "data:image/png;base64,QUJDQQ==", "data:image/png;base64," + "A" * 30_000, "DATA:image/png;base64,-_-_",
        "data:" + "a" * 1000 + ";base64,AAAA",
    ],
)  # fmt: skip
def test_data_urls_that_are_none(url: str) -> None:
    assert len(refused(url)) < 500


@pytest.mark.parametrize("put", ["\n", " ", "!", "=", "-"])
def test_a_good_picture_in_loose_base64(put: str) -> None:
    url = data_url()
    assert of_data(url, LIMITS, "").pixels == 16
    for at in (40, len(url)):
        assert "not base64" in refused(url[:at] + put + url[at:])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_picture_is_what_its_bytes_are_whatever_it_is_called(kind: str) -> None:
    for media in ("png", "jpeg", "jpg", "gif", "webp"):
        raw = png(4, 5, kind)
        seen = of_data(data_url(raw, f"image/{media}"), LIMITS, "")
        assert (seen.raw, seen.pixels) == (raw, 20)
        assert shown.decoded(seen.raw, 1, Bounds(), None).size == (4, 5)  # the worker goes by the bytes too
    said = refused(data_url(b"%PDF-1.4" + bytes(100), "image/jpeg"))
    assert "no picture" in said and "image/jpeg" in said and "to do" in said


def test_another_name_is_no_way_around_the_bounds() -> None:
    for bomb in (huge_png(60_000, 60_000), huge_webp(16_383, 16_383), huge_gif(65_535, 65_535)):
        for media in ("png", "jpeg", "gif", "webp"):
            assert "pixels" in refused(data_url(bomb, f"image/{media}"))
    broken = refused(data_url(png(4, 4, "PNG")[:20], "image/jpeg"))
    assert "damaged" in broken and "PNG" in broken


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP"]), st.data())
def test_broken_pictures_are_refused_or_taken_and_nothing_else(kind: str, data: st.DataObject) -> None:
    raw = bytearray(png(5, 6, kind))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with contextlib.suppress(Refusal):
        assert checked(cut, f"image/{kind.lower()}", LIMITS, "").pixels <= LIMITS.pixels


def test_all_pictures_together() -> None:
    for limits, why in (
        (Limits(pictures=3, all_pixels=30), "too many pixels together"),
        (Limits(pictures=3, all_pictures=2 * len(png()) - 1), "too many bytes together"),
    ):
        with running(Settings(limits=limits)) as server:
            for count, status, said in ((1, 200, "you said"), (2, 400, why), (4, 400, "too many pictures")):
                answer = httpx.post(f"{server.url}/v1/chat/completions", json=picture_chat(*[data_url()] * count))
                assert answer.status_code == status and said in answer.text


# From other hosts ----------------------------------------------------------------------------------------------------


class Host(BaseHTTPRequestHandler):
    """A host of pictures that does what hosts may do."""

    asked: list[tuple[str, str]]
    port: int

    def do_GET(self) -> None:
        type(self).asked.append((self.path, self.headers["host"]))
        assert "cookie" not in self.headers and "authorization" not in self.headers
        kind = self.path.strip("/")
        if kind.startswith("to="):
            return self._say(302, b"", location=kind.removeprefix("to="))
        if kind == "slow":
            self.send_response(200)
            self.send_header("content-type", "image/png")
            self.end_headers()
            for byte in png():
                try:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                except OSError:
                    return None
                if type(self).stop.wait(0.05):
                    return None
            return None
        bodies = {
            "png": (200, png(), {"content_type": "image/png; x=y"}),
            "html": (200, b"<html>secret</html>", {"content_type": "text/html"}),
            "lies": (200, b"<html>secret</html>", {"content_type": "image/png"}),
            "large": (200, bytes(50_000), {"content_type": "image/png"}),
            "bomb": (200, huge_png(60_000, 60_000), {"content_type": "image/png"}),
            "gzip": (200, b"x", {"content_type": "image/png", "content_encoding": "gzip"}),
        }
        status, body, headers = bodies.get(kind, (404, b"nothing", {"content_type": "image/png"}))
        return self._say(status, body, **headers)

    stop = threading.Event()

    def _say(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.send_header("set-cookie", "a=b")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def host() -> Iterator[type[Host]]:
    handler: type[Host] = type("Handler", (Host,), {"asked": [], "stop": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield handler
    handler.stop.set()
    server.shutdown()
    server.server_close()


def fetch(fetcher: Fetcher, url: str, share: Share | None = None) -> Any:
    import asyncio

    return asyncio.run(fetcher.fetch(url, "here", share or Share(Room(10**6), "a")))


def told(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(Refusal) as caught:
        fetch(fetcher, url)
    assert caught.value.status == 400 and "secret" not in caught.value.message
    return caught.value.message


def allowing(*hosts: str, **more: Any) -> Fetcher:
    return Fetcher(Remote(hosts, **{"seconds": 30.0, **more}), LIMITS)


def test_nothing_is_fetched_by_itself(host: type[Host]) -> None:
    assert "data URL" in told(allowing(), f"http://127.0.0.1:{host.port}/png")
    assert host.asked == []


def test_an_address_that_the_owner_allowed(host: type[Host]) -> None:
    fetcher = allowing(f"127.0.0.1:{host.port}")
    url = f"http://127.0.0.1:{host.port}"
    assert fetch(fetcher, f"{url}/png").raw == png()
    assert host.asked == [("/png", f"127.0.0.1:{host.port}")]
    for path, why in (
        ("html", "no picture of a type"), ("lies", "This is no picture"), ("large", "more than 20000 bytes"),
        ("bomb", "too many pixels"), ("gzip", "no picture of a type"), ("none", "404"),
    ):  # fmt: skip
        assert why in told(fetcher, f"{url}/{path}"), path
    assert "too long" in told(allowing(f"127.0.0.1:{host.port}", seconds=0.5), f"{url}/slow")


def test_what_is_fetched_takes_of_the_room_for_what_is_sent(host: type[Host]) -> None:
    url = f"http://127.0.0.1:{host.port}/png"
    fetcher, room = allowing(f"127.0.0.1:{host.port}"), Room(2 * len(png()) + 1)
    share = Share(room, "a")
    fetch(fetcher, url, share)
    assert share.held == room.held == len(png())
    with pytest.raises(Refusal) as caught:
        fetch(fetcher, url, share)
    assert (caught.value.status, caught.value.code) == (429, "overloaded")
    share.leave()
    fetch(fetcher, url, share)


@pytest.mark.parametrize("room, status", [(0, 429), (1, 200)])
def test_who_asks_for_pictures_of_other_hosts_has_room_for_them(host: type[Host], room: int, status: int) -> None:
    """Its body and the picture are as many bytes as it may hold, or one more; nothing is left over."""
    body = json.dumps(picture_chat(f"http://127.0.0.1:{host.port}/png")).encode()
    limits = Limits(bodies=2 * (len(png()) + len(body)) - 1 + room)
    with running(Settings(limits=limits, remote=Remote((f"127.0.0.1:{host.port}",), seconds=30))) as server:
        headers = {"content-type": "application/json"}
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == status and len(server.fake.asked) == room and len(host.asked) == 1
        assert server.soon(lambda: server.gate.room.held == 0)


def test_redirects_lead_only_to_what_is_allowed(host: type[Host]) -> None:
    fetcher = allowing(f"127.0.0.1:{host.port}")
    url = f"http://127.0.0.1:{host.port}"
    assert fetch(fetcher, f"{url}/to=/png").raw == png()
    assert fetch(fetcher, f"{url}/to={url}/png").raw == png()
    for to in (
        "http://169.254.169.254/latest/meta-data", "http://127.0.0.1:1/png", f"http://localhost:{host.port}/png",
        f"http://2130706433:{host.port}/png", f"http://[::1]:{host.port}/png",
        "file:///etc/passwd",
        "//evil.example/png",
        "gopher://127.0.0.1/", f"http://user@127.0.0.1:{host.port}/png",
        f"{url}/to={url}/to={url}/to={url}/to=/png", "",
    ):  # fmt: skip
        assert told(fetcher, f"{url}/to={to}")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x", "http://localhost:{port}/png", "http://127.0.0.1:{port}@evil.example/",
        "http://127.1:{port}/png",
        "http://0x7f000001:{port}/png", "http://017700000001:{port}/png", "http://2130706433:{port}/png",
        "http://127.0.0.1.:{port}/png", "http://[::ffff:127.0.0.1]:{port}/png", "http://evil.example#@127.0.0.1:{port}/png",
        "https://127.0.0.1:{port}\\@evil.example/", "file:///etc/passwd", "ftp://127.0.0.1/", "http:///png", "http://",
        "http://\uff11\uff12\uff17.0.0.1:{port}/png", "http://127.0.0.1:{port}\r\nX: y/png", "http://127.0.0.1:99999/",
        "http://allowed.example:8080/", "http://sub.allowed.example/", "http://allowed.example.evil/",
        "javascript:alert(1)",
        "//127.0.0.1:{port}/png", "http://%31%32%37.0.0.1:{port}/png", "http://xn--/", "http://[fe80::1%25lo]/",
        "blob:x",
    ],
)  # fmt: skip
def test_other_spellings_lead_nowhere(host: type[Host], url: str) -> None:
    """The host is allowed at its port by its one spelling; each of these is another, or another host."""
    looked: list[str] = []

    async def look_up(name: str, port: int) -> list[str]:
        looked.append(name)
        return ["127.0.0.1"]

    fetcher = Fetcher(Remote((f"[::1]:{host.port}", "allowed.example")), LIMITS, look_up)
    assert told(fetcher, url.replace("{port}", str(host.port)))
    assert host.asked == [] and looked == []


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1",
        "::ffff:10.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "::7f00:1",
        "2001:0:7f00:1::", "64:ff9b::808:808", "2001:db8::1", "fd00:ec2::254", "fec0::1", "64:ff9b:1::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_the_publics(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are_the_publics(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("found", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], [], ["fe80::1%lo"], ["169.254.169.254"]])
def test_an_allowed_name_that_leads_inside(host: type[Host], found: list[str]) -> None:
    async def look_up(name: str, port: int) -> list[str]:
        return found

    fetcher = Fetcher(Remote((f"pictures.example:{host.port}",)), LIMITS, look_up)
    assert "not the public's" in told(fetcher, f"http://pictures.example:{host.port}/png")
    assert host.asked == []


def test_the_address_that_was_looked_at_is_connected_to(host: type[Host], monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads elsewhere at the next look-up: there is none. Public addresses are played by 127.0.0.1."""
    from tarsia.serve.http import remote

    looked: list[str] = []

    async def look_up(name: str, port: int) -> list[str]:
        looked.append(name)
        return ["127.0.0.1"] if len(looked) == 1 else ["169.254.169.254"]

    def never(*args: object, **more: object) -> None:
        assert args[0] in ("127.0.0.1", b"127.0.0.1"), args
        return found(*args, **more)

    import socket

    found = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", never)
    monkeypatch.setattr(remote, "is_public", lambda address: str(address) == "127.0.0.1")
    fetcher = Fetcher(Remote((f"pictures.example:{host.port}",)), LIMITS, look_up)
    assert fetch(fetcher, f"http://Pictures.Example:{host.port}/png").raw == png()
    assert looked == ["pictures.example"] and host.asked == [("/png", f"pictures.example:{host.port}")]


def test_proxies_of_the_environment_are_not_asked(host: type[Host], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(allowing(f"127.0.0.1:{host.port}"), f"http://127.0.0.1:{host.port}/png").raw == png()


@pytest.mark.parametrize("text", ["*.example", "http://a", "a/b", "", "a:b", "user@a", "a b", "a?b", "a%2e", "a:99999"])
def test_hosts_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        Allowed.parse(text)


def test_ports_of_an_allowed_host() -> None:
    assert Allowed.parse("Example.org") == Allowed("example.org", None, None)
    assert Allowed.parse("example.org:80").port == 80 and Allowed.parse("example.org:443").port == 443
    assert str(Allowed.parse("[::1]:8000").address) == "::1"


def test_through_the_server(host: type[Host]) -> None:
    remote = Remote((f"127.0.0.1:{host.port}",), seconds=2)
    with running(Settings(remote=remote)) as server:
        url = f"{server.url}/v1/chat/completions"
        answer = httpx.post(url, json=picture_chat(f"http://127.0.0.1:{host.port}/png", data_url()))
        assert answer.status_code == 200 and server.fake.asked[0][1] == [png(), png()]
        assert httpx.post(url, json=picture_chat("http://127.0.0.1:1/png")).status_code == 400
        assert server.fake.open == set()
    assert set(MEDIA) > {"image/png"}
