"""The table of a safetensors file, held to the file: every tensor has its place, and the places fill it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

LONGEST: Final = 100_000_000
"""The most bytes that a table may have, as the format's own library has it."""

BITS: Final[Mapping[str, int]] = {
    name: bits
    for bits, names in (
        (64, ("C64", "F64", "I64", "U64")),
        (32, ("F32", "I32", "U32")),
        (16, ("F16", "BF16", "I16", "U16")),
        (8, ("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")),
        (6, ("F6_E2M3", "F6_E3M2")),
        (4, ("F4",)),
    )
    for name in names
}
"""Of one element, by the names that safetensors 0.8 has for dtypes."""

_MOST, _DIMENSIONS = 1 << 62, 64
"""More elements than any tensor has, and as many dimensions as torch takes."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of these pairs. Raises ValueError where a key stands there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:80]!r} stands there twice")
    return found


def parse(raw: bytes, size: int) -> dict[str, dict[str, Any]]:
    """Tensors by name from the bytes of a table, after which the file has ``size`` more; without the metadata.

    Raises ValueError, which says why, where this is no table, or not that of such a file.
    """
    if not raw:
        raise ValueError("no table fits into the file")
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(table, dict):
        raise ValueError("the table is no JSON object")
    table.pop("__metadata__", None)
    why = _fault(table, size)
    if why:
        raise ValueError(why)
    return table


def _fault(table: Mapping[str, Any], size: int) -> str:
    """What is wrong with the places of tensors that are to fill ``size`` bytes; empty where nothing is."""
    spans = []
    for name, entry in table.items():
        why = _odd(entry)
        if why:
            return f"{name[:80]}: {why}"
        spans.append((*entry["data_offsets"], name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            return f"{name[:80]} does not lie where the tensor before it ends"
        end = last
    return "" if end == size else f"the tensors take {end} bytes, and there are {size}"


def _odd(entry: Any) -> str:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "no dtype, shape and place"
    shape, place = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or not _counts(shape) or not _counts(place) or len(place) != 2:
        return "a dtype, shape or place of no sense"
    if math.prod(max(length, 1) for length in shape) >= _MOST or place[0] > place[1]:
        return "a shape or place of no sense"
    # a dtype of later files is left to who reads the tensor
    bits = BITS.get(entry["dtype"])
    if bits is not None and (math.prod(shape) * bits + 7) // 8 != place[1] - place[0]:
        return f"{entry['dtype']} {shape} does not take {place[1] - place[0]} bytes"
    return ""


def _counts(values: Any) -> bool:
    if not isinstance(values, list) or len(values) > _DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value < _MOST for value in values)
