"""What the faults are planted in: a tiny base, its adapters, and PEFT's of the same."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from families import FAMILIES
from torch import Tensor, nn

from tarsia.adapter import Adapter, Host, load, put
from tarsia.cli import progress
from tarsia.core.attach import Covered, Part, attach, detach, patches
from tarsia.methods.lora import LoRAConfig
from tarsia.train.events import Started

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = r"model\.language_model\..*\.(q_proj|v_proj)"
"""A PEFT pattern for what ``language.*.{q,v}`` selects here."""


def model(family: str = "llava", seed: int = 0, **options: Any) -> nn.Module:
    return FAMILIES[family].build(seed, **options)[0]


def host(family: str = "llava", seed: int = 0, **options: Any) -> Host:
    return Host.of(model(family, seed, **options))


@cache
def inputs(family: str = "llava", pictures: tuple[int, ...] = (1, 1)) -> dict[str, Tensor]:
    return FAMILIES[family].batch(pictures)


def logits(module: Any, batch: Mapping[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return module(**(batch or inputs())).logits


def attached(select: str, family: str = "llava", **options: Any) -> tuple[str, ...]:
    """The coverage that a run prints before step 0, a line each."""
    base = host(family)
    return lines(attach(base.model, base.sites, [Part("lora", select, LoRAConfig(**options))]))


def lines(coverage: tuple[Covered, ...]) -> tuple[str, ...]:
    """Coverage in words, a line each."""
    left = {line: f", {line.dead} more left out: no gradient can reach them" if line.dead else "" for line in coverage}
    return tuple(
        f"{line.method} on {line.component} {line.role}: {line.sites} sites, {line.trained} parameters{left[line]}"
        for line in coverage
    )


def shown(coverage: tuple[Covered, ...]) -> tuple[str, ...]:
    """What ``tarsia train`` prints of the coverage, before its first step."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        progress.coverage(Started(coverage, sum(c.trained for c in coverage), sum(c.share for c in coverage), 1, 0, {}))
    return tuple(printed.getvalue().splitlines())


def adapted(seed: int = 1, options: Mapping[str, Any] | None = None, **config: Any) -> Any:
    """A model with a PEFT adapter whose factors are random, as after a training."""
    made = peft.get_peft_model(model(**(options or {})), peft.LoraConfig(**{"target_modules": TARGETS, **config}))
    return noisy(made, seed)


def noisy(made: nn.Module, seed: int = 1, size: float = 0.2) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def written(folder: Path, **options: Any) -> tuple[Path, Tensor]:
    """The folder of a PEFT adapter, and the logits of the model that it was saved from."""
    made = adapted(**options)
    made.save_pretrained(folder / "adapter")
    return folder / "adapter", logits(made)


def there(folder: Path, base: nn.Module | None = None) -> Any:
    """PEFT's way to load an adapter."""
    return peft.PeftModel.from_pretrained(model() if base is None else base, folder).eval()


def here(folder: Path, base: Host | None = None) -> Host:
    """Tarsia's way to load an adapter."""
    opened = base or host()
    put(opened, load(folder, opened), "theirs")
    return opened


def ours(folder: Path, base: Host | None = None, **options: Any) -> Path:
    """The folder of an adapter that Tarsia saved."""
    from tarsia.adapter import save

    opened = base or host()
    part = Part("lora", "language.*.{q,v}", LoRAConfig(**options))
    attach(opened.model, opened.sites, [part], name="mine")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for patch in patches(opened.model, "mine").values():
            for parameter in patch.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    save(Adapter.of(opened, "mine", [part]), folder / "ours")
    detach(opened.model, "mine")
    return folder / "ours"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file by its dictionary."""
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def retensor(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change a safetensors file by its dictionary."""
    from safetensors.torch import load_file, save_file

    changed = change(load_file(path))
    save_file({key: value.contiguous() for key, value in changed.items()}, path, metadata={"format": "pt"})


def same(got: Tensor, wanted: Tensor, name: str) -> str:
    """Whether logits are those of ``name``, in words."""
    off = float((got - wanted).abs().max() / wanted.abs().max())
    return f"logits equal {name}" if off < 1e-5 else f"logits are not {name}"


def trained_names(made: nn.Module) -> list[str]:
    """Parameters that PEFT would train, by name."""
    return [name for name, parameter in made.named_parameters() if parameter.requires_grad]
