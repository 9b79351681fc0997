"""Adapters that PEFT made: sites from the tensors' keys, held to what the configuration says."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tarsia.adapter import prompts
from tarsia.adapter.config import DUMMY, OURS, PeftConfig
from tarsia.adapter.host import Host
from tarsia.adapter.layout import bare, layout
from tarsia.adapter.reading import AGAIN
from tarsia.adapter.spelling import Speller, respellings
from tarsia.adapter.value import Adapter, Patched
from tarsia.core.attach import Part
from tarsia.core.errors import AdapterError, BaseMismatch, ConfigError
from tarsia.core.site import Site
from tarsia.methods.dora import lengths
from tarsia.methods.full import FullConfig
from tarsia.methods.lora import LoRAConfig

_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(?:\.(?P<name>[^.]+))?\.weight")
_MAGNITUDE = re.compile(r"(?P<path>.+)\.lora_(?P<side>magnitude)_vector(?:\.(?P<name>(?!weight$)[^.]+))?(?:\.weight)?")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(?:\.(?P<name>[^.]+))?\.(?P<rest>.+)")
_TEXT_ALONE = re.compile(r"(model\.)?layers\.")  # how a text-only model spells its layers
_UNKNOWN = {
    "lora_embedding_": "LoRA on an embedding",
    "lora_B.bias": "a bias of lora_B",
    "lora_": "a variant of LoRA",
    "token_adapter": "trainable tokens",
    "prompt_embeddings": "prompts",
}


@dataclass(frozen=True)
class _Sorted:
    """A file's tensors: factors and magnitudes by module and side, and replaced parameters, as the base spells them."""

    factors: Mapping[str, Mapping[str, Tensor]]
    replaced: Mapping[str, Tensor]
    spelled: Mapping[str, str]
    """The file's name of each module or parameter to the base's."""


def read_foreign(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], host: Host | None, *, allow: Collection[str] = ()
) -> Adapter:
    """The adapter in a PEFT folder: ``fields`` of adapter_config.json and ``tensors`` by key.

    Raises AdapterError for a field that changes the mathematics and is not known, a tensor that is left
    over, missing or of another shape, or a site that configuration and tensors do not agree on.
    """
    unknown = sorted(set(allow) - {"base name"})
    if unknown:
        raise ConfigError("This difference can not be allowed.", given=unknown[0], allowed="base name")
    if fields.get("peft_type") == OURS:
        raise AdapterError("tarsia.json is missing.", do="fetch the whole folder again")
    lead = fields.get("peft_type") in prompts.TYPES.values()
    if not lead:
        PeftConfig.read(fields)  # a field that is not known is told of first
    if host is None:
        raise AdapterError(
            "An adapter that PEFT made is understood only against its base.",
            given="there is no tarsia.json beside it",
            do="open the base and pass it: load(folder, host)",
        )
    name = fields.get("base_model_name_or_path") or None
    _check_name(name, host, "base name" in allow)
    card = MappingProxyType({"base": "unverified base: only names and shapes were compared", "base_name": name})
    if lead:
        part, site, patched = prompts.read(fields, tensors, host)
        held_as = layout(host.model, [(site, part.method)])
        return Adapter((part,), MappingProxyType({site.path: patched}), held_as, name, None, card)
    return _low_rank_adapter(PeftConfig.read(fields), tensors, host, name, card)


def _low_rank_adapter(
    config: PeftConfig, tensors: Mapping[str, Tensor], host: Host, name: str | None, card: Mapping[str, Any]
) -> Adapter:
    """What LoRA's and DoRA's tensors and whole modules make together."""
    modules = bare(host.model)
    held = _sort(tensors, Speller.of(host.model, host.sites), modules)
    sites = _low_rank(held, config, host)
    replaced = _whole(held, config, host, modules)
    _check_targets(held, config, host, modules)
    update = "dora" if config.use_dora else "lora"
    patches = {
        path: Patched(
            update,
            MappingProxyType({"scale": _scale(config, held, path), "dropout": config.dropout}),
            MappingProxyType(dict(held.factors[path])),
        )
        for path in (site.path for site in sites)
    }
    patches |= {
        site.path: Patched("full", MappingProxyType({}), MappingProxyType(values)) for site, values in replaced.items()
    }
    if not patches:
        raise AdapterError("The adapter holds no tensor.", do="fetch it again")
    moved = any(bool(sides["B"].any()) for sides in held.factors.values()) or _measures(held, host)
    if not replaced and not moved:
        raise AdapterError(
            "The adapter changes nothing: every lora_B is zero.",
            given=f"{len(patches)} updates",
            do="it was saved before it was trained, or its training never reached it: train it again",
        )
    every = [(site, update) for site in sites] + [(site, "full") for site in replaced]
    return Adapter(
        parts=_parts(patches, config, held),
        patches=MappingProxyType(patches),
        layout=layout(host.model, every),
        base=name,
        fingerprint=None,
        card=card,
    )


def _check_name(name: str | None, host: Host, allowed: bool) -> None:
    if name is None or host.path is None or allowed:
        return

    def last(text: str) -> str:
        return text.rstrip("/").rpartition("/")[2].casefold()

    if last(name) not in (last(host.name), last(str(host.path))):
        raise BaseMismatch(
            "The adapter was trained on a base of another name.",
            given=host.name,
            allowed=name,
            do='open that base, or allow=("base name",) if it is the same under another name',
        )


def _sort(tensors: Mapping[str, Tensor], speller: Speller, modules: Mapping[str, nn.Module]) -> _Sorted:
    factors: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    spelled: dict[str, str] = {}
    names = set()
    for key, value in tensors.items():
        low, saved = _LORA.fullmatch(key) or _MAGNITUDE.fullmatch(key), _SAVED.fullmatch(key)
        names |= {match["name"] for match in (low, saved) if match and match["name"]}
        if low:
            path = spelled[low["path"]] = speller.find(low["path"])
            if low["side"] in factors.setdefault(path, {}):
                raise _twice(path)
            factors[path][low["side"]] = value
            continue
        for mark, what in _UNKNOWN.items():
            if mark in key:
                raise AdapterError(
                    f"The adapter holds {what}, which is not known here.", given=key, allowed="LoRA, modules_to_save"
                )
        name = f"{saved['module']}.{saved['rest']}" if saved else key
        path = spelled[name] = _short(name) if _is_buffer(_short(name), modules) else speller.find(name)
        if path in replaced:
            raise _twice(path)
        if path in modules:
            raise AdapterError("The file holds a tensor that has a module's name.", given=key, do=AGAIN)
        replaced[path] = value
    if len(names) > 1:
        raise AdapterError(
            "The file holds more than one adapter.", given=", ".join(sorted(names)), do="save each alone"
        )
    return _Sorted(factors, replaced, spelled)


def _is_buffer(name: str, modules: Mapping[str, nn.Module]) -> bool:
    owner, _, leaf = name.rpartition(".")
    return owner in modules and leaf in modules[owner]._buffers


def _twice(path: str) -> AdapterError:
    return AdapterError(
        "Two tensors of the file are one in this base.", given=path, do="the adapter belongs to another base"
    )


def _low_rank(held: _Sorted, config: PeftConfig, host: Host) -> list[Site]:
    known = {site.path: site for site in host.sites}
    names = {own: foreign for foreign, own in held.spelled.items()}
    for path, sides in held.factors.items():
        if not {"A", "B"} <= set(sides):
            raise AdapterError(f"Half of the update of {path} is missing.", given=f"lora_{next(iter(sides))} alone")
        if config.use_dora != ("magnitude" in sides):
            raise AdapterError(
                f"Configuration and tensors do not agree on whether the update of {path} is DoRA.",
                given=f"use_dora {config.use_dora}, {'a' if 'magnitude' in sides else 'no'} lora_magnitude_vector",
                do="adapter_config.json and adapter_model.safetensors do not belong together: fetch both again",
            )
        site = known.get(path)
        if site is None or len(site.shape) != 2:
            raise AdapterError("The adapter patches a module that takes no LoRA here.", given=path)
        _check_factors(site, sides["A"], sides["B"], _either(config, names[path], path, "rank"))
        if "magnitude" in sides and tuple(sides["magnitude"].shape) != site.shape[:1]:
            raise AdapterError(
                f"The magnitudes of {path} have another shape than the base.",
                given=tuple(sides["magnitude"].shape),
                allowed=site.shape[:1],
                do="open the base that it was trained on, or fetch the adapter again",
            )
        if not (config.targets(_short(names[path])) or config.targets(path)):
            raise AdapterError(
                "The file holds a tensor that the configuration does not speak of.",
                given=path,
                allowed=f"target_modules {config.target_modules!r}",
                do="adapter_config.json and adapter_model.safetensors do not belong together: fetch both again",
            )
    return [site for site in host.sites if site.path in held.factors]


def _measures(held: _Sorted, host: Host) -> bool:
    """Whether any magnitude is not the length of its row of the base."""
    for path, sides in held.factors.items():
        if "magnitude" in sides:
            weight = host.model.get_parameter(f"{path}.weight")
            a, b = (sides[side].to(weight.device, torch.float32) for side in ("A", "B"))
            own = lengths(weight, a, b, 0.0)
            if not torch.allclose(sides["magnitude"].to(own), own, rtol=1e-2):
                return True
    return False


def _check_factors(site: Site, a: Tensor, b: Tensor, rank: int) -> None:
    out, into = site.shape
    if tuple(a.shape) != (rank, into) or tuple(b.shape) != (out, rank):
        swapped = (tuple(a.shape), tuple(b.shape)) == ((out, rank), (rank, into))
        raise AdapterError(
            f"The update of {site.path} has another shape than the base and the configuration.",
            given=f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}" + ("; they are swapped" if swapped else ""),
            allowed=f"lora_A {(rank, into)}, lora_B {(out, rank)}",
            do="open the base that it was trained on, or fetch the adapter again",
        )


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _either(config: PeftConfig, foreign: str, own: str, what: str) -> Any:
    """A rank or a scale under the spelling that the patterns were written in, else under the base's own."""
    ask = getattr(config, what)
    default = getattr(PeftConfig, what)(config, "")
    found = ask(_short(foreign))
    return found if found != default else ask(own)


def _scale(config: PeftConfig, held: _Sorted, path: str) -> float:
    foreign = next(name for name, own in held.spelled.items() if own == path)
    return float(_either(config, foreign, path, "scale"))


def _whole(
    held: _Sorted, config: PeftConfig, host: Host, modules: Mapping[str, nn.Module]
) -> dict[Site, dict[str, Tensor]]:
    """The replaced parameters by site; each module that the configuration names must be there whole."""
    values = _without_copies(held.replaced, modules, _saved_modules(held, config, modules))
    wanted = {
        f"{module}.{key}"
        for module in _saved_modules(held, config, modules)
        for key, _ in _base_parameters(modules, module)
    }
    _check_sets(set(values), wanted)
    result: dict[Site, dict[str, Tensor]] = {}
    for site in host.sites:
        if site.weight in values:
            result[site] = {"weight": values.pop(site.weight)}
            if site.bias is not None:
                result[site]["bias"] = values.pop(site.bias)
    if values:
        raise AdapterError("A tensor of the adapter belongs to no site of the base.", given=", ".join(sorted(values)))
    _check_replaced(result, host)
    return result


def _saved_modules(held: _Sorted, config: PeftConfig, modules: Mapping[str, nn.Module]) -> set[str]:
    """Modules that ``modules_to_save`` names, in the base's spelling or in that of the file."""
    owners = {}
    for foreign, own in held.spelled.items():
        if own in held.replaced:
            theirs, ours = _short(foreign).split("."), own.split(".")
            for depth in range(1, min(len(theirs), len(ours))):
                owners[".".join(theirs[:-depth])] = ".".join(ours[:-depth])
    named = {name: name for name in modules if name} | {f: o for f, o in owners.items() if o in modules}
    unmatched = [m for m in config.modules_to_save if not any(name.endswith(m) for name in named)]
    if unmatched:
        raise AdapterError("modules_to_save names what the base does not have.", given=", ".join(unmatched))
    saved = {own for name, own in named.items() if config.saves(name)}
    nested = sorted(name for name in saved if any(name.startswith(f"{other}.") for other in saved))
    if nested:
        raise AdapterError(
            "modules_to_save names modules one inside the other, and PEFT does not save what it trained there.",
            given=f"{nested[0]}, by modules_to_save {list(config.modules_to_save)}",
            do="train again with longer names in modules_to_save",
        )
    return saved


def _without_copies(
    replaced: Mapping[str, Tensor], modules: Mapping[str, nn.Module], saved: set[str]
) -> dict[str, Tensor]:
    """Leave out what only repeats the base: buffers, and the embeddings that PEFT likes to save beside an update.

    Raises AdapterError where such a tensor is not the base's own.
    """
    values = dict(replaced)
    for name in replaced:
        owner, _, leaf = name.rpartition(".")
        buffer = leaf in modules[owner]._buffers
        if not buffer and any(owner == module or owner.startswith(f"{module}.") for module in saved):
            continue
        own = modules[owner]._buffers[leaf] if buffer else modules[owner]._parameters[leaf]
        value = values.pop(name)
        if own is None or own.is_meta or not torch.equal(value.to(own.dtype), own.detach().cpu()):
            raise AdapterError(
                "The file holds a tensor that is not the base's and that the configuration does not speak of.",
                given=f"{name} {tuple(value.shape)}",
                allowed=f"modules_to_save {sorted(saved)}",
                do="open the base that it was trained on; a vocabulary that was enlarged is not known here",
            )
    return values


def _base_parameters(modules: Mapping[str, nn.Module], path: str) -> list[tuple[str, nn.Parameter]]:
    found = []
    for name, module in modules.items():
        if name == path or name.startswith(f"{path}."):
            below = name.removeprefix(path).removeprefix(".")
            found += [(f"{below}.{k}" if below else k, p) for k, p in module._parameters.items() if p is not None]
    return found


def _check_sets(given: set[str], wanted: set[str]) -> None:
    extra, missing = sorted(given - wanted), sorted(wanted - given)
    if extra or missing:
        raise AdapterError(
            "Tensors and modules_to_save do not agree.",
            given="; ".join(f"{n} {', '.join(k[:3])}" for n, k in (("left over", extra), ("missing", missing)) if k),
            do="adapter_config.json and adapter_model.safetensors do not belong together: fetch both again",
        )


def _check_replaced(result: Mapping[Site, Mapping[str, Tensor]], host: Host) -> None:
    own = dict(host.model.named_parameters(remove_duplicate=False))
    for site, values in result.items():
        if site.tied:
            raise AdapterError(
                f"The adapter replaces {site.path} alone, which here is one tensor with {', '.join(site.tied)}.",
                given=f"modules_to_save with {site.path}",
                allowed="modules whose tensors are their own",
                do="train it here, where one patch acts at both, or on a base whose head is not tied",
            )
        for name, value in values.items():
            expected = own[site.weight if name == "weight" else str(site.bias)]
            if value.shape != expected.shape:
                raise AdapterError(
                    f"The replaced {name} of {site.path} has another shape than the base's.",
                    given=tuple(value.shape),
                    allowed=tuple(expected.shape),
                    do="open the base that it was trained on",
                )


def _check_targets(held: _Sorted, config: PeftConfig, host: Host, modules: Mapping[str, nn.Module]) -> None:
    """Every linear layer that the configuration targets must have its tensors."""
    if config.target_modules == DUMMY:
        return
    spelled = {foreign: own for foreign, own in held.spelled.items() if own in held.factors}
    others = respellings(spelled)
    text_alone = any(_TEXT_ALONE.match(_short(foreign)) for foreign in spelled)
    touched = {site.component for site in host.sites if site.path in held.factors}
    missing = []
    for site in host.sites:
        # an adapter of a text-only model says "q_proj" and means the language model's alone
        if (
            site.path in held.factors
            or not isinstance(modules.get(site.path), nn.Linear)
            or (text_alone and site.component not in touched)
        ):
            continue
        spellings = [site.path] + [
            f"{foreign}{site.path.removeprefix(own)}" for own, foreign in others if site.path.startswith(own)
        ]
        if any(config.targets(spelling) for spelling in spellings) and not _is_head(host, modules[site.path]):
            missing.append(site.path)
    if missing:
        raise AdapterError(
            f"The configuration targets {len(missing)} modules that have no tensor in the file.",
            given=", ".join(missing[:3]),
            do="the file is incomplete, or belongs to another base: fetch it again",
        )


def _is_head(host: Host, module: nn.Module) -> bool:
    find = getattr(host.model, "get_output_embeddings", None)
    return find is not None and find() is module


def _parts(patches: Mapping[str, Patched], config: PeftConfig, held: _Sorted) -> tuple[Part, ...]:
    low = [path for path, patched in patches.items() if patched.method != "full"]
    whole = [path for path, patched in patches.items() if patched.method == "full"]
    parts = []
    if low:
        ranks = {path: int(patches[path].tensors["A"].shape[0]) for path in low}
        alphas = {path: float(patches[path].constants["scale"]) * ranks[path] for path in low}
        odd = {path: rank for path, rank in ranks.items() if rank != config.r}
        plain = config.lora_alpha * (config.r**0.5 if config.use_rslora else 1)
        given = {path: alpha for path, alpha in alphas.items() if alpha != plain}
        made = LoRAConfig(rank=config.r, alpha=plain, dropout=config.dropout, ranks=odd, alphas=given)
        parts.append(Part("dora" if config.use_dora else "lora", _paths(low), made))
    if whole:
        parts.append(Part("full", _paths(whole), FullConfig()))
    return tuple(parts)


def _paths(paths: Sequence[str]) -> str:
    return "; ".join(f"@{path}" for path in paths)
