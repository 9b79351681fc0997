"""An adapter as a folder that PEFT, or vLLM, takes: a copy where it is one, else plain LoRA, what that cost stated."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor

from tarsia.adapter import files
from tarsia.adapter.atomic import write_folder
from tarsia.adapter.host import Host, Outline
from tarsia.adapter.reading import read_json, read_tensors
from tarsia.adapter.value import Adapter, Patched
from tarsia.core.errors import MergeError
from tarsia.merge import vllm
from tarsia.merge.delta import Grounds
from tarsia.merge.served import FAMILIES, VERSION, Served, spot
from tarsia.merge.thin import Thinned, check_places, thin

BESIDE: Final = "export.json"
"""What is written beside an adapter for vLLM: what it was made of, the errors, the server's options."""

_COPIED: Final = (files.CONFIG, files.TENSORS, files.OURSELVES, files.PROBE, "README.md")

Check = Callable[[Path, float], None]
"""Proves a folder that was written, with the error of its weights, before it has its name."""


@dataclass(frozen=True, eq=False)
class Exported:
    """What was written: the ``adapter`` that the folder holds, how it was made (None: a copy), vLLM's options."""

    folder: Path
    adapter: Adapter
    thinned: Thinned | None
    options: tuple[str, ...] = ()


def to_peft(
    folder: Path,
    adapter: Adapter,
    base: Host | Outline | Grounds,
    out: Path,
    *,
    rank: int | None = None,
    most: float | None = None,
    check: Check = lambda fresh, error: None,
) -> Exported:
    """Write the adapter in ``folder`` (which ``adapter`` was read from) into ``out`` as PEFT opens it.

    What PEFT can express is one already, and is copied. Anything else becomes plain LoRA (``thin``, with its refusals).
    ``check`` is shown the folder and its error before it has its name: what it raises leaves nothing behind.
    Raises AdapterError where ``out`` is there or can not be written.
    """
    if not adapter.layout.obstacles:

        def copy(fresh: Path) -> None:
            _copy(folder, fresh)
            check(fresh, 0.0)

        write_folder(out, copy, lambda there: False)
        return Exported(out, adapter, None)
    thinned = thin(adapter, base, rank=rank, most=most)
    made = replace(thinned.adapter, card=_card(adapter, thinned))
    _check_free(out)
    files.save(made, out, lambda fresh: check(fresh, thinned.error))
    return Exported(out, made, replace(thinned, adapter=made))


def to_vllm(
    adapter: Adapter,
    base: Host | Outline,
    out: Path,
    *,
    rank: int | None = None,
    most: float | None = None,
    check: Check = lambda fresh, error: None,
) -> Exported:
    """Write the adapter into ``out`` as vLLM serves it: plain LoRA of one scale, under vLLM's own names.

    Held to every rule of ``vllm.RULES``, and to ``check`` as by ``to_peft``, before it is there.
    Raises MergeError for a family, a layer or a change that vLLM has no LoRA for, and as ``thin`` does; AdapterError
    where ``out`` is there or can not be written.
    """
    if base.path is None:
        raise MergeError("The base has no folder, so vLLM can not be told of it.", given=base.name)
    config = read_json(base.path / "config.json")
    grounds = Grounds.of(base, adapter.fingerprint)
    _check_family(config, adapter, grounds)
    thinned = thin(adapter, grounds, rank=rank, most=most)
    made = one_scale(thinned.adapter)
    spots = {path: spot(config, path) for path in made.patches}
    tensors = {
        f"base_model.model.{found.written}.lora_{side}.weight": patched.tensors[side].contiguous()
        for path, patched in made.patches.items()
        if (found := spots[path]) is not None
        for side in ("A", "B")
    }
    fields = _fields(made, {path: found.written for path, found in spots.items() if found is not None})
    judged = vllm.Judgement((), ())

    def write(fresh: Path) -> None:
        nonlocal judged
        safetensors.torch.save_file(tensors, fresh / files.TENSORS, metadata={"format": "pt"})
        (fresh / files.CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        judged = vllm.judge(vllm.read(fresh, config))
        vllm.refuse(judged, adapter.base)
        _check_whole(tensors, read_tensors(fresh / files.TENSORS))
        told = {**_card(adapter, thinned)["export"], "vllm": VERSION, "options": list(judged.options)}
        (fresh / BESIDE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        check(fresh, thinned.error)

    write_folder(out, write, lambda there: False)
    return Exported(out, made, replace(thinned, adapter=made), judged.options)


def one_scale(adapter: Adapter) -> Adapter:
    """The same LoRA adapter with one scale at every site: 1, where they differ, and the rest of each in its B.

    vLLM before ``alpha_pattern`` was read there takes one scale for all.
    """
    scales = {float(patched.constants["scale"]) for patched in adapter.patches.values()}
    if len(scales) == 1:
        return adapter
    patches = {}
    for path, patched in adapter.patches.items():
        b = patched.tensors["B"]
        wide = (b.double() * float(patched.constants["scale"])).to(torch.promote_types(b.dtype, torch.float32))
        constants = {**patched.constants, "scale": 1.0}
        held = {"A": patched.tensors["A"], "B": wide}
        patches[path] = Patched(patched.method, MappingProxyType(constants), MappingProxyType(held))
    return replace(adapter, patches=MappingProxyType(patches), probe=None)


def _check_family(config: Mapping[str, Any], adapter: Adapter, grounds: Grounds) -> None:
    """Raise MergeError where vLLM has no LoRA for the base, or for some of the adapter's sites."""
    family = str(config.get("model_type"))
    served = FAMILIES.get(family, Served(why="it is not among the families that are known here"))
    if served.why:
        raise MergeError(
            f"vLLM {VERSION} serves no LoRA on {family}: {served.why}.",
            allowed=", ".join(sorted(name for name, entry in FAMILIES.items() if entry.regions)),
            do="fold the adapter into the base and serve that: tarsia export --to transformers",
        )
    check_places(adapter, grounds)
    without = [path for path in adapter.patches if spot(config, path) is None]
    if without:
        more = f"; and {len(without) - 6} more" if len(without) > 6 else ""
        raise MergeError(
            f"vLLM {VERSION} has no LoRA for some of the sites that this adapter patches, and would leave them out.",
            given=f"{family}: {'; '.join(without[:6])}{more}",
            do="fold the adapter into the base and serve that: tarsia export --to transformers",
        )


def _fields(adapter: Adapter, written: Mapping[str, str]) -> dict[str, Any]:
    """adapter_config.json with alpha / r the one scale, whatever a reader makes of the patterns."""
    ranks = {written[path]: int(patched.tensors["A"].shape[0]) for path, patched in adapter.patches.items()}
    scale = float(next(iter(adapter.patches.values())).constants["scale"])
    rank = Counter(ranks.values()).most_common(1)[0][0]
    odd = {name: value for name, value in ranks.items() if value != rank}
    return {
        "alpha_pattern": {re.escape(name): _plain(scale * value) for name, value in odd.items()},
        "base_model_name_or_path": adapter.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(scale * rank),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {re.escape(name): value for name, value in odd.items()},
        "target_modules": sorted(ranks),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _card(adapter: Adapter, thinned: Thinned) -> dict[str, Any]:
    """The adapter's card, and in it what became of each site."""
    methods = Counter(patched.method for patched in adapter.patches.values())
    told = {
        "of": dict(methods),
        "base": adapter.base,
        "error": thinned.error,
        "errors": dict(thinned.errors),
        "ranks": dict(thinned.ranks),
        "exact": len(thinned.exact),
        "left_out": list(thinned.still),
    }
    return {**adapter.card, "export": told}


def _copy(folder: Path, fresh: Path) -> None:
    for name in _COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, fresh / name)


def _check_free(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise MergeError("Something is there already.", given=str(out), do="choose another folder, or remove it first")


def _check_whole(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise MergeError where the file does not hold what was to be written."""
    wrong = [key for key in wanted if key not in found or not torch.equal(wanted[key], found[key])]
    if wrong or len(found) != len(wanted):
        raise MergeError("What was written is not what was to be written.", given=", ".join(wrong[:3]), do="try again")
