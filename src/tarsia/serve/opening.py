"""A worker's house as it is told to be: the base opened, its library, pages, engine, reader and router."""

from __future__ import annotations

import logging as log
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Final, Literal

import torch
from transformers.utils import logging

from tarsia.adapter import Host, open_base
from tarsia.adapter.four_bits import described
from tarsia.core.site import Component
from tarsia.library import Library
from tarsia.serve import wire
from tarsia.serve.arrivals import of_another
from tarsia.serve.engine import Engine, Limits
from tarsia.serve.house import House
from tarsia.serve.pages import GIB, Pages
from tarsia.serve.read import Reader
from tarsia.serve.routing import Chosen

_TOLD: Final = 20  # adapters that the log names
_LOG = log.getLogger("tarsia.serve.opening")


def opened(configure: wire.Configure, tell: Callable[[str], None]) -> House:
    """Open everything; ``tell`` is told what goes on, for people. Raises TarsiaError where something can not be."""
    begun = time.monotonic()
    torch.set_num_threads(configure.threads or cores())
    logging.disable_progress_bar()  # whoever started the server is told by `tell`
    tell(f"opening the base {configure.model}")
    host = _base(configure)
    library = None
    if configure.library is not None:
        tell(f"opening the library {configure.library}")
        library = Library.open(configure.library)
        count(library, host)
    unproved: Literal["refuse", "allow"] = "allow" if configure.unproved else "refuse"
    pages = Pages(host, library, budget=configure.adapter_bytes or GIB, unproved=unproved)
    tell("holding the engine's pass to the base's own")
    reader = Reader(host)
    engine = Engine(host, pages, _limits(configure), reader=reader)
    route = None
    if library is not None and hasattr(host.model, "get_image_features"):
        tell("reading what the adapters' pictures look like")
        route = Chosen(host, library)
    ready = _ready(host, engine, routed=route is not None, seconds=time.monotonic() - begun)
    return House(engine, pages, reader.read, engine.voice.prepare, ready, route)


def count(library: Library, host: Host) -> None:
    """Have the log tell of adapters of another base: they are not listed, and refused where they are asked for."""
    own, versions = asdict(host.fingerprint), library.search()
    others = [v.reference for v in versions if of_another(v, own)]
    if others:
        told = {"of_this_base": len(versions) - len(others), "of_another": len(others), "first": others[:_TOLD]}
        _LOG.warning("adapters of another base are in the library: they are refused", extra={"facts": told})


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _base(configure: wire.Configure) -> Host:
    form = None if configure.four_bits is None else described(configure.four_bits)
    return open_base(
        configure.model, dtype=configure.dtype, device=configure.device, four_bits=form, resolution=configure.resolution
    )


def _limits(configure: wire.Configure) -> Limits:
    plain = Limits()
    return Limits(
        cache_bytes=configure.cache_bytes or plain.cache_bytes,
        picture_bytes=configure.picture_bytes or plain.picture_bytes,
        rows=configure.rows,
        chunk=configure.chunk,
        answer=configure.answer,
    )


def _sees(host: Host) -> bool:
    """Whether the base has eyes: a vision side whose parameters are sites."""
    return any(site.component is Component.VISION for site in host.sites)


def _ready(host: Host, engine: Engine, *, routed: bool, seconds: float) -> wire.Ready:
    first = next(p for p in host.model.parameters() if p.is_floating_point())
    return wire.Ready(
        model=host.name,
        family=host.anatomy.name,
        form=host.form,
        digest=host.fingerprint.weights,
        dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
        context=engine.context,
        most_tokens=engine.most,
        vocabulary=engine.voice.vocabulary,
        pictures=_sees(host),
        router=routed,
        seconds=seconds,
    )
