"""The adapters at work on their base: what they say there, before they are folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tarsia.adapter.files import OURSELVES, load
from tarsia.adapter.fingerprint import Fingerprint
from tarsia.adapter.four_bits import FourBits
from tarsia.adapter.host import Host, Precision, open_base
from tarsia.adapter.resolution import one_resolution
from tarsia.adapter.value import Adapter, put
from tarsia.core.attach import activate, patches
from tarsia.core.errors import ConfigError, MergeError
from tarsia.core.method import METHODS, find
from tarsia.core.patch import Patch
from tarsia.core.site import Component, Site
from tarsia.data.encode import Encoder
from tarsia.data.samples import Sample
from tarsia.merge.proof import Apart, Heard, Inputs, apart, hear, pictures

KEEP: Final = 0.9
"""Less of the change than this may not be left."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What a fold is held to: the share of the change that must be left (``keep``, 0..1), and further ``rows``.

    All is computed in ``precision`` (None: that of the adapters' probes, else float32).
    """

    rows: Sequence[Sample] = ()
    keep: float = KEEP
    precision: Precision | None = None


@dataclass(frozen=True, eq=False)
class Live:
    """What the live adapters said on their base, and what of them is folded; the model is gone."""

    adapters: tuple[Adapter, ...]
    layers: tuple[Mapping[Site, Patch], ...]
    heard: tuple[Heard, ...]
    moved: Apart
    fingerprint: Fingerprint
    precision: str


def check_folds(adapter: Adapter) -> None:
    """Raise MergeError where a patch is no change of a weight, naming sites and methods."""
    stuck = {path: held.method for path, held in adapter.patches.items() if not find(held.method).folds}
    if stuck:
        methods = ", ".join(sorted(set(stuck.values())))
        raise MergeError(
            f"What {methods} adds can not be written as a change of weights, so it does not fold.",
            given=f"{', '.join(list(stuck)[:3])}{' ...' if len(stuck) > 3 else ''} ({len(stuck)} sites)",
            allowed="methods that fold: " + ", ".join(sorted(name for name, method in METHODS.items() if method.folds)),
            do="keep it as an adapter and put it in as the model is opened, or train one of these methods",
        )


def own(folder: Path) -> Adapter | None:
    """An adapter that says itself what it is; PEFT's are understood beside a base alone."""
    return load(folder) if (folder / OURSELVES).is_file() or not folder.is_dir() else None


def listened(
    base: str,
    given: Sequence[Adapter | Path | str],
    known: Sequence[Adapter | None],
    form: FourBits | None,
    allow: Sequence[str],
    bar: Bar,
) -> Live:
    """Open the base, let the adapters act, and write down what they say; afterwards the model is let go."""
    probes = [one.probe for one in known if one is not None and one.probe is not None]
    dtype: Any = bar.precision or next((probe.dtype for probe in probes), "float32")
    host = open_base(base, dtype=dtype, processor=bool(bar.rows), four_bits=form)
    adapters, layers = [], []
    for number, (source, found) in enumerate(zip(given, known, strict=True)):
        adapter = found or load(str(source), host)
        check_folds(adapter)
        put(host, adapter, f"folded-{number}", allow=allow)
        adapters.append(adapter)
        layers.append(patches(host.model, f"folded-{number}"))
    batches: list[Inputs] = [one.probe.inputs for one in adapters if one.probe is not None]
    batches += _encoded(host, adapters, bar.rows)
    _check_seen(batches, layers)
    vocabulary = int(host.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    heard = hear(host.model, batches, vocabulary)
    activate(host.model)
    moved = apart(host.model, heard)
    live = Live(tuple(adapters), tuple(layers), heard, moved, host.fingerprint, str(dtype))
    if not moved.largest:
        raise MergeError(
            "The adapter changes no output of the rows, so a fold would prove nothing.",
            do="train it first, or give rows that it acts on",
        )
    return live


def _encoded(host: Host, adapters: Sequence[Adapter], rows: Sequence[Sample]) -> list[Inputs]:
    """One batch for each row, with pictures as the adapters were trained to see them.

    Raises ConfigError where they were trained at different resolutions.
    """
    if not rows:
        return []
    named = {f"adapter {number}": one for number, one in enumerate(adapters, 1)}
    size = one_resolution(named, "fold one at a time, or leave the rows out where their own probes are enough")
    encoder = Encoder(host.processor, variables=host.variables, resolution=next(iter(size), None))
    return [encoder.batch([row]).inputs for row in rows]


def _check_seen(batches: Sequence[Inputs], layers: Sequence[Mapping[Site, Patch]]) -> None:
    """Raise ConfigError where there are no rows to prove on, or none with the pictures that patched sites see."""
    if not batches:
        raise ConfigError(
            "There are no rows to prove the fold on: the adapter was saved without a probe.",
            do="give rows with pictures (--rows FILE)",
        )
    seeing = [s for layer in layers for s in layer if s.component is not Component.LANGUAGE]
    if seeing and not pictures(batches):
        raise ConfigError(
            "The rows to prove the fold on have no picture, and the adapter changes how pictures are seen.",
            given=seeing[0].path,
            do="give rows with pictures (--rows FILE)",
        )


def check_starts(live: Live, onto: str | None) -> None:
    """Raise MergeError for what corrects an error of rounding and is to go where there is none."""
    methods = {held.method for one in live.adapters for held in one.patches.values()}
    if onto == "original" and (stuck := sorted(name for name in methods if find(name).corrects)):
        raise MergeError(
            f"What {', '.join(stuck)} learnt starts from the rounding's error, and means nothing over the original.",
            given="--onto original",
            do="fold it --onto dequantised",
        )
