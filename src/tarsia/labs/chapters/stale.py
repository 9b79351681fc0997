"""Vision adapters and a cache of encoded pictures: what its key has to hold."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tarsia.labs import tenants
from tarsia.labs.frame.chapter import Bound, Chapter, Desk, Found
from tarsia.labs.frame.page import COLOURS
from tarsia.labs.frame.tables import Cell
from tarsia.serve.engine import Engine
from tarsia.serve.load import inside
from tarsia.serve.page import Page

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from tarsia.adapter import Host
    from tarsia.library import Library
    from tarsia.serve.load.drawn import Make
    from tarsia.serve.request import Prompt

ADAPTERS: Final = 6
PICTURES: Final = 8
TOKENS: Final = 8
MADE: Final = {"vision": tenants.lora("vision.*.{q,v}", 0.2), "language": tenants.lora("language.*.{q,v}", 0.2)}

Key = Callable[[Page], bytes]
KEYS: Final[Mapping[str, Key]] = {
    "the picture": lambda page: b"",
    "picture and adapter's name": lambda page: page.name.encode(),
    "picture and what it passes": lambda page: page.front,
}
"""What is added to a picture's own key. The last is the engine's."""


@dataclass(frozen=True, slots=True)
class Round:
    """Every adapter asked about every picture: the answers, how many pictures were encoded, and what each should be."""

    said: Sequence[tuple[int, ...]]
    right: Sequence[tuple[int, ...]]
    others: Sequence[frozenset[tuple[int, ...]]]
    encoded: int

    def row(self) -> dict[str, Cell]:
        """As a row of the table."""
        own = [a == b for a, b in zip(self.said, self.right, strict=True)]
        foreign = [a != b and a in others for a, b, others in zip(self.said, self.right, self.others, strict=True)]
        return {
            "answers": len(own),
            "right, %": round(100 * sum(own) / len(own), 1),
            "another adapter's, %": round(100 * sum(foreign) / len(own), 1),
            "pictures encoded": self.encoded,
        }


def keyed(engine: Engine, key: Key) -> None:
    """Let the engine's cache of pictures go by another key."""
    real, posed = engine.front.features, dict[int, tuple[Page, Page]]()

    def features(picture: object, page: Page | None) -> object:
        if page is None:
            return real(picture, None)  # type: ignore[arg-type]
        if id(page) not in posed:
            other = copy.copy(page)
            other.front = key(page)
            posed[id(page)] = page, other
        return real(picture, posed[id(page)][1])  # type: ignore[arg-type]

    setattr(engine.front, "features", features)  # noqa: B010 (a method is put over, for this engine alone)


def asked(
    engine: Engine,
    prompts: Sequence[Prompt],
    names: Sequence[str],
    right: Sequence[Sequence[tuple[int, ...]]],
    tokens: int = TOKENS,
) -> Round:
    """Ask every adapter about every picture, in an order that is drawn."""
    pairs = [(a, p) for a in range(len(names)) for p in range(len(prompts))]
    random.Random(0).shuffle(pairs)
    before = engine.front.misses
    ran = inside.run(engine, [prompts[p] for _, p in pairs], [names[a] for a, _ in pairs], tokens)
    return Round(
        ran.ids,
        [right[a][p] for a, p in pairs],
        [frozenset(held[p] for held in right) for _, p in pairs],
        engine.front.misses - before,
    )


def measure(desk: Desk) -> Found:
    """Each key, for adapters of the tower and of the language model; then each name means another adapter."""
    shutil.rmtree(desk.work, ignore_errors=True)
    plain = tenants.host()
    texts = [inside.Text(tenants.QUESTION, i) for i in range(PICTURES)]
    prompts = [inside.encoded(plain, one) for one in texts]
    rows: dict[str, Mapping[str, Cell]] = {}
    series: dict[str, list[float]] = {}
    for n, kind in enumerate(MADE):
        desk.show(n / 2, f"{kind}: what each adapter says alone")
        first, second = (_library(desk.work, plain, kind, version) for version in (0, 1))
        names = [f"{kind}-{i}" for i in range(ADAPTERS)]
        right = [[tenants.alone(plain, held, name, texts, TOKENS) for name in names] for held in (first, second)]
        for k, (how, key) in enumerate(KEYS.items()):
            desk.show(n / 2 + (k + 1) / 8, f"{kind}: keyed by {how}")
            shutil.rmtree(desk.work / "served", ignore_errors=True)
            served = tenants.library(desk.work / "served", plain, _wanted(kind, 0))
            engine = tenants.engine(served, 2 * ADAPTERS)
            keyed(engine, key)
            before = asked(engine, prompts, names, right[0]).row()
            for name in names:
                served.publish(second.folder(second.version(name)), name)
            after = asked(engine, prompts, names, right[1]).row()
            engine.pages.close()
            rows[f"{kind}: {how}"] = before
            rows[f"{kind} replaced: {how}"] = after
            series[f"{kind} {how}"] = [float(row["right, %"]) for row in (before, after)]
    return Found(rows, series, {"mini-1": plain.fingerprint.weights})


def _wanted(kind: str, version: int) -> list[tuple[str, Make, int]]:
    return [(f"{kind}-{i}", MADE[kind], 100 * version + i) for i in range(ADAPTERS)]


def _library(work: Path, plain: Host, kind: str, version: int) -> Library:
    return tenants.library(work / f"{kind}-{version}", plain, _wanted(kind, version))


def draw(found: Found, figure: Figure) -> None:
    """Right answers by key, before and after the replacement; and how many pictures were encoded."""
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for n, kind in enumerate(MADE):
        for k, how in enumerate(KEYS):
            for v, (value, alpha) in enumerate(zip(found.series[f"{kind} {how}"], (1.0, 0.5), strict=True)):
                x = 4 * n + k + 0.38 * v - 0.19
                left.bar(x, value, 0.34, color=COLOURS[(1, 3, 0)[k]], alpha=alpha)
                left.text(x, value + 1.5, f"{value:.0f}", ha="center", fontsize=8)
    left.set_xticks([4 * n + k for n in range(2) for k in range(3)], ["picture", "+ name", "+ content"] * 2)
    for n, kind in enumerate(MADE):
        left.text(4 * n + 1, 112, f"adapters of the {kind} model" if n else "adapters of the vision tower", ha="center")
    left.set_ylim(0, 120)
    left.set_title("right answers, %, by what the key holds (pale: after each was replaced)")
    for k, how in enumerate(KEYS):
        for n, kind in enumerate(MADE):
            value = float(found.rows[f"{kind}: {how}"]["pictures encoded"])
            right.bar(4 * n + k, value, 0.7, color=COLOURS[(1, 3, 0)[k]])
            right.text(4 * n + k, value + 0.6, f"{value:.0f}", ha="center", fontsize=8)
    right.set_xticks([1, 5], ["vision", "language"])
    right.set_title("pictures encoded")


TEXT: Final = f"""
A server keeps what its vision tower made of a picture, for the picture that is asked about again. Where an adapter has
patches in the tower, what the tower makes of a picture depends on the adapter too. Keyed by the picture alone, a cache
hands one tenant what another tenant's adapter saw; keyed by the picture and the adapter's *name*, it hands out what an
adapter saw that has been replaced since ([vllm#44939](https://github.com/vllm-project/vllm/issues/44939)). Nothing
fails: an answer comes, fluently, and is somebody else's.

Here {ADAPTERS} adapters of mini-1's tower (LoRA on its queries and values), and {ADAPTERS} of its language model, are
each asked about the same {PICTURES} pictures, all mixed in one engine; then each name is given another adapter (a new
version in the library) and everything is asked again. Each answer is held, token for token, to what Transformers' own
generation says with that adapter alone. Three keys, the last of which is the engine's: a digest of whatever of the
adapter a picture passes before it comes to the decoder, nothing where it passes nothing.

Adapters of the vision tower:

{{{{ table("vision", "keyed by") }}}}
After each was replaced:

{{{{ table("vision replaced", "keyed by") }}}}
Adapters of the language model alone:

{{{{ table("language", "keyed by") }}}}
These touch nothing that a picture passes, so the engine encodes each picture once for all of them: the key costs
nothing where it is not needed, and a name in it would.
"""

CHAPTER: Final = Chapter(
    name="stale",
    title="What a cache of pictures is keyed by",
    question="What does a server answer that keeps encoded pictures and forgets the adapter?",
    claim="With adapters in the vision tower and encoded pictures kept by the picture alone at most 50 % of the "
    "answers are right; kept by picture and adapter's name, at most 50 % after the adapters were replaced; kept by the "
    f"content that pictures pass, 100 % are right, and {ADAPTERS} adapters that leave the tower alone share one "
    f"encoding of each of {PICTURES} pictures.",
    bounds=(
        Bound("right, by the picture, %", "vision: the picture", "right, %", 0, 50),
        Bound("another's, by the picture, %", "vision: the picture", "another adapter's, %", 50, 100),
        Bound("right, by name, replaced, %", "vision replaced: picture and adapter's name", "right, %", 0, 50),
        Bound("right, by content, %", "vision: picture and what it passes", "right, %", 100, 100),
        Bound("right, by content, replaced, %", "vision replaced: picture and what it passes", "right, %", 100, 100),
        Bound("language, by content, %", "language: picture and what it passes", "right, %", 100, 100),
        Bound("shared encodings", "language: picture and what it passes", "pictures encoded", PICTURES, PICTURES),
    ),
    measure=measure,
    draw=draw,
    picture="right answers by what the key of the picture cache holds, and how many pictures were encoded",
    text=TEXT,
    order=174,
    minutes=1.5,
    size=(11, 4.2),
)
"""The vision adapters are drawn, not trained: what they see is nonsense, and each one's own."""
