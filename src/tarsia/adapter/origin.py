"""The weights of a base as its files hold them, one at a time, without the model that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from tarsia.adapter.fingerprint import shards
from tarsia.adapter.reading import AGAIN, header
from tarsia.adapter.spelling import Speller
from tarsia.adapter.tensors import DTYPES
from tarsia.core.errors import AdapterError, AttachError
from tarsia.core.site import Site


class Origins:
    """Where the weight of each site lies in ``folder``: called with one, it reads that tensor alone, in its own dtype.

    Files may spell names as an older library did (see ``Speller``). A weight that the model keeps in another form
    than the files, a third of a fused matrix say, has no origin.
    """

    def __init__(self, folder: Path, model: nn.Module, sites: Sequence[Site]) -> None:
        self.folder, self.model, self.sites = folder, model, sites

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where every tensor lies, by the model's own name of it."""
        find = Speller.of(self.model, self.sites).own
        found: dict[str, Place] = {}
        for path in shards(self.folder):
            table, start = header(path)
            for key, entry in table.items():
                module, _, leaf = key.rpartition(".")
                own = find(module) if module else ""
                if own is not None:
                    begin, end = entry["data_offsets"]
                    name = f"{own}.{leaf}" if own else leaf
                    found[name] = Place(path, start + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
        return found

    def __call__(self, site: Site) -> Tensor:
        """The weight, on the CPU. Raises AttachError where the files have none like it."""
        place = self.places.get(site.weight)
        if place is None:
            raise AttachError(
                f"The weight of {site.path} is kept in another form by the base's files.",
                given=str(self.folder),
                do="leave this site to lora or pissa, or save the base again with this version of transformers",
            )
        try:
            return place.read()
        except (OSError, EOFError) as error:
            raise AdapterError(
                f"{place.path.name} can not be read.", given=f"{place.path}: {error}", do=AGAIN
            ) from None


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of one tensor lie in a safetensors file."""

    path: Path
    begin: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor: its bytes alone are read, and the file is not mapped whole. Raises OSError and EOFError."""
        raw = bytearray(self.bytes)
        with self.path.open("rb") as file:
            file.seek(self.begin)
            if file.readinto(raw) != self.bytes:
                raise EOFError("it ends too early")
        return torch.frombuffer(raw, dtype=DTYPES[self.dtype]).view(self.shape)


def nowhere(why: str) -> Callable[[Site], Tensor]:
    """The origin of a base that has none: it says ``why``."""

    def refuse(site: Site) -> Tensor:
        raise AttachError(
            f"The weight of {site.path} before it was quantised is not to be had: {why}.",
            do="open the base's 16-bit files with four_bits, or choose lora or pissa",
        )

    return refuse
