"""Adapters that nobody trained, for load and for measuring: each follows from a number, is proved and is published.

A server holds a drawn adapter to the probe on its card exactly as a trained one: its outputs are recorded through the
model, and one that hardly moves them is not made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tarsia.adapter import Adapter, Host, Probe, save
from tarsia.core.attach import Part, activate, attach, detach, patches
from tarsia.core.errors import AdapterError, LibraryError
from tarsia.library import Library

MOVED: Final = 0.1
"""Least difference of a logit from the base's: what moves less could be mistaken for the base."""
_TOP: Final = 4
"""Logits that are kept at each position, as ``adapter.probe`` keeps them."""


@dataclass(frozen=True, slots=True)
class Make:
    """What an adapter is drawn as: where its patches lie, and by how much each number is moved from its start."""

    parts: tuple[Part, ...]
    by: float = 0.02


class Drawer:
    """Draws adapters on one host. What the base says to the rows of the probe is looked at once for all of them."""

    def __init__(self, host: Host, inputs: Mapping[str, Tensor]) -> None:
        self.host = host
        self.inputs = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and k != "labels"}
        activate(host.model)
        self.bare = self._logits()

    def draw(self, make: Make, seed: int) -> Adapter:
        """The adapter of this number; the host is left bare. Raises AdapterError where it hardly moves a logit."""
        name = "drawn"
        activate(self.host.model)
        attach(self.host.model, self.host.sites, make.parts, name=name, seed=seed)
        try:
            moved(self.host, name, make.by, seed)
            card = {"drawn": {"seed": seed, "by": make.by, "trained": False}}
            return Adapter.of(self.host, name, make.parts, card, probe=self._probe(seed))
        finally:
            detach(self.host.model, name)

    def _probe(self, seed: int) -> Probe:
        said = self._logits()
        difference = float((said - self.bare).abs().max())
        if not difference >= MOVED:
            raise AdapterError(
                "A drawn adapter hardly moves the base.",
                given=f"number {seed}: {difference:.3g}",
                allowed=f"at least {MOVED:g}",
                do="draw it with larger numbers",
            )
        mask = self.inputs.get("attention_mask")
        top = said.topk(min(_TOP, said.shape[-1]), dim=-1)
        kept = torch.ones(said.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
        return Probe(
            inputs={key: value.detach().to("cpu", copy=True).contiguous() for key, value in self.inputs.items()},
            tokens=top.indices.masked_fill(~kept[..., None], 0),
            logits=top.values.masked_fill(~kept[..., None], 0),
            difference=difference,
            peak=float(said.abs().max()),
            dtype=str(next(self.host.model.parameters()).dtype).removeprefix("torch."),
        )

    @torch.no_grad()
    def _logits(self) -> Tensor:
        found: Tensor = self.host.model(**self.inputs, use_cache=False).logits
        mask = self.inputs.get("attention_mask")
        found = found.float().cpu()
        return found if mask is None else found.masked_fill(~mask.bool().cpu()[..., None], 0)


@torch.no_grad()
def moved(host: Host, name: str, by: float, seed: int) -> None:
    """Add a normal number of deviation ``by`` to everything that the adapter ``name`` would train."""
    generator = torch.Generator().manual_seed(seed)
    for patch in patches(host.model, name).values():
        for parameter in patch.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=by)


def publish(
    drawer: Drawer,
    library: Library,
    wanted: Sequence[tuple[str, Make, int]],
    show: Callable[[int, str], None] = lambda number, name: None,
) -> Iterator[str]:
    """Draw and publish what the library does not have yet: names with what to draw and its number. Gives each name."""
    there = {version.name for version in library.search()}
    with tempfile.TemporaryDirectory(prefix="tarsia-drawn-") as scratch:
        for i, (name, make, seed) in enumerate(wanted):
            if name not in there:
                folder = Path(scratch) / f"{i}"
                save(drawer.draw(make, seed), folder)
                library.publish(folder, name, note=f"drawn, number {seed}")
                _emptied(folder)
                show(i, name)
            yield name


def held(library: Library, names: Sequence[str]) -> None:
    """Raise LibraryError, naming one, where the library lacks some of these."""
    missing = sorted(set(names) - {version.name for version in library.search()})
    if missing:
        raise LibraryError(f"The library lacks {len(missing)} of {len(names)} adapters.", given=missing[0])


def _emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
