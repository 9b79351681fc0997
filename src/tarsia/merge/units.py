"""What a base's files hold of a model's parameters, and how to make the one of the other, both ways.

Transformers' own conversion mapping says it: most tensors have another name at most, some are in another form (one for
each expert, say). What the files hold is made into parameters as the loader does it, and back by the mapping's reverse.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from tarsia.adapter.origin import Place
from tarsia.adapter.reading import AGAIN, header
from tarsia.adapter.tensors import DTYPES
from tarsia.core.errors import AdapterError, MergeError, QuantError
from tarsia.quant.codec import Quantised
from tarsia.quant.state import from_tensors

_PART: Final = re.compile(r"(.+)\.(?:(?:nested_)?absmax|(?:nested_)?quant_map|quant_state\.\w+)")
"""The name of a part of a weight in 4 bits, whose own name comes first."""


@dataclass(frozen=True)
class Unit:
    """Tensors of the files and the parameters that they make together: the fewest that belong together.

    ``keys`` are names in the files; of a weight in 4 bits (``packed``) the first is its codes'. ``names`` are the
    model's. ``converter`` is Transformers', None where one tensor is one parameter: ``patterns`` are how it knows each
    key, ``shapes`` what the files have there, and ``target`` is the parameter that it is asked for.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    converter: Any = None
    patterns: tuple[str, ...] = ()
    target: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()
    packed: bool = False

    @property
    def plain(self) -> bool:
        """Whether the parameter lies in the files as the model has it."""
        return self.converter is None and not self.packed


@dataclass(frozen=True)
class Stored:
    """Every tensor of a base's files, and the units that they form."""

    model: nn.Module
    tables: Mapping[Path, Mapping[str, Mapping[str, Any]]]
    places: Mapping[str, Place]
    units: Mapping[str, Unit]
    """By the model's name of each parameter."""
    left_over: frozenset[str]
    """What the model has no place for, as its loader names it."""

    @classmethod
    def of(cls, model: nn.Module, shards: Sequence[Path]) -> Stored:
        """Read the tables of the files. Raises AdapterError where one can not be read."""
        tables, places = {}, {}
        for path in shards:
            table, start = header(path)
            tables[path] = table
            for key, entry in table.items():
                first, last = entry["data_offsets"]
                places[key] = Place(path, start + first, last - first, entry["dtype"], tuple(entry["shape"]))
        found, left_over = _units(model, places)
        return cls(model, tables, places, {name: unit for unit in found for name in unit.names}, left_over)

    def read(self, key: str) -> Tensor:
        """One tensor of the files. Raises AdapterError where they end too early."""
        place = self.places[key]
        try:
            return place.read()
        except (OSError, EOFError) as error:
            raise AdapterError(
                f"{place.path.name} can not be read.", given=f"{place.path}: {error}", do=AGAIN
            ) from None

    def parameters(self, unit: Unit) -> dict[str, Tensor]:
        """The parameters of a unit in the files' dtype, by the model's names. Raises MergeError where the mapping
        can not be undone: what is folded could not be written."""
        held = {key: self.read(key) for key in unit.keys}
        if unit.packed:
            return {unit.names[0]: value_of(unit, held).tensor}
        if unit.converter is None:
            return {unit.names[0]: held[unit.keys[0]]}
        made = _forward(unit, held, self.model)
        again = _back(unit, made, self.model)
        wrong = [key for key in unit.keys if key not in again or not _same(again[key], held[key])]
        if wrong:
            raise unfoldable(unit, f"{wrong[0]} does not come back from it")
        return made

    def quantised(self, unit: Unit) -> Quantised:
        """The weight of a packed unit, as its 4 bits."""
        return value_of(unit, {key: self.read(key) for key in unit.keys}).value

    def tensors(self, unit: Unit, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the files hold for these parameters of a unit that is not packed, by the files' names."""
        if unit.converter is None:
            return {unit.keys[0]: parameters[unit.names[0]]}
        return _back(unit, parameters, self.model)


@dataclass(frozen=True)
class Packed4:
    """A weight in 4 bits of the files, and its numbers in the dtype that it stands for."""

    value: Quantised

    @property
    def tensor(self) -> Tensor:
        from tarsia.quant.tensor import Weight4

        return Weight4(self.value).dense(torch.float32)


def value_of(unit: Unit, held: Mapping[str, Tensor]) -> Packed4:
    """A weight out of its parts. Raises QuantError, naming it, where they do not belong together."""
    try:
        return Packed4(from_tensors(unit.keys[0], held))
    except QuantError as error:
        raise error.about(unit.names[0]) from None


def unfoldable(unit: Unit, why: str) -> MergeError:
    """The refusal of parameters that the files hold in a form from which there is no way back."""
    return MergeError(
        f"{unit.names[0]} is held by the base's files in another form, and there is no way back to it: {why}.",
        given=", ".join(unit.keys[:3]),
        do="save the base anew with the installed transformers (model.save_pretrained), and fold into that",
    )


def _units(model: nn.Module, places: Mapping[str, Place]) -> tuple[list[Unit], frozenset[str]]:
    """The units of all tensors that the model has a place for, found as Transformers' loader finds them, and names of
    the others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    state, prefix = model.state_dict(), getattr(model, "base_model_prefix", None)
    parts: dict[str, list[str]] = {}
    for key in places:
        if (part := _PART.fullmatch(key)) and part[1] in places:
            parts.setdefault(part[1], []).append(key)
    beside = {key for keys in parts.values() for key in keys}
    plain: dict[str, list[str]] = {}
    made: dict[str, list[tuple[str, str]]] = {}
    left: set[str] = set()
    for key in sorted(places.keys() - beside, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name in state and pattern is None:
            plain.setdefault(name, []).append(key)
        elif name in state:
            made.setdefault(name, []).append((key, str(pattern)))
        else:
            left.add(name)
    found = [
        Unit((keys[0], *parts.get(keys[0], ())), (name,), packed=keys[0] in parts) if len(keys) == 1 else _twice(keys)
        for name, keys in plain.items()
    ]
    for target, members in made.items():
        keys, patterns = zip(*members, strict=True)
        shapes = tuple(places[key].shape for key in keys)
        unit = Unit(keys, (target,), by_pattern[patterns[0]], patterns, target, shapes)
        empty = {key: torch.empty(places[key].shape, dtype=DTYPES[places[key].dtype], device="meta") for key in keys}
        found.append(replace(unit, names=tuple(_forward(unit, empty, model))))
    return found, frozenset(left)


def _twice(keys: Sequence[str]) -> Unit:
    raise AdapterError(
        "The base's files hold one parameter under two names.", given=", ".join(keys), do="fetch the base again"
    )


def _forward(unit: Unit, held: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """What Transformers' loader makes of the files' tensors."""
    converter = copy.deepcopy(unit.converter)
    for key, pattern in zip(unit.keys, unit.patterns, strict=True):
        converter.add_tensor(unit.target, key, pattern, held[key])
    return _whole(converter.convert(unit.target, model=model, config=model.config))


def _back(unit: Unit, parameters: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The files' tensors again. Raises MergeError where the mapping has no reverse, or gives other names or shapes."""
    why = "the mapping has no reverse"
    for forced in (False, True):
        try:
            given = _reversed(unit, parameters, model, forced)
        except (ValueError, NotImplementedError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            why = f"{type(error).__name__} {error}".splitlines()[0]
            continue
        found = _matched(unit, given)
        if tuple(tuple(found[key].shape) for key in unit.keys if key in found) == unit.shapes:
            return found
        why = f"it gives {', '.join(f'{name} {tuple(t.shape)}' for name, t in list(given.items())[:2])}"
    raise unfoldable(unit, why)


def _reversed(unit: Unit, parameters: Mapping[str, Tensor], model: Any, forced: bool) -> dict[str, Tensor]:
    """What Transformers' reverse of the converter gives. One that transposes only what has not the model's shape would
    never do so on the way back, where all have: ``forced``, it does."""
    reverse = unit.converter.reverse_transform()
    for operation in reverse.operations:
        if forced and getattr(operation, "check_dims", False):
            operation.check_dims = False
    first = ""
    for name in sorted(parameters, key=_natural):
        renamed, pattern = reverse.rename_source_key(name)
        first = first or renamed
        reverse.add_tensor(renamed, name, pattern, parameters[name])
    return _whole(reverse.convert(first, model=model, config=model.config))


def _whole(converted: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def _matched(unit: Unit, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the files' names: those that Transformers gives back may have other beginnings."""
    found: dict[str, Tensor] = {}
    for key in unit.keys:
        parts = key.split(".")
        for cut in range(len(parts)):
            end = ".".join(parts[cut:])
            near = [name for name in given if name == end or name.endswith(f".{end}")]
            if len(near) == 1:
                found[key] = given[near[0]]
            if near:
                break
    return found if len(given) == len(unit.keys) else {}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _natural(key: str) -> list[tuple[int, int | str, int]]:
    """As a person sorts: 2 before 10, which is the order in which the loader goes through experts."""
    found: list[tuple[int, int | str, int]] = []
    for part in key.split("."):
        text = part.rstrip("0123456789")
        found.append((0, int(part), 0) if part.isdigit() else (1, text, int(part[len(text) :] or -1)))
    return found
