"""Ways to spoil an adapter's folder, drawn by a seed: what time does to files, what people do, and what enemies do.

Of the first two kinds, ``accidents``, any must be refused as the digests see it. ``hostile`` folders are made with
digests, sizes and seal put right again: there the reading itself must refuse.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarsia.core import seal

CONFIG, TENSORS, PROBE, OURS = "adapter_config.json", "adapter_model.safetensors", "probe.safetensors", "tarsia.json"
FILES = (CONFIG, TENSORS, PROBE, OURS)
Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class Corruption:
    """What is done, and the files of which a refusal must name one."""

    what: str
    files: tuple[str, ...]
    spoil: Spoil


def accidents(seed: int, count: int, other: Path) -> Iterator[Corruption]:
    """Flips, cuts, growths, zeroed pieces, lost files, and files of the adapter in ``other`` in place of its own."""
    draw = random.Random(seed)
    kinds = (_flip, _flip, _flip, _cut, _grow, _zeroed, _swapped, _renamed, _lost, _reformatted)
    for number in range(count):
        yield kinds[number % len(kinds)](random.Random(draw.random()), other)


def _flip(draw: random.Random, other: Path) -> Corruption:
    name, place, bit = draw.choice(FILES), draw.random(), draw.randrange(8)

    def spoil(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        (folder / name).write_bytes(content)

    return Corruption(f"bit {bit} at {place:.4f} of {name}", (name,), spoil)


def _cut(draw: random.Random, other: Path) -> Corruption:
    name, share = draw.choice(FILES), draw.choice((0.0, 0.5, 1.0, draw.random()))

    def spoil(folder: Path) -> None:
        os.truncate(folder / name, int(share * ((folder / name).stat().st_size - 1)))

    return Corruption(f"{name} cut at {share:.3f}", (name,), spoil)


def _grow(draw: random.Random, other: Path) -> Corruption:
    name, more = draw.choice(FILES), draw.choice((b" ", b"\n", b"\0", draw.randbytes(50)))

    def spoil(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(more)

    return Corruption(f"{name} and {more[:4]!r} after it", (name,), spoil)


def _zeroed(draw: random.Random, other: Path) -> Corruption:
    name, place = draw.choice(FILES), draw.random()

    def spoil(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        first = int(place * (len(content) - 17))
        content[first : first + 16] = bytes(16) if any(content[first : first + 16]) else b"\1" * 16
        (folder / name).write_bytes(content)

    return Corruption(f"{name} zeroed at {place:.3f}", (name,), spoil)


def _swapped(draw: random.Random, other: Path) -> Corruption:
    name = draw.choice(FILES)

    def spoil(folder: Path) -> None:
        assert (other / name).read_bytes() != (folder / name).read_bytes(), name
        (folder / name).write_bytes((other / name).read_bytes())

    # another's tarsia.json speaks of other tensors: those are then not what was saved
    return Corruption(f"{name} of another adapter", (name,) if name != OURS else FILES, spoil)


def _renamed(draw: random.Random, other: Path) -> Corruption:
    one, two = draw.sample(FILES, 2)

    def spoil(folder: Path) -> None:
        a, b = (folder / one).read_bytes(), (folder / two).read_bytes()
        (folder / one).write_bytes(b)
        (folder / two).write_bytes(a)

    return Corruption(f"{one} and {two} exchanged", (one, two), spoil)


def _lost(draw: random.Random, other: Path) -> Corruption:
    name, instead = draw.choice(FILES), draw.choice(("nothing", "a folder", "a link to nowhere"))

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        if instead == "a folder":
            (folder / name).mkdir()
        elif instead == "a link to nowhere":
            (folder / name).symlink_to("nowhere")

    return Corruption(f"{instead} where {name} was", (name,), spoil)


def _reformatted(draw: random.Random, other: Path) -> Corruption:
    """The same values, written otherwise."""
    name, how = draw.choice((CONFIG, OURS)), draw.choice(("indent", "escape", "order", "spaces"))

    def spoil(folder: Path) -> None:
        text = (folder / name).read_text()
        value = json.loads(text)
        new = {
            "indent": json.dumps(value, indent=1) + "\n",
            "escape": text.replace('"base', '"\\u0062ase', 1),
            "order": json.dumps(dict(sorted(value.items(), reverse=True)), indent=2) + "\n",
            "spaces": text.replace(": ", ":\t", 1),
        }[how]
        assert new != text and json.loads(new) == value
        (folder / name).write_text(new)

    return Corruption(f"{name} written again: {how}", (name,), spoil)


# What follows is refused though all digests are right.


def put_right(folder: Path) -> None:
    """Digests, sizes and seal as whoever forges an adapter would write them."""
    path = folder / OURS
    described = json.loads(path.read_text())
    names = [name for name in (TENSORS, PROBE, CONFIG) if (folder / name).is_file()]
    small = [name for name in names if (folder / name).stat().st_size < 1 << 30]
    described["sha256"] = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in small}
    described["sha256"] |= {n: "0" * 64 for n in names if n not in small}
    described["bytes"] = {name: (folder / name).stat().st_size for name in names}
    path.write_text(resealed(described))


def resealed(described: dict[str, Any]) -> str:
    """tarsia.json with a right seal, of values that ``save`` would not write as well."""
    return seal.sealed(json.dumps({**described, "seal": seal.BLANK}, indent=2) + "\n")


def hostile(seed: int, count: int) -> Iterator[Corruption]:
    """Tables of tensors, descriptions and configurations that are made to harm who reads them."""
    draw = random.Random(seed)
    every = [*_tables(), *_lengths(), *_descriptions(), *_configurations(), *_texts()]
    draw.shuffle(every)
    for number in range(count):
        yield every[number % len(every)]


def forged(name: str, change: Callable[[dict[str, Any], bytes], bytes | None]) -> Spoil:
    """A safetensors file whose table and data ``change`` has had in hand (it may give other data)."""

    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        length = int.from_bytes(content[:8], "little")
        table, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        data = change(table, data) or data
        header = json.dumps(table).encode()
        (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + data)
        put_right(folder)

    return spoil


ENTRIES: dict[str, dict[str, Any]] = {
    "offsets that are negative": {"data_offsets": [-64, 0]},
    "offsets that are reversed": {"data_offsets": [64, 0]},
    "offsets beyond the file": {"data_offsets": [0, 1 << 40]},
    "offsets beyond 64 bits": {"data_offsets": [0, 1 << 70]},
    "offsets that are no whole numbers": {"data_offsets": [0.0, 64.0]},
    "offsets that are truth values": {"data_offsets": [False, True]},
    "three offsets": {"data_offsets": [0, 64, 64]},
    "an enormous shape": {"shape": [1 << 40, 1 << 40]},
    "a shape whose product is 0 in 64 bits": {"shape": [1 << 32, 1 << 32]},
    "a shape of nothing by too much": {"shape": [0, (1 << 63) - 1, 1 << 62]},
    "a negative shape": {"shape": [-2, -8]},
    "a shape of a million dimensions": {"shape": [2] * 1_000_000},
    "a deep shape": {"shape": [[[[2]]]]},
    "another shape": {"shape": [2, 9]},
    "no shape": {"shape": None},
    "a dtype of another size": {"dtype": "F64"},
    "a dtype of the same size": {"dtype": "I32"},
    "a dtype that nobody knows": {"dtype": "F128"},
    "a dtype that is no text": {"dtype": ["F32"]},
    "nothing but a dtype": {"shape": ..., "data_offsets": ...},
}


def _tables() -> Iterator[Corruption]:
    for name in (TENSORS, PROBE):
        for what, fields in ENTRIES.items():

            def edit(table: dict[str, Any], _: bytes, fields: dict[str, Any] = fields) -> None:
                key = next(k for k in sorted(table, reverse=True) if k != "__metadata__")
                table[key] = {k: v for k, v in (table[key] | fields).items() if v is not ...}

            yield Corruption(f"{what} in {name}", (name, OURS), forged(name, edit))  # type: ignore[arg-type]

        def overlapping(table: dict[str, Any], _: bytes) -> None:
            a, b = sorted(k for k in table if k != "__metadata__")[:2]
            table[a]["data_offsets"] = table[b]["data_offsets"]

        def more(table: dict[str, Any], data: bytes) -> bytes:
            table["one.more"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(data), len(data) + 4]}
            return data + b"more"

        def holed(table: dict[str, Any], data: bytes) -> bytes:
            table["one.more"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(data) + 8, len(data) + 12]}
            return data + b"hole" * 3

        def hidden(_: dict[str, Any], data: bytes) -> bytes:
            return data + b"a program after the tensors"

        yield Corruption(f"tensors on one another in {name}", (name,), forged(name, overlapping))  # type: ignore[arg-type]
        yield Corruption(f"a hole between tensors in {name}", (name,), forged(name, holed))
        yield Corruption(f"bytes after the tensors of {name}", (name,), forged(name, hidden))
        if name == TENSORS:
            yield Corruption("a tensor that nobody named", (TENSORS,), forged(name, more))
    for number, text in (("nan", b"\0\0\xc0\x7f"), ("inf", b"\0\0\x80\x7f"), ("-inf", b"\0\0\x80\xff")):
        yield Corruption(f"a number that is {number}", (TENSORS,), forged(TENSORS, lambda _, d, t=text: d[:-4] + t))  # type: ignore[misc]


def _lengths() -> Iterator[Corruption]:
    """Lengths of the table, as the first 8 bytes say them."""
    for name in (TENSORS, PROBE):
        for length in (0, 1, 7, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):

            def spoil(folder: Path, name: str = name, length: int = length) -> None:
                content = (folder / name).read_bytes()
                (folder / name).write_bytes(length.to_bytes(8, "little") + content[8:])
                put_right(folder)

            yield Corruption(f"a table of {length} bytes in {name}", (name,), spoil)

        def sparse(folder: Path, name: str = name) -> None:
            with (folder / name).open("r+b") as file:
                file.write(((1 << 40) - 8).to_bytes(8, "little"))
                file.truncate(1 << 40)
            put_right(folder)
            # all but the size, which whoever reads must not begin to hash
            described = json.loads((folder / OURS).read_text())
            described["bytes"][name] -= 1
            (folder / OURS).write_text(resealed(described))

        yield Corruption(f"a file of 1 TiB, most of it a hole, as {name}", (name,), sparse)
        for what, header in {
            "deep": b"[" * 100_000,
            "deep and closed": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
            "of two tensors of one name": b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' * 1
            + b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
            "no text": b'{"\xff\xfe":1}',
            "a list": b"[]",
            "empty": b"{}",
            "of a number of a million digits": b'{"a":' + b"9" * 1_000_000 + b"}",
        }.items():

            def headed(folder: Path, name: str = name, header: bytes = header) -> None:
                (folder / name).write_bytes(len(header).to_bytes(8, "little") + header)
                put_right(folder)

            yield Corruption(f"a table that is {what}, in {name}", (name, OURS), headed)


def _edited(name: str, change: Callable[[Any], None]) -> Spoil:
    def spoil(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
        put_right(folder)

    return spoil


def _set(*path: str | int, value: Any) -> Callable[[Any], None]:
    """Put a value where a path leads; "*" is the first key."""

    def change(node: Any) -> None:
        for key in path[:-1]:
            node = node[next(iter(node)) if key == "*" else key]
        last = next(iter(node)) if path[-1] == "*" else path[-1]
        node[last] = value

    return change


def _descriptions() -> Iterator[Corruption]:
    nan = float("nan")
    for value in (nan, float("inf"), 10**400, -(10**400), 1e308 * 10, "2", None, [], {}, "9" * 5000):
        change = _set("patches", "*", "constants", "scale", value=value)
        yield Corruption(f"a scale of {str(value)[:20]}", (OURS,), _edited(OURS, change))
    for what, change in {
        "another format": _set("format", value=2),
        "a field that nobody knows": _set("more", value=1),
        "no method of this name": _set("patches", "*", "method", value="os.system"),
        "a method that is a list": _set("patches", "*", "method", value=["lora"]),
        "two patches of one tensor": lambda d: d["patches"].update(twice=next(iter(d["patches"].values()))),
        "patches in a list": _set("patches", value=[]),
        "tensors in a list": _set("patches", "*", "tensors", value=["A", "B"]),
        "a key that is a number": _set("patches", "*", "tensors", "A", value=1),
        "half an update": lambda d: next(iter(d["patches"].values()))["tensors"].pop("B"),
        "no tensor of this name": _set("patches", "*", "tensors", "A", value="__metadata__"),
        "parts that are none": _set("parts", value=[{"method": "lora"}]),
        "a part of no method": _set("parts", 0, "method", value="x"),
        "a configuration of a part": _set("parts", 0, "config", value={"rank": -1}),
        "a layout that is none": _set("layout", value=None),
        "targets that are not there": _set("layout", "targets", value=["nowhere"]),
        "a fingerprint that is none": _set("fingerprint", value={"weights": "x"}),
        "a fingerprint of numbers": _set("fingerprint", "weights", value=1),
        "a card that is a list": _set("card", value=[1]),
        "a card that is a text": _set("card", value="ab"),
        "a base that is a list": _set("base", value=["x"]),
        "a probe of another kind": _set("probe", value={"difference": 1.0}),
        "a probe that is not a number": _set("probe", "difference", value="much"),
    }.items():
        yield Corruption(f"tarsia.json: {what}", (OURS, TENSORS), _edited(OURS, change))
    for what, change in {
        "no digest": lambda d: d.pop("sha256"),
        "digests that are a list": _set("sha256", value=[]),
        "a digest that is a number": _set("sha256", TENSORS, value=1),
        "no sizes": lambda d: d.pop("bytes"),
        "no seal": lambda d: d.pop("seal"),
        "a seal that is a number": _set("seal", value=1),
        "a seal that is empty": _set("seal", value=""),
    }.items():

        def spoil(folder: Path, change: Callable[[Any], None] = change) -> None:
            value = json.loads((folder / OURS).read_text())
            change(value)
            (folder / OURS).write_text(json.dumps(value, indent=2) + "\n")

        yield Corruption(f"tarsia.json: {what}", (OURS, TENSORS), spoil)


def _configurations() -> Iterator[Corruption]:
    for what, change in {
        "a search that never ends": _set("target_modules", value=r"(.*)*(.*)*(.*)*_pro"),
        "a search that hardly ends": _set("target_modules", value=".*" * 40 + "!"),
        "a rank by a search that never ends": _set("rank_pattern", value={"(a|a|.)*$!": 2}),
        "a pattern with flags": _set("rank_pattern", value={"(?i)q_proj": 2}),
        "a pattern that is none": _set("rank_pattern", value={"(": 2}),
        "a pattern of a group twice": _set("layers_pattern", value=["(?P<index>x)"]),
        "a repeat beyond numbers": _set("target_modules", value="a{99999999999}"),
        "an enormous alpha": _set("lora_alpha", value=10**400),
        "an alpha that is nan": _set("lora_alpha", value=float("nan")),
        "a rank of a million digits": _set("r", value="9" * 1_000_000),
        "another rank": _set("r", value=3),
        "an enormous rank": _set("r", value=1 << 80),
        "another scale": _set("lora_alpha", value=3),
        "another kind": _set("peft_type", value="IA3"),
        "a kind that is a list": _set("peft_type", value=["LORA"]),
        "targets that are a number": _set("target_modules", value=1),
        "targets without end": _set("target_modules", value=["x"] * 100_000),
        "DoRA": _set("use_dora", value=True),
        "modules to save": _set("modules_to_save", value=["lm_head"]),
        "layers": _set("layers_to_transform", value=[7]),
        "a dropout of nan": _set("lora_dropout", value=float("nan")),
    }.items():
        yield Corruption(f"adapter_config.json: {what}", (CONFIG,), _edited(CONFIG, change))


def _texts() -> Iterator[Corruption]:
    for name in (CONFIG, OURS):
        for what, text in {
            "deep": b"[" * 100_000,
            "deep and closed": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
            "of a number of a million digits": b'{"format": ' + b"1" * 1_000_000 + b"}",
            "no object": b"1",
            "no text": b'{"\xff": 1}',
            "in UTF-16": '{"format": 1}'.encode("utf-16"),
            "of null bytes": bytes(64),
        }.items():

            def written(folder: Path, name: str = name, text: bytes = text) -> None:
                (folder / name).write_bytes(text)
                if name != OURS:
                    put_right(folder)

            yield Corruption(f"{name} that is {what}", (name,), written)

        def twice(folder: Path, name: str = name) -> None:
            text = (folder / name).read_text()
            first = next(iter(json.loads(text)))
            (folder / name).write_text(f'{{"{first}": null,' + text.lstrip()[1:])
            if name != OURS:
                put_right(folder)

        def enormous(folder: Path, name: str = name) -> None:
            os.truncate(folder / name, 1 << 40)

        yield Corruption(f"a key of {name} that stands there twice", (name,), twice)
        yield Corruption(f"a file of 1 TiB, most of it a hole, as {name}", (name,), enormous)
