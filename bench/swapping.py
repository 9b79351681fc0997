"""Who takes part in ``bench/cases/swap.py``: ten adapters of one model, held and loaded by Tarsia and by PEFT.

The model is ``bench.smol``'s, in float32; an adapter is a LoRA of rank 16 at every linear layer of the language model
(18.7 MiB), in a folder that both read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from bench.contestants import batch

RANK: Final = 16
SELECT: Final = "language.*.{q,k,v,o,gate,up,down}"
Ways = dict[str, Callable[[int], object]]
"""By operation what does it to adapter ``i``; what is not to be timed comes as "before NAME"."""


def name(i: int) -> str:
    """What adapter ``i`` is called."""
    return f"task-{i}"


def folders(model: Path, out: Path, count: int) -> list[Path]:
    """Folders of so many adapters, drawn at random."""
    from tarsia.adapter import Adapter, open_base, save
    from tarsia.core.attach import Part, attach, detach, patches
    from tarsia.core.method import find

    host = open_base(str(model), dtype="float32", device="cpu")
    parts = [Part("lora", SELECT, find("lora").configure({"rank": RANK, "alpha": 2.0 * RANK}))]
    made = []
    for i in range(count):
        attach(host.model, host.sites, parts, name="drawn", seed=i)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for patch in patches(host.model, "drawn").values():
                held: Any = patch
                held.B.copy_(0.02 * torch.randn(held.B.shape, generator=generator))
        made.append(out / name(i))
        save(Adapter.of(host, "drawn", parts), made[i])
        detach(host.model, "drawn")
    return made


class Tarsia:
    """Ten adapters attached to one host, and published in a library."""

    def __init__(self, model: Path, adapters: list[Path], root: Path) -> None:
        from tarsia.adapter import load, open_base, put
        from tarsia.core.attach import activate
        from tarsia.library import Library
        from tarsia.library.opening import open_adapter

        self.adapters = adapters
        self.library = Library.make(root)
        for i, folder in enumerate(adapters):
            self.library.publish(folder, name(i))
        self.host = open_base(str(model), dtype="float32", device="cpu")
        self.values = [load(folder) for folder in adapters]
        for i, value in enumerate(self.values):
            activate(self.host.model)
            put(self.host, value, name(i))
        for i in range(len(adapters)):
            open_adapter(self.library, name(i))  # the first time every number is looked at
        self.inputs = batch(model, rows=1, length=192)[0]

    def ways(self) -> Ways:
        """What is timed."""
        from tarsia.adapter import load, put
        from tarsia.adapter.swap import swap
        from tarsia.core.attach import activate, detach, merge, unmerge
        from tarsia.core.errors import AttachError
        from tarsia.library.opening import open_adapter

        model = self.host.model

        def beside(i: int) -> None:
            put(self.host, load(self.adapters[i]), "beside")

        def gone(i: int) -> None:
            unmerge(model)
            with suppress(AttachError):
                detach(model, "beside")
            activate(model)

        def acting(i: int) -> None:
            gone(i)
            activate(model, name(i))

        def there_and_back(i: int) -> None:
            merge(model)
            unmerge(model)

        return {
            "switch": lambda i: activate(model, name(i)),
            "over one": lambda i: swap(self.host, open_adapter(self.library, name(i)), name(0)),
            "over one, from a folder": lambda i: swap(self.host, load(self.adapters[i]), name(0)),
            "over one, in memory": lambda i: swap(self.host, self.values[i], name(0)),
            "before beside": gone,
            "beside": beside,
            "before merge and unmerge": acting,
            "merge and unmerge": there_and_back,
            "before merge": acting,
            "merge": lambda i: merge(model),
            "before nothing": gone,
        }

    @torch.no_grad()
    def said(self, i: int | None) -> Tensor:
        """Logits with adapter ``i``, or of the base."""
        from tarsia.core.attach import activate

        activate(self.host.model, None if i is None else name(i))
        found: Tensor = self.host.model(**self.inputs, use_cache=False).logits
        return found


class Peft:
    """The same in PEFT."""

    def __init__(self, model: Path, adapters: list[Path]) -> None:
        from peft import PeftModel
        from transformers import LlavaForConditionalGeneration

        base = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
        self.adapters = adapters
        self.held: Any = PeftModel.from_pretrained(base, str(adapters[0]), adapter_name=name(0))
        for i, folder in enumerate(adapters[1:], 1):
            self.held.load_adapter(str(folder), adapter_name=name(i))
        self.inputs = batch(model, rows=1, length=192)[0]
        self.spare: nn.Module | None = None

    def ways(self) -> Ways:
        """What is timed. ``merge_and_unload`` consumes a model, so each has a copy that is made before."""
        from peft.utils.hotswap import hotswap_adapter

        def over(i: int) -> None:
            hotswap_adapter(self.held, str(self.adapters[i]), adapter_name=name(0))

        def gone(i: int) -> None:
            if "beside" in self.held.peft_config:
                self.held.delete_adapter("beside")
            self.spare = None

        def there_and_back(i: int) -> None:
            self.held.merge_adapter()
            self.held.unmerge_adapter()

        def acting(i: int) -> None:
            gone(i)
            self.held.set_adapter(name(i))

        def copied(i: int) -> None:
            acting(i)
            self.spare = copy.deepcopy(self.held)

        def merged(i: int) -> None:
            spare: Any = self.spare
            spare.merge_and_unload()

        return {
            "switch": lambda i: self.held.set_adapter(name(i)),
            "over one": over,
            "over one, from a folder": over,
            "before beside": gone,
            "beside": lambda i: self.held.load_adapter(str(self.adapters[i]), adapter_name="beside"),
            "before merge and unmerge": acting,
            "merge and unmerge": there_and_back,
            "before merge": copied,
            "merge": merged,
            "before nothing": gone,
        }

    @torch.no_grad()
    def said(self, i: int) -> Tensor:
        """Logits with adapter ``i``."""
        self.held.set_adapter(name(i))
        found: Tensor = self.held(**self.inputs, use_cache=False).logits
        return found
