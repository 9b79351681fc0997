"""Adapters as folders: written whole or not at all, read wholly or refused.

adapter_config.json        PEFT's, where PEFT has a place for all of it; else peft_type TARSIA
adapter_model.safetensors  the tensors
probe.safetensors          inputs and outputs of the probe, where there is one
tarsia.json                format, parts, patches with their constants, fingerprint, card, digests and sizes of the
                           other files, and last its own seal: its SHA-256 with 64 zeros where the seal stands
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tarsia.adapter import config as peft_config
from tarsia.adapter import prompts
from tarsia.adapter.atomic import write_folder
from tarsia.adapter.config import OURS, PeftConfig
from tarsia.adapter.fingerprint import Fingerprint
from tarsia.adapter.host import Host
from tarsia.adapter.layout import Layout
from tarsia.adapter.mapped import map_tensors
from tarsia.adapter.proof import Probe
from tarsia.adapter.reading import (
    AGAIN,
    about,
    check_finite,
    header,
    parsed,
    parsed_strictly,
    read_bytes,
    read_json,
    read_tensors,
)
from tarsia.adapter.value import Adapter, Patched
from tarsia.core import seal
from tarsia.core.attach import Part
from tarsia.core.errors import AdapterError
from tarsia.core.method import find

FORMAT = 1
CONFIG, TENSORS, OURSELVES, PROBE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "tarsia.json",
    "probe.safetensors",
)
_SEAL = "seal"
_NEWER = {"bytes", _SEAL}
"""What adapters that were saved before 0.6 do not have: they are read without."""
_NAMES = frozenset(
    ("format", "tarsia", "parts", "patches", "layout", "base", "fingerprint", "card", "probe", "sha256", *_NEWER)
)
_PEFT = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""What PEFT calls the tensors of an update."""


def save(adapter: Adapter, folder: Path | str, check: Callable[[Path], None] = lambda fresh: None) -> None:
    """Write the adapter, atomically. An existing folder is replaced only where it is an adapter or empty.

    ``check`` is shown all that is written before it has its name: what it raises leaves nothing behind.
    Raises AdapterError where a tensor is not finite, the card is no JSON, or the place can not be written.
    """
    keys = _keys(adapter)
    tensors = stored(adapter)
    check_finite(tensors)
    config = _config(adapter)
    described = _described(adapter, keys)

    def write(fresh: Path) -> None:
        _write_tensors(tensors, fresh / TENSORS)
        digests = {TENSORS: _sha256(fresh / TENSORS)}
        if adapter.probe is not None:
            _write_tensors(_probe_tensors(adapter.probe), fresh / PROBE)
            digests[PROBE] = _sha256(fresh / PROBE)
        _write_text(_json(config, CONFIG), fresh / CONFIG)
        digests[CONFIG] = _sha256(fresh / CONFIG)
        sizes = {name: (fresh / name).stat().st_size for name in digests}
        _write_text(sealed(described | {"sha256": digests, "bytes": sizes}), fresh / OURSELVES)
        check(fresh)

    write_folder(Path(folder), write, is_adapter)


def load(folder: Path | str, host: Host | None = None, *, allow: Collection[str] = ()) -> Adapter:
    """Read an adapter. A folder without ``tarsia.json`` (made by PEFT) is understood only against ``host``.

    ``allow`` may name "base name": a foreign adapter that was trained on a base of another name is then read.
    Raises AdapterError for anything broken, missing, left over or not understood.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError("There is no such adapter.", given=str(folder), do="give the folder that it was saved in")
    if any(os.path.lexists(folder / name) for name in (OURSELVES, PROBE)):
        return _read(folder, read_tensors, True)
    from tarsia.adapter.foreign import read_foreign

    fields = parsed_strictly(read_bytes(folder / CONFIG), folder / CONFIG)
    tensors = read_tensors(folder / TENSORS)
    with about(folder / CONFIG, "can not be understood"):
        return read_foreign(fields, tensors, host, allow=allow)


def load_mapped(folder: Path | str, *, whole: bool = False) -> Adapter:
    """Read an adapter that Tarsia saved, its tensors as views of its file (``mapped.map_tensors``).

    With ``whole`` the caller knows that these very files were read before and are not changed since: digests,
    numbers and whether the files agree are then not looked at again. Without, all is checked as by ``load``.
    """
    return _read(Path(folder), _known if whole else _mapped, not whole)


def recorded(folder: Path | str) -> Fingerprint | None:
    """The base that an adapter says it belongs to, None where it says nothing (files that PEFT made).

    Raises AdapterError where tarsia.json is not one.
    """
    path = Path(folder) / OURSELVES
    held = read_json(path).get("fingerprint") if path.is_file() else None
    if held is not None and not isinstance(held, dict):
        raise AdapterError("tarsia.json is incomplete, or was edited.", given=f"{path}: fingerprint {held!r}", do=AGAIN)
    return None if held is None else Fingerprint.read(held)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter, ours or PEFT's."""
    return (folder / OURSELVES).is_file() or (folder / CONFIG).is_file()


def _keys(adapter: Adapter) -> dict[str, dict[str, str]]:
    """Key in the file of each tensor of each patch."""
    if adapter.layout.obstacles:
        return {p: {n: f"{p}.{patched.method}.{n}" for n in patched.tensors} for p, patched in adapter.patches.items()}
    if adapter.layout.lead:
        return {path: {prompts.KEY: prompts.KEY} for path in adapter.patches}
    keys = {}
    for path, patched in adapter.patches.items():
        if path in adapter.layout.targets:
            keys[path] = {name: f"base_model.model.{path}.{_PEFT[name]}" for name in patched.factors}
        else:
            keys[path] = {name: f"base_model.model.{adapter.layout.places[path][name]}" for name in patched.tensors}
    return keys


def stored(adapter: Adapter) -> dict[str, Tensor]:
    """All tensors by their keys in the file that ``save`` writes."""
    keys = _keys(adapter)
    return {keys[path][name]: t for path in adapter.patches for name, t in _stored(adapter, path).items()}


def _stored(adapter: Adapter, path: str) -> Mapping[str, Tensor]:
    """The tensors of one patch as the file holds them: LoRA's factors where PEFT reads it."""
    patched = adapter.patches[path]
    if adapter.layout.lead and not adapter.layout.obstacles:
        return {prompts.KEY: prompts.flat(patched)}
    return patched.factors if not adapter.layout.obstacles and path in adapter.layout.targets else patched.tensors


def _config(adapter: Adapter) -> dict[str, Any]:
    if adapter.layout.lead and not adapter.layout.obstacles:
        (patched,) = adapter.patches.values()
        return prompts.write(patched, adapter.layout.lead, adapter.base)
    if not adapter.layout.obstacles:
        return peft_config.write(adapter)
    return {"peft_type": OURS, "base_model_name_or_path": adapter.base, "why_not_peft": list(adapter.layout.obstacles)}


def _described(adapter: Adapter, keys: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    from tarsia import __version__

    probe = adapter.probe
    return {
        "format": FORMAT,
        "tarsia": __version__,
        "parts": [{"method": p.method, "select": p.select, "config": asdict(p.config)} for p in adapter.parts],
        "patches": {
            path: {"method": held.method, "constants": dict(held.constants), "tensors": dict(keys[path])}
            for path, held in adapter.patches.items()
        },
        "layout": asdict(adapter.layout),
        "base": adapter.base,
        "fingerprint": None if adapter.fingerprint is None else asdict(adapter.fingerprint),
        "card": dict(adapter.card),
        "probe": None if probe is None else {k: getattr(probe, k) for k in ("difference", "peak", "dtype")},
    }


def _mapped(path: Path) -> dict[str, Tensor]:
    header(path)
    tensors = map_tensors(path)
    with about(path):
        check_finite(tensors)
    return tensors


def _known(path: Path) -> dict[str, Tensor]:
    with about(path, "is not the file that was read before"):
        return map_tensors(path)


def _read(folder: Path, tensors_of: Callable[[Path], dict[str, Tensor]], checked: bool) -> Adapter:
    place = folder / OURSELVES
    raw = read_bytes(place)
    described = (parsed_strictly if checked else parsed)(raw, place)
    if described.get("format") != FORMAT:
        raise AdapterError(
            "tarsia.json is of another format.",
            given=f"{place}: {described.get('format')!r}",
            allowed=FORMAT,
            do="update tarsia",
        )
    with about(place):
        names = (TENSORS, PROBE) if described["probe"] is not None else (TENSORS,)
        if checked:
            _check_names(described, place)
            _check_seal(described, raw, place)
            for name in names:
                _check_digest(folder / name, described)
        held = {name: tensors_of(folder / name) for name in names}
        layout = _layout(described["layout"])
        if checked:
            _check_tensors(described["patches"], held[TENSORS], layout)
        adapter = _made(described, held, layout)
    if checked:
        fields = parsed_strictly(read_bytes(folder / CONFIG), folder / CONFIG)
        with about(folder / CONFIG):
            _check_agreement(adapter, fields)
        if CONFIG in described["sha256"]:
            _check_digest(folder / CONFIG, described)
    return adapter


def _made(described: Mapping[str, Any], held: Mapping[str, dict[str, Tensor]], layout: Layout) -> Adapter:
    if not (described["base"] is None or isinstance(described["base"], str)):
        raise AdapterError("The base is no name.", given=repr(described["base"])[:80], do=AGAIN)
    return Adapter(
        parts=tuple(_part(part) for part in described["parts"]),
        patches=MappingProxyType(_patches(described["patches"], held[TENSORS], layout)),
        layout=layout,
        base=described["base"],
        fingerprint=None if described["fingerprint"] is None else Fingerprint.read(described["fingerprint"]),
        card=MappingProxyType(dict(described["card"])),
        probe=None if described["probe"] is None else _probe(held[PROBE], described["probe"]),
    )


def _part(values: Mapping[str, Any]) -> Part:
    return Part(values["method"], values["select"], find(values["method"]).configure(values["config"]))


def _layout(values: Mapping[str, Any]) -> Layout:
    plain = {name: tuple(values[name]) for name in ("targets", "saved", "obstacles")}
    return Layout(**plain, places=values["places"], lead=tuple(values.get("lead", ())))


def _check_tensors(described: Mapping[str, Any], held: Mapping[str, Tensor], layout: Layout) -> None:
    """Hold the tensors and the layout to the patches, each of whose tensors must be there and be one that trains."""
    named = [key for patch in described.values() for key in patch["tensors"].values()]
    wanted = set(named)
    if len(wanted) < len(named):
        raise AdapterError("Two patches name one tensor.", given=Counter(named).most_common(1)[0][0], do=AGAIN)
    missing, extra = sorted(wanted - held.keys()), sorted(held.keys() - wanted)
    if missing or extra:
        raise AdapterError(
            f"{TENSORS} and tarsia.json do not agree.",
            given="; ".join(f"{n} {', '.join(k[:3])}" for n, k in (("missing", missing), ("left over", extra)) if k),
            do=AGAIN,
        )
    broken = next((key for key, value in held.items() if not value.is_floating_point()), None)
    if broken is not None:
        given = f"{broken} in {TENSORS}: {held[broken].dtype}"
        raise AdapterError("A tensor can not be one that was trained.", given=given, do=AGAIN)
    absent = sorted({*layout.targets, *layout.places} - described.keys())
    if absent:
        raise AdapterError("The layout names sites that have no patch.", given=absent[0], do=AGAIN)


def _patches(described: Mapping[str, Any], held: Mapping[str, Tensor], layout: Layout) -> dict[str, Patched]:
    # asked once for each method: an adapter has hundreds of patches, and is to be open in milliseconds
    ways = {
        name: (_of_file(name, layout), find(name).patch.words) for name in {p["method"] for p in described.values()}
    }
    patches = {}
    for path, patch in described.items():
        of_file, words = ways[patch["method"]]
        tensors = {name: held[key] for name, key in patch["tensors"].items()}
        constants = MappingProxyType(_constants(path, patch["constants"], words))
        patches[path] = Patched(patch["method"], constants, MappingProxyType(of_file(tensors) if of_file else tensors))
    return patches


def _of_file(name: str, layout: Layout) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """What makes a method's tensors of those in the file, where PEFT's form has others."""
    method = find(name)
    if layout.obstacles:
        return None
    if layout.lead:
        return lambda tensors: prompts.parted(name, tensors[prompts.KEY], layout.lead)
    kind: Any = method.patch
    if method.thin or method.measured:
        of_file: Callable[[dict[str, Tensor]], dict[str, Tensor]] = kind.from_lora if method.thin else kind.from_dora
        return of_file
    return None


def _constants(path: str, values: Mapping[str, Any], words: Collection[str]) -> dict[str, float | int | bool | str]:
    for name, value in values.items():
        if name in words:
            if not isinstance(value, str):
                raise AdapterError(f"The constant {name} at {path} is no word.", given=repr(value), do=AGAIN)
        elif not isinstance(value, float | int) or not math.isfinite(value):
            raise AdapterError(f"The constant {name} at {path} is no number.", given=repr(value), do=AGAIN)
    return dict(values)


def _check_agreement(adapter: Adapter, fields: Mapping[str, Any]) -> None:
    """Hold adapter_config.json, which other programs read, to tarsia.json."""
    if adapter.layout.obstacles:
        found: list[tuple[str, object, object]] = [("peft_type", fields.get("peft_type"), OURS)]
    elif adapter.layout.lead:
        (held,) = adapter.patches.values()
        wanted = prompts.expected(held, adapter.layout.lead)
        found = [(name, fields.get(name), value) for name, value in wanted.items()]
    else:
        config = PeftConfig.read(fields)
        found = [("modules_to_save", sorted(config.modules_to_save), sorted(adapter.layout.saved))]
        measured = any("magnitude" in adapter.patches[path].factors for path in adapter.layout.targets)
        found.append(("use_dora", config.use_dora, measured))
        for path in adapter.layout.targets:
            patched = adapter.patches[path]
            scale, given = float(patched.constants["scale"]), config.scale(path)
            found.append((f"target_modules at {path}", config.targets(path), True))
            found.append((f"the rank at {path}", config.rank(path), patched.factors["A"].shape[0]))
            found.append((f"the scale at {path}", given, given if abs(given - scale) <= 1e-12 * abs(scale) else scale))
    for what, given_, allowed in found:
        if given_ != allowed:
            raise AdapterError(
                f"{CONFIG} and tarsia.json do not agree on {what}.",
                given=given_,
                allowed=allowed,
                do="undo the change: one of the files was edited",
            )


def _probe_tensors(probe: Probe) -> dict[str, Tensor]:
    return {f"inputs.{k}": v for k, v in probe.inputs.items()} | {"tokens": probe.tokens, "logits": probe.logits}


def _probe(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Probe:
    inputs = {key.removeprefix("inputs."): value for key, value in tensors.items() if key.startswith("inputs.")}
    tokens, logits = tensors["tokens"], tensors["logits"]
    numbers = [float(values[name]) for name in ("difference", "peak")]
    plain = (tokens.dtype, logits.dtype) == (torch.int64, torch.float32) and isinstance(values["dtype"], str)
    if not (plain and tokens.shape == logits.shape and tokens.dim() == 3 and all(map(math.isfinite, numbers))):
        given = f"{PROBE}: tokens {tokens.dtype} {tuple(tokens.shape)}, logits {logits.dtype} {tuple(logits.shape)}"
        raise AdapterError("The probe is none.", given=f"{given}, {dict(values)}", do=AGAIN)
    return Probe(inputs=inputs, tokens=tokens, logits=logits, **values)


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # the writer wraps a full disk in its own exception
        raise OSError(None, str(error)) from error


def sealed(described: Mapping[str, Any]) -> str:
    """The text of tarsia.json, with its seal.

    Raises AdapterError where the card is no JSON.
    """
    return seal.sealed(_json({**described, _SEAL: seal.BLANK}, OURSELVES))


def _check_seal(described: Mapping[str, Any], raw: bytes, place: Path) -> None:
    if _SEAL in described and not seal.intact(raw, described[_SEAL]):
        raise AdapterError(
            "tarsia.json is not the file that was saved: damaged, or edited since.", given=str(place), do=AGAIN
        )


def _check_names(described: Mapping[str, Any], place: Path) -> None:
    # the version of Tarsia is for people alone
    wanted = _NAMES - {"tarsia"} - (set() if _NEWER & described.keys() else _NEWER)
    missing = sorted(wanted - described.keys())
    extra = sorted(described.keys() - _NAMES)
    if missing or extra:
        raise AdapterError(
            "tarsia.json is incomplete, was edited, or is that of a later version.",
            given=f"{place}: " + "; ".join(f"{n} {k[0][:80]}" for n, k in (("no", missing), ("unknown", extra)) if k),
            do="fetch the files again, or update tarsia",
        )


def _json(value: Mapping[str, Any], name: str) -> str:
    try:
        return json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n"
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{name} can not be written.", given=error, do="keep the card to what JSON holds") from None


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_digest(path: Path, described: Mapping[str, Any]) -> None:
    """Hold a file to its size, where there is one, and to its digest: a file that grew is not read to its end."""
    if not path.is_file():
        raise AdapterError(f"{path.name} is missing.", given=str(path.parent), do=AGAIN)
    size, digest = path.stat().st_size, described["sha256"][path.name]
    if ("bytes" in described and described["bytes"][path.name] != size) or _sha256(path) != digest:
        raise AdapterError(
            f"{path.name} is not the file that was saved: truncated, or changed since.",
            given=f"{path}, {size} bytes",
            do=AGAIN,
        )
