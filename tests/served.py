"""A family's tiny model served, and beside it the same with its adapters put in the plain way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from families import FAMILIES, Family
from single_rows import UNSAID, alone, longer, pictures
from torch import Tensor

from tarsia.adapter import Adapter, Host
from tarsia.anatomy.streams import PATCHES
from tarsia.core.attach import Part, activate, attach, patches
from tarsia.core.errors import ServeError
from tarsia.core.lead import Lead
from tarsia.core.method import METHODS
from tarsia.core.site import Kind
from tarsia.serve.engine import Engine, Limits
from tarsia.serve.mixed import Board
from tarsia.serve.page import Page, page
from tarsia.serve.request import Picture, Prompt, Request, Sampling
from tarsia.serve.sample import Drawer
from tarsia.serve.voice import Told

SERVED = tuple(name for name in FAMILIES if name not in ("mllama", "blip_2", "paligemma"))
"""Mllama and BLIP-2 have no decoder that reads one line; PaliGemma has no chat template."""
ADAPTERS: Mapping[str, tuple[tuple[str, str, Mapping[str, Any]], ...]] = {
    "low": (("lora", "*.-2..", {"rank": 3, "alpha": 6.0}),),
    "high": (("lora", "*", {"rank": 16, "alpha": 16.0}),),
    "dora": (("dora", "*.-2..", {"rank": 4, "alpha": 4.0}),),
    "neck": (("houlsby", "*.-2..", {"reduction": 4}),),
    "beside": (("scaled_parallel", "language", {"reduction": 4}),),
    "projector": (("full", "projector", {}), ("lora", "language.*.{q,v}", {"rank": 2, "alpha": 2.0})),
    "scales": (("ia3", "language", {}),),
    "prompt": (("prompt", "language", {"length": 3}),),
    "prefix": (("prefix", "language", {"length": 5}),),
    "turned": (("oft", "language.*.q", {}),),
}
MOVED = 0.2


def seeds(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@dataclass(frozen=True, eq=False)
class Served:
    """``plain`` has the adapters attached, none acts; ``adapters`` are the same as values."""

    family: Family
    plain: Host
    adapters: Mapping[str, Adapter]
    prompts: Sequence[Prompt]
    inputs: Sequence[Mapping[str, Tensor]]

    def pages(self) -> Pages:
        return Pages(Host.of(self.family.build()[0]), self.adapters)

    def logits(self, name: str | None, row: int, answer: Sequence[int]) -> Tensor:
        """What the plain model gives along an answer, [tokens, vocabulary]: one call, no cache."""
        causal = next(site.causal or 0 for site in self.plain.sites if site.kind is Kind.SEQUENCE)
        activate(self.plain.model, *([] if name is None else [name]))
        with torch.no_grad():
            call = longer(dict(self.inputs[row]), torch.tensor([list(answer)]), causal)
            found = self.plain.model(**call, use_cache=False).logits[0]
        activate(self.plain.model)
        return found[-len(answer) - 1 : -1].float()


class Pages:
    """Adapters that are all here, made when they are first asked for."""

    def __init__(self, host: Host, adapters: Mapping[str, Adapter]) -> None:
        self.host, self.adapters, self.board = host, adapters, Board(host)
        self.held: dict[str, Page] = {}
        self.used: dict[str, int] = {}

    def pump(self) -> None:
        pass

    def resolve(self, name: str) -> str:
        if name not in self.adapters:
            raise ServeError("unknown_adapter", "There is no such adapter.", given=name)
        return name

    def want(self, name: str) -> Ticket:
        self.resolve(name)
        if name not in self.held:
            self.held[name] = page(self.board, name, self.adapters[name], name.encode())
        return Ticket(self, self.held[name])


@dataclass
class Ticket:
    pages: Pages
    page: Page
    error: None = None

    def __post_init__(self) -> None:
        self.pages.used[self.page.name] = self.pages.used.get(self.page.name, 0) + 1

    def release(self) -> None:
        self.pages.used[self.page.name] -= 1


class Bare:
    """A voice for models without a tokenizer: answers go on to their longest, ids are all that is told."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def drawer(self, sampling: Sampling, choice: int) -> Drawer:
        return Drawer(sampling, self.vocabulary, choice=choice)

    def telling(self, sampling: Sampling, drawer: Drawer) -> Bare:
        return self

    def add(self, token: int) -> Told:
        return Told("", False)

    def flush(self) -> str:
        return ""

    def spell(self, token: int) -> Mapping[str, Any]:
        return {"token": str(token), "bytes": []}


@cache
def served(name: str) -> Served:
    """The family, rows with 0, 1 and 3 pictures, and adapters of every kind that move its logits."""
    family = FAMILIES[name]
    plain, adapters = Host.of(family.build()[0]), {}
    for adapter, asked in ADAPTERS.items():
        parts = [Part(method, select, METHODS[method].config(**options)) for method, select, options in asked]
        attach(plain.model, plain.sites, parts, name=adapter)
        generator = torch.Generator().manual_seed(seeds(adapter))
        with torch.no_grad():
            for patch in patches(plain.model, adapter).values():
                by = 1.0 if isinstance(patch, Lead) else MOVED  # what stands before many tokens is one of many
                for parameter in patch.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)
        adapters[adapter] = Adapter.of(plain, adapter, parts)
        activate(plain.model)
    counts = pictures(family, (0, 1, 3))
    batch = family.batch(counts)
    owned = plain.anatomy.segments(batch).counts.get(PATCHES)
    rows = [alone(family, batch, counts, i, owned) for i in range(len(counts))]
    prompts = [prompt(family, row, count) for row, count in zip(rows, counts, strict=True)]
    return Served(family, plain, adapters, prompts, rows)


def prompt(family: Family, row: Mapping[str, Tensor], count: int) -> Prompt:
    """A row of a batch as the engine takes it: its pictures apart, where the family encodes them apart."""
    beside = {k: v for k, v in row.items() if k.startswith(("pixel", "image", "batch_num"))}
    marks = {k: v for k, v in row.items() if k not in beside and k not in ("input_ids", "attention_mask")}
    parts = [beside] if family.name == "llava_onevision" and count else [_own(beside, i, family) for i in range(count)]
    held = tuple(Picture(_digest(one), one) for one in parts)
    return Prompt(tuple(row["input_ids"][0].tolist()), held, marks)


def _own(beside: Mapping[str, Tensor], i: int, family: Family) -> dict[str, Tensor]:
    grids = beside.get("image_grid_thw")
    ends = None if grids is None else [0, *grids.prod(-1).cumsum(0).tolist()]
    found = {}
    for key, value in beside.items():
        if family.name in ("idefics3", "smolvlm"):
            found[key] = value[:, i : i + 1]
        elif key == "pixel_values" and ends is not None:
            found[key] = value[ends[i] : ends[i + 1]]
        else:
            found[key] = value[i : i + 1]
    return found


def _digest(inputs: Mapping[str, Tensor]) -> bytes:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in inputs.values())).digest()


def engine(pages: Pages, **limits: int) -> Engine:
    """A small engine: blocks of 4 tokens, and a voice that tells ids alone."""
    vocabulary = pages.host.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    wanted = Limits(**{"cache_bytes": 1 << 22, "picture_bytes": 1 << 20, "block": 4, "rows": 64, "chunk": 40} | limits)
    return Engine(pages.host, pages, wanted, voice=Bare(vocabulary))  # type: ignore[arg-type]


def asked(prompt: Prompt, adapter: str | None, tokens: int = 12, **options: Any) -> Request:
    """A greedy request of ``tokens`` tokens, none of which stands for a picture."""
    number = next(_numbers)
    sampling = Sampling(
        max_tokens=tokens, ignore_end=True, bias=dict.fromkeys(UNSAID, -100.0), **({"temperature": 0.0} | options)
    )
    return Request(f"{adapter or 'base'}-{number}", prompt, adapter, sampling)


_numbers = iter(range(1 << 30))


def ids(events: Sequence[Any], choice: int = 0) -> list[int]:
    """The tokens of one choice."""
    return [i for e in events if e.kind == "text" and e.data["choice"] == choice for i in e.data["ids"]]


def likely(events: Sequence[Any]) -> list[dict[int, float]]:
    """The log-probabilities that were told of each token."""
    told = [e.data["logprobs"][0] for e in events if e.kind == "text"]
    return [{int(one["token"]): one["logprob"] for one in [token, *token["top"]]} for token in told]
