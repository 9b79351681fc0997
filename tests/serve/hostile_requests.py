"""What somebody who means harm would send: one function a kind, each drawing another request at every call."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve.http_world import chat, data_url, picture_chat, png

Draw = random.Random


@dataclass
class Sent:
    """Bytes; ``half`` closes the writing side, ``silent``: the server may say nothing, ``said`` may come back."""

    raw: bytes
    half: bool = False
    silent: bool = False
    said: bytes = b"\0never"
    kind: str = ""


NAMES = (
    "../../etc/passwd", "..", ".", "/", "//", "/etc/passwd", "C:\\x", "acme-ocr/../rival-plan", "acme-ocr\0",
    "acme-ocr\n",
    "acme-ocr@../x", "acme-ocr#../../x", "acme-ocr#" + "f" * 65, "acme-ocr@99999999999999999999", "acme-ocr@-1",
    "acme-ocr@0",
    "ACME-OCR", "acme\u2010ocr", "\uff41cme-ocr", "acme-ocr ", " acme-ocr", "acme-ocr%00", "%2e%2e%2f", "acme-*",
    "acme-?cr",
    "[a]cme-ocr", "acme-ocr@1@2", "acme-ocr#1#2", "@", "#", "", "\u202eacme", "a" * 300, "a" * 101, "auto@x",
    "auto", "current",
    "acme-ocr@current", "acme-ocr@none", "mini-1@1", "mini-1#ab12", "file:///etc/passwd", "http://127.0.0.1/x",
    "${jndi:ldap}",
    "'; DROP TABLE versions;--", "acme-ocr' OR 1=1", "{{7*7}}", "$(id)", "`id`", "acme-ocr@\u0663", "con", "nul",
    "~root",
)  # fmt: skip
RIVALS = (
    "rival-plan",
    "rival-plan@7",
    "rival-plan#ab12",
    "rival-plan@current",
    "Rival-plan",
    "rival-none",
    "rival-plan ",
)
ADDRESSES = (
    "http://169.254.169.254/latest/meta-data/", "http://127.0.0.1:{port}/", "http://localhost/", "http://[::1]/",
    "http://0/",
    "http://2130706433/", "http://0x7f.1/", "http://127.1/", "http://[::ffff:169.254.169.254]/",
    "http://evil.example/a.png",
    "file:///etc/passwd", "file://localhost/etc/passwd", "gopher://127.0.0.1:6379/_x", "ftp://127.0.0.1/",
    "dict://x:1/",
    "http://metadata.google.internal/", "https://user:pass@evil.example/", "http://a\r\nHost: b/", "http://\u2168.com/",
    "\\\\evil\\share", "//evil.example/x", "/etc/passwd", "", " ", "http:", "javascript:1", "blob:x", "http://x" * 500,
    "jar:http://x!/", "http://evil.example:99999/", "http://[v1.x]/", "http://%00/", "HTTP://EVIL.EXAMPLE", "unix:///x",
)  # fmt: skip
LIMIT = 300_000


def request(body: bytes, key: str, *lines: str, path: str = "/v1/chat/completions", method: str = "POST") -> bytes:
    """A request that is framed as it should be and ends its connection."""
    head = [
        f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {key}", "Connection: close",
        "Content-Type: application/json", f"Content-Length: {len(body)}", *lines,
    ]  # fmt: skip
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def said(values: Any) -> bytes:
    return json.dumps(values).encode()


def letters(draw: Draw, longest: int = 60) -> str:
    pool = "ac/\\.@#%*?[]\0\n\r\t\"'{}<>\u202e\u2028\ud800\uffff\U0001f600-_ 01"
    return "".join(draw.choice(pool) for _ in range(draw.randrange(longest)))


def names(draw: Draw, key: str) -> Sent:
    name = draw.choice(NAMES) if draw.random() < 0.7 else draw.choice(("acme-ocr", "mini-1", "")) + letters(draw)
    if draw.random() < 0.6:
        return Sent(request(said(chat(model=name, stream=draw.random() < 0.3)), key))
    quoted = "".join(
        f"%{byte:02x}" if draw.random() < 0.5 or not chr(byte).isalnum() else chr(byte)
        for byte in name.encode("utf8", "surrogatepass")
    )
    return Sent(request(b"", key, path=f"/v1/models/{quoted}", method=draw.choice(("GET", "GET", "HEAD", "DELETE"))))


def rivals(draw: Draw, key: str) -> Sent:
    name = draw.choice(RIVALS)
    if draw.random() < 0.5:
        return Sent(request(said(chat("hi", model=name)), key))
    return Sent(request(b"", key, path=f"/v1/models/{name.strip().replace('#', '%23')}", method="GET"))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(draw: Draw) -> bytes:
    side = draw.choice((2_000, 65_535, 65_536, 2**31 - 1, 0))
    head = struct.pack(
        ">IIBBBBB", side, draw.choice((side, 1_000)), draw.choice((1, 8, 16)), draw.choice((0, 2, 6)), 0, 0, 0
    )
    more = _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000))) if draw.random() < 0.3 else b""
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + more + _chunk(b"IDAT", zlib.compress(bytes(50_000)))


def pictures(draw: Draw, key: str) -> Sent:
    kind = draw.choice(("PNG", "JPEG", "GIF", "WEBP"))
    raw = bytearray(png(draw.randrange(1, 40), draw.randrange(1, 40), kind))
    how = draw.randrange(7)
    if how == 0:
        raw = bytearray(bomb(draw))
    elif how == 1:
        raw = raw[: draw.randrange(len(raw))]
    elif how == 2:
        for _ in range(draw.randrange(1, 9)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
    elif how == 3:
        raw = bytearray(draw.randbytes(draw.randrange(200)))
    media = f"image/{draw.choice(('png', 'jpeg', 'gif', 'webp', kind.lower(), 'svg+xml', 'tiff'))}"
    url = data_url(bytes(raw), media)
    if how == 4:
        url = (
            url[: draw.randrange(len(url))] + draw.choice(("=", "\n", "!", "%3D", "")) + url[draw.randrange(len(url)) :]
        )
    many = draw.choice((1, 1, 1, 17))
    return Sent(request(said(picture_chat(*[url] * many, model="acme-ocr")), key))


def addresses(draw: Draw, key: str) -> Sent:
    return Sent(request(said(picture_chat(draw.choice(ADDRESSES), model="acme-ocr")), key))


def broken(draw: Draw, key: str) -> Sent:
    """A good body, with bytes changed, cut, or repeated."""
    body = bytearray(said(picture_chat(data_url(), model="acme-ocr", max_tokens=5, stop=["a"], seed=1)))
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(body))
        piece = draw.choice(
            (b'"', b"{", b"[", b"\xff", b"\0", b"\\ud800", b"NaN", b"1e999", b"9" * 400, b",", b'"a":1,')
        )
        body[at : at + draw.randrange(3)] = piece
    if draw.random() < 0.3:
        body = body[: draw.randrange(len(body))]
    if draw.random() < 0.05:
        body = bytearray(draw.choice((b"[", b'{"a":', b"[{},")) * draw.randrange(40_000))[: LIMIT - 1]
    return Sent(request(bytes(body), key))


def oversized(draw: Draw, key: str) -> Sent:
    size = draw.choice((LIMIT + 1, LIMIT * 2, 2**31, 2**63, 10**14))
    how = draw.randrange(4)
    if how == 0:
        head = request(b"", key).replace(b"Content-Length: 0", b"Content-Length: %d" % size)
        return Sent(head + b"{" * 100, half=True)
    if how == 1:
        head = request(b"", key).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        return Sent(
            head + b"20000\r\n" + b" " * 0x20000 + b"\r\n" + b"20000\r\n" + b" " * 0x20000 + b"\r\n" + b"20000\r\n"
        )
    if how == 2:
        values = draw.choice(
            (chat("a" * 60_000, model="acme-ocr"), {"messages": [{"role": "user", "content": "a"}] * 300},
             chat(model="acme-ocr", stop=["a"] * 99), chat(model="acme-ocr",
             logit_bias={str(i): 1 for i in range(2000)}),
             chat(model="acme-ocr", max_tokens=10**9), chat(model="acme-ocr", n=10**6), chat(model="acme-ocr",
             seed=10**30))
        )  # fmt: skip
        return Sent(request(said(values), key))
    return Sent(request(b"", key, f"X-Long: {'a' * draw.choice((1000, 70_000))}", method="GET", path="/v1/models"))


SMUGGLED = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer x\r\n\r\n"
FRAMES = (
    "Transfer-Encoding: chunked", "Transfer-Encoding:\tchunked", "Transfer-Encoding : chunked",
    "transfer-encoding: identity",
    "Transfer-Encoding: chunked, identity", "Transfer-Encoding: \x0bchunked", "Content-Length: 3", "Content-Length: 0",
    "Content-Length: 1e1", "Content-Length:", "Content-Length: 3, 3", "Host: evil", "Host:", "Content-Encoding: gzip",
    "Authorization: Bearer other", "Content-Type: text/plain", "X: a\rb", "X\0: a", " X: folded", "X: \xff\xfe",
    ": empty",
    "Expect: 100-continue", "Expect: x", "Connection: upgrade, close", "Upgrade: websocket", "Upgrade: h2c",
    "Trailer: x",
    "X-Forwarded-For: 127.0.0.1", "X-HTTP-Method-Override: DELETE", "Forwarded: host=evil", "Cookie: a=b",
    "Range: bytes=0-",
)  # fmt: skip


def framing(draw: Draw, key: str) -> Sent:
    """Requests that two readers would read differently, with another one behind."""
    body = said(chat(model="acme-ocr"))
    lines = [draw.choice(FRAMES) for _ in range(draw.randrange(1, 4))]
    raw = request(body, key, *lines)
    how = draw.randrange(6)
    if how == 0:
        raw = raw.replace(b"\r\n", draw.choice((b"\n", b"\r", b"\r\n\r\n")), draw.randrange(1, 5))
    elif how == 1:
        raw = raw.replace(b"HTTP/1.1", draw.choice((b"HTTP/1.0", b"HTTP/9.9", b"HTTP/2", b"", b"HTTP/1.1 x")), 1)
    elif how == 2:
        raw = raw.replace(
            b"POST /v1", draw.choice((b"POST http://evil/v1", b"post /v1", b"P\0ST /v1", b"POST  /v1", b"/v1")), 1
        )
    elif how == 3:
        raw = raw.replace(
            b"\r\n\r\n" + body, b"\r\n\r\n" + draw.choice((b"0\r\n\r\n", b"ffffffffffffffff\r\n", b"-1\r\n", b"3;x=\n"))
        )
    elif how == 4:
        raw = draw.randbytes(draw.randrange(1, 300))
    return Sent(raw + (SMUGGLED if draw.random() < 0.5 else b""), half=True, silent=True)


FIELDS = (
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "stop",
    "seed", "stream",
    "stream_options", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty", "logit_bias",
    "response_format",
    "guided_json", "ignore_eos", "user", "tools", "functions", "audio", "__proto__", "constructor", "id",
    "tenant", "weight",
)  # fmt: skip


def anything(draw: Draw, deep: int = 3) -> Any:
    """Some JSON value."""
    kind = draw.randrange(9 if deep else 6)
    if kind == 6:
        return [anything(draw, deep - 1) for _ in range(draw.randrange(4))]
    if kind >= 7:
        keys = (
            "type",
            "text",
            "role",
            "content",
            "url",
            "image_url",
            "schema",
            "$ref",
            "json_schema",
            "name",
            letters(draw, 9),
        )
        return {draw.choice(keys): anything(draw, deep - 1) for _ in range(draw.randrange(4))}
    return draw.choice(
        (None, True, False, 0, -1, 1, 2**63, -(2**63) - 1, 10**40, 0.5, -0.0, 1e308, "", "user", "text",
        letters(draw), "auto",
         "json_schema", "image_url", data_url(), "http://127.0.0.1/")
    )  # fmt: skip


def types(draw: Draw, key: str) -> Sent:
    body = chat(model="acme-ocr")
    for _ in range(draw.randrange(1, 4)):
        body[draw.choice(FIELDS)] = anything(draw)
    return Sent(request(said(body), key))


def loads(draw: Draw, key: str) -> Sent:
    paths = (
        "/etc",
        "/nowhere/allowed/../../etc",
        "rival-plan",
        "../x",
        "/nowhere/allowed/\0",
        "/proc/self/environ",
        "s3://x/y",
    )
    body = {"lora_name": draw.choice((*NAMES, "x")), "lora_path": draw.choice((*paths, *NAMES))}
    if draw.random() < 0.2:
        body[draw.choice(("load_inplace", "base_model_name", "lora_int_id"))] = anything(draw)
    return Sent(request(said(body), key, path=f"/v1/{draw.choice(('load', 'unload'))}_lora_adapter"))


def keys(draw: Draw, key: str) -> Sent:
    """Other keys than the tenant's own, and other paths."""
    other = draw.choice(
        ("", key[:-1], key + "x", key.upper(), "Bearer " + key, "\xff" * 9, "a" * 9000, "*", "tarsia-", f"{key} {key}")
    )
    path = draw.choice(("/v1/models", "/metrics", "/docs/../metrics", "//metrics", "/health/%2e%2e/metrics",
    "/admin", "/%00",
                        "/.env", "/static/../../etc/passwd", "/openapi.json/", "/v1/chat/completions/",
                        "/v1/models/%ff", "*"))  # fmt: skip
    return Sent(
        request(b"", other, path=path, method=draw.choice(("GET", "POST", "PUT", "TRACE", "CONNECT", "OPTIONS")))
    )


KINDS: dict[str, Callable[[Draw, str], Sent]] = {
    make.__name__: make for make in (names, rivals, pictures, addresses, broken, oversized, framing, types, loads, keys)
}
"""Every kind by its name."""
