"""The weights of a base as its files hold them, one at a time, without the model that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tarsia.adapter.fingerprint import shards
from tarsia.adapter.reading import AGAIN, header
from tarsia.adapter.spelling import Speller
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
    def places(self) -> dict[str, tuple[Path, str]]:
        """The file and the key of every tensor, by the model's own name of it."""
        find = Speller.of(self.model, self.sites).own
        found: dict[str, tuple[Path, str]] = {}
        for path in shards(self.folder):
            for key in header(path)[0]:
                module, _, leaf = key.rpartition(".")
                own = find(module) if module else ""
                if own is not None:
                    found[f"{own}.{leaf}" if own else leaf] = (path, key)
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
        path, key = place
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{path.name} can not be read.", given=f"{path}: {error}", do=AGAIN) from None
        return tensor


def nowhere(why: str) -> Callable[[Site], Tensor]:
    """The origin of a base that has none: it says ``why``."""

    def refuse(site: Site) -> Tensor:
        raise AttachError(
            f"The weight of {site.path} before it was quantised is not to be had: {why}.",
            do="open the base's 16-bit files with four_bits, or choose lora or pissa",
        )

    return refuse
