"""Outputs of a frozen vision tower, computed once and kept on disk.

    with features(host, Store(Path("features"), 4_000_000_000)) as cache:
        ...                      # every call of host.model now looks its pictures up
    print(cache.summary())       # how often something was found

What is kept of a picture is a function of that picture alone: it is computed with no other picture beside it,
so a call gives the same bits whether it finds all, some or none of its pictures. Against a call without a cache
the last bits differ, as they do between two sizes of a batch. The key is a digest of all that the output depends
on: the pixels as the processor made them, sizes and masks, the weights in memory, configurations, the kind of
device, threads and versions. So entries never go stale, and runs and bases may share a folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tarsia.adapter import Host
from tarsia.adapter.fingerprint import stored
from tarsia.core.errors import ConfigError, TrainingError
from tarsia.core.slot import Slot
from tarsia.quant import native
from tarsia.train.exact import deterministic
from tarsia.train.stages import Call, Stage, choose
from tarsia.train.store import Store

_VERSION: Final = "1"
"""Of what a value is; another one makes all older entries unreachable."""
_TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far a picture's features alone may be from those in a batch, as a share of the largest."""
_OUTPUT: Final = "output"

Values = dict[str, Tensor]


@dataclass(slots=True)
class _Pending:
    """What the tower's call left for the projector's: the units' keys, what was found, and whether all is proved."""

    keys: list[bytes]
    found: dict[bytes, Values]
    shapes: dict[bytes, Values]
    proving: bool


class Cache:
    """The swapped-in forwards of one stage, and what they did: ``found`` and ``computed`` count units.

    ``passed`` counts calls that were not looked up, as a patch stood in the stage.
    """

    def __init__(self, model: nn.Module, stage: Stage, store: Store) -> None:
        self.stage, self.store = stage, store
        self.found = self.computed = self.passed = 0
        self.bytes = 0
        """Bytes of the features of the last unit."""
        self._modules = [model.get_submodule(path) for path in stage.modules]
        self._below = [module.forward for module in self._modules]
        # walking modules at every call takes longer than reading a picture's features
        self._inner = [inner for module in self._modules for inner in module.modules()]
        self._owner = model.get_submodule(stage.root.rpartition(".")[0])
        self._features: Callable[..., Any] = getattr(self._owner, "get_image_features", _unknown)
        self._inside = stage.above is None
        self._placed: list[Callable[..., Any]] = []
        self._off = False
        self._said: list[str] = []
        self._proved = 0
        self._pending: _Pending | None = None
        self._state: tuple[Any, ...] = ()
        self._digest = b""

    def report(self) -> dict[str, Any]:
        """What is kept, as plain values for a card."""
        total, entries = self.store.size()
        return {
            "stage": self.stage.name,
            "bytes_per_picture": self.bytes,
            "found": self.found,
            "computed": self.computed,
            "not_looked_up": self.passed,
            "damaged": self.store.damaged,
            "evicted": self.store.evicted,
            "not_written": self.store.unwritten,
            "entries": entries,
            "bytes": total,
            "limit": self.store.limit,
        }

    def summary(self) -> str:
        """The report as one line."""
        r = self.report()
        return (
            f"features: {r['found']:,} found, {r['computed']:,} computed, {r['bytes_per_picture']:,} bytes each; "
            f"{self.store.folder} holds {r['entries']:,} entries, {r['bytes']:,} of {r['limit']:,} bytes"
        )

    def news(self) -> tuple[str, ...]:
        """What has not been said yet: what is kept, once that is known, and what goes wrong with the folder."""
        kept = f"features: the {self.stage.name}'s output of each picture or tile is kept in {self.store.folder}"
        lines = [*([kept] if self.bytes else []), *self.store.told]
        fresh = [line for line in lines if line not in self._said]
        self._said += fresh
        return tuple(fresh)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Compute everything inside as without a cache."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The stage's forwards replaced inside. Raises TrainingError where something else has replaced them since."""
        with ExitStack() as stack:
            stack.enter_context(_replaced(self._modules[0], "forward", self._tower))
            if self.stage.above is not None:
                stack.enter_context(_replaced(self._modules[1], "forward", self._projector))
                # generate() asks for the parameters' names, to know what it hands on
                whole = functools.wraps(self._features)(lambda *args, **keywords: self._whole(*args, **keywords))
                stack.enter_context(_replaced(self._owner, "get_image_features", whole))
            self._placed = [module.__dict__["forward"] for module in self._modules]
            yield

    def _whole(self, *args: Any, **keywords: Any) -> Any:
        """The pass through tower and projector: only here may the tower's output be a stand-in."""
        self._inside, self._pending = True, None
        try:
            result = self._features(*args, **keywords)
        finally:
            self._inside, left, self._pending = False, self._pending, None
        if left is not None:
            raise TrainingError("The projector was not called after the tower.", do="leave features out of the recipe")
        return result

    def _tower(self, *args: Any, **keywords: Any) -> Any:
        call: Call = (args, keywords)
        if self._off or not self._inside or self._patched():
            self.passed += not self._off
            return self._below[0](*args, **keywords)
        units = self.stage.layout.split(call)
        keys = self._keys(units)
        proving = self._proved < min(2, len(set(keys)))
        found = {key: self._look_up(key) for key in dict.fromkeys(keys)}
        held = {key: values for key, values in found.items() if values is not None}
        missing = {key: unit for key, unit in zip(keys, units, strict=True) if proving or key not in held}
        fresh = {key: self._alone(unit) for key, unit in missing.items()}
        self.found += sum(key in held for key in keys)
        self.computed += sum(key not in held for key in fresh)
        if proving:
            self._prove_tower(call, [fresh[key] for key in keys])
        if self.stage.above is not None:
            self._pending = _Pending(keys, held, fresh, proving)
            return self._stand_in(call, [fresh.get(key) or held[key] for key in keys])
        self._settle(fresh, held, proving)
        device = _device(call)
        parts = [{k: v.to(device) for k, v in (fresh.get(key) or held[key]).items()} for key in keys]
        whole = {name: self.stage.layout.join(call, [part[name] for part in parts]) for name in self.stage.fields}
        return _output(whole, self.stage.states)

    def _projector(self, x: Tensor) -> Any:
        pending, self._pending = self._pending, None
        if pending is None:
            return self._below[1](x)
        if len(x) != len(pending.keys):
            raise TrainingError(
                "The projector does not see one entry for each picture of the tower.",
                given=f"{tuple(x.shape)}, {len(pending.keys)} pictures",
                do="leave features out of the recipe",
            )
        places = {key: i for i, key in enumerate(pending.keys)}
        fresh: dict[bytes, Values] = {}
        for key, shapes in pending.shapes.items():
            i = places[key]
            with _computing(x.device):
                alone = self._below[1](x[i : i + 1].detach().clone())
            sizes = {_shape(name): torch.tensor(value.shape) for name, value in shapes.items()}
            fresh[key] = {_OUTPUT: alone, **sizes}
        if pending.proving:
            apart = {_OUTPUT: torch.cat([fresh[key][_OUTPUT] for key in pending.keys])}
            self._prove(apart, lambda: {_OUTPUT: self._below[1](x)}, x.device)
        self._settle(fresh, pending.found, pending.proving)
        return torch.cat([(fresh.get(key) or pending.found[key])[_OUTPUT].to(x.device) for key in pending.keys])

    def _look_up(self, key: bytes) -> Values | None:
        values = self.store.get(key)
        names = self.stage.fields if self.stage.above is None else (_OUTPUT, *map(_shape, self.stage.fields))
        return values if values is not None and set(values) == set(names) else None

    def _alone(self, unit: Call) -> Values:
        """The tower's output for one unit, computed beside no other."""
        with _computing(_device(unit)):
            return _read(self._below[0](*unit[0], **unit[1]), self.stage.fields)

    def _stand_in(self, call: Call, parts: Sequence[Values]) -> Any:
        """An output of the tower's shape: right where it was computed, zero where the projector's output is known."""
        first = next(value for value in (*call[0], *call[1].values()) if isinstance(value, Tensor))
        whole = {}
        for name in self.stage.fields:
            rows = []
            for part in parts:
                known = part.get(name)
                zero = torch.zeros((), dtype=first.dtype, device=first.device)
                rows.append(zero.expand(part[_shape(name)].tolist()) if known is None else known)
            whole[name] = torch.cat(rows)
        return _output(whole, self.stage.states)

    def _settle(self, fresh: Mapping[bytes, Values], held: Mapping[bytes, Values], proving: bool) -> None:
        """Keep what was computed; where it was in the folder too, hold the two to each other."""
        for key, values in fresh.items():
            self.bytes = sum(value.nbytes for value in values.values())
            if key not in held:
                self.store.put(key, values)
                continue
            same = all(torch.equal(value.cpu(), held[key][name]) for name, value in values.items())
            if not same and next(iter(values.values())).device.type == "cpu":
                raise TrainingError(
                    "The folder of the features holds other bits than this machine computes.",
                    given=f"{self.store.folder}: {key.hex()[:16]}",
                    do="choose another features.path, or remove that folder",
                )
        if not fresh:
            self.bytes = next(sum(value.nbytes for value in values.values()) for values in held.values())
        if proving:
            self._proved = min(2, len(fresh))

    def _prove_tower(self, call: Call, parts: Sequence[Values]) -> None:
        whole = {name: self.stage.layout.join(call, [part[name] for part in parts]) for name in self.stage.fields}
        self._prove(whole, lambda: _read(self._below[0](*call[0], **call[1]), self.stage.fields), _device(call))

    def _prove(self, apart: Values, together: Callable[[], Values], device: torch.device) -> None:
        """Raise TrainingError unless the pictures apart give what they give together, and draw no random number."""
        before = _random(device)
        with _computing(device):
            expected = together()
        if not all(torch.equal(a, b) for a, b in zip(before, _random(device), strict=True)):
            raise TrainingError(
                "The tower draws random numbers, so its outputs can not be kept.",
                given=self.stage.root,
                do="set its dropout to 0, or leave features out of the recipe",
            )
        for name, value in expected.items():
            off = float("inf")
            if apart[name].shape == value.shape:
                off = float((apart[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
            # not a number compares as false
            if not off <= _TOLERANCE.get(value.dtype, 0.0):
                raise TrainingError(
                    "The features of a picture depend on the pictures beside it, so they can not be kept.",
                    given=f"{name}: {tuple(apart[name].shape)} and {tuple(value.shape)}, {off:.2g} of the largest off",
                    do="leave features out of the recipe",
                )

    def _patched(self) -> bool:
        """Whether a patch stands in the stage now, as an evaluation may put one in."""
        return any(isinstance(inner._modules.get("slot"), Slot) for inner in self._inner)

    def _keys(self, units: Sequence[Call]) -> list[bytes]:
        device = _device(units[0])
        setting = hashlib.sha256(self._stage_digest() + _setting(device).encode())
        keys = []
        for args, keywords in units:
            digest = setting.copy()
            for name, value in (*enumerate(args), *sorted(keywords.items())):
                _feed(digest, name, value)
            keys.append(digest.digest())
        return keys

    def _stage_digest(self) -> bytes:
        """Of the weights in memory and all that describes the stage; taken anew when a weight has been written to."""
        held = [(*inner._parameters.values(), *inner._buffers.values()) for inner in self._inner]
        plain = [part for tensors in held for t in tensors if t is not None for part in stored(t).values()]
        written = tuple((id(t), t.data_ptr(), t._version) for t in plain)
        state = (written, self._replacements())
        if state != self._state:
            self._digest, self._state = self._weigh(), state
        return self._digest

    def _replacements(self) -> tuple[Any, ...]:
        """Forwards that are not a class's own: another way to the same output has other last bits."""
        own = [inner.__dict__["forward"] for inner in self._inner if "forward" in inner.__dict__]
        return (*self._below, *(forward for forward in own if forward not in self._placed))

    def _weigh(self) -> bytes:
        digest = hashlib.sha256()
        for forward in self._replacements():
            named = forward if hasattr(forward, "__qualname__") else type(forward)
            digest.update(f"{named.__module__}.{named.__qualname__} ".encode())
        stage = self.stage
        about = [_VERSION, stage.name, stage.fields, stage.about, torch.__version__, transformers.__version__]
        digest.update(json.dumps(about, sort_keys=True, default=str).encode())
        for module in self._modules:
            kernel = getattr(getattr(module, "config", None), "_attn_implementation", None)
            digest.update(f"{type(module).__qualname__} {kernel}".encode())
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if tensor.is_meta:
                    raise ConfigError(
                        "Features can be kept only where the tower's weights are in memory.",
                        given=name,
                        do="leave features out, or do not offload the tower",
                    )
                for part, plain in stored(tensor).items():
                    # which kernel multiplies with it decides the last bits
                    _feed(digest, f"{name}{part}{_kernel() if part else ''}", plain.detach())
        return digest.digest()


@contextmanager
def features(host: Host, store: Store) -> Iterator[Cache]:
    """Look up what the frozen part of ``host``'s sight makes of each picture, instead of computing it.

    Enter after the adapters are attached: the deepest stage that nothing trained touches is taken (what the
    projector makes of the tower's output, or that output), see ``stages.choose``. The first calls prove that
    pictures apart give what they give together. Adapters that are put into the stage later switch the look-up
    off while they are there. Raises ConfigError where no stage is frozen, naming what is in the way.
    """
    cache = Cache(host.model, choose(host), store)
    with cache.swapped():
        yield cache


@contextmanager
def _replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """``function`` in place of a method of this one module. Raises TrainingError where something wraps it meanwhile."""
    # compiled models call it as it is: what it does is files and digests
    mine = torch.compiler.disable(function)
    held = module.__dict__.get(name)
    module.__dict__[name] = mine
    try:
        yield
    finally:
        if module.__dict__.get(name) is not mine:
            raise TrainingError(
                f"The cache of features can not be taken out: something else wraps {name} now.",
                given=type(module).__name__,
                do="remove that first",
            )
        if held is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = held


def _unknown(*args: Any, **keywords: Any) -> Any:
    raise NotImplementedError("this family's tower and projector are not called together")


def _shape(field: str) -> str:
    return f"shape.{field}"


def _read(output: Any, fields: Sequence[str]) -> Values:
    """The named fields of a tower's output; ``hidden_states.2`` is the third of its hidden states."""
    found = {}
    for field in fields:
        name, _, index = field.partition(".")
        value = getattr(output, name)
        found[field] = value[int(index)] if index else value
    return found


def _output(values: Mapping[str, Tensor], states: int) -> Any:
    """An output with these fields and no others: reading one that was not kept fails."""
    whole = BaseModelOutputWithPooling()
    lists: dict[str, dict[int, Tensor]] = {}
    for field, value in values.items():
        name, _, index = field.partition(".")
        if index:
            lists.setdefault(name, {})[int(index)] = value
        else:
            whole[name] = value
    for name, members in lists.items():
        length = states if name == "hidden_states" else max(members) + 1
        setattr(whole, name, [members.get(i) for i in range(length)])
    return whole


@contextmanager
def _computing(device: torch.device) -> Iterator[None]:
    """The one way in which features are computed: no gradients, deterministic kernels."""
    with torch.inference_mode(False), torch.no_grad(), deterministic(device):
        yield


def _device(call: Call) -> torch.device:
    return next(value.device for value in (*call[0], *call[1].values()) if isinstance(value, Tensor))


def _random(device: torch.device) -> list[Tensor]:
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state(device)] if device.type == "cuda" else state


def _feed(digest: Any, name: object, value: Any) -> None:
    """Add one argument: a tensor by its bytes, anything else as JSON."""
    if isinstance(value, Tensor):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return
    try:
        digest.update(f"{name} {json.dumps(value)} ".encode())
    except TypeError:
        raise TrainingError(
            "The vision tower is given something that has no digest.",
            given=f"{name}: {type(value).__name__}",
            do="leave features out of the recipe",
        ) from None


def _setting(device: torch.device) -> str:
    """What the last bits depend on besides weights and inputs."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _PROCESSOR
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return f"{device.type} {where} {threads} {cast} {torch.get_float32_matmul_precision()}"


def _kernel() -> str:
    found = native.library()
    return " reference" if found is None else f" {found.name}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:  # not Linux
        lines = [platform.machine(), platform.processor()]
    kept = ("vendor_id", "cpu family", "model", "flags")
    return " ".join([line for line in lines if line.startswith(kept)] + [torch.backends.cpu.get_cpu_capability()])


_PROCESSOR: Final = _processor()
