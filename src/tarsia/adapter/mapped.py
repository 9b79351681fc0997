"""Tensors as views of a file: nothing is copied, a page is read when somebody looks at it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tarsia.adapter.reading import AGAIN
from tarsia.adapter.tensors import DTYPES
from tarsia.core.errors import AdapterError


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file that ``reading.header`` has found to be whole.

    They are views of one mapping, which lives as long as the last of them. It is private: what is written to a tensor
    is its process's alone and never gets into the file. The file must not be cut while they live (Linux ends a process
    that looks behind the end of a file); to delete it, or to put another in its place, does no harm.

    Raises AdapterError where the file can not be mapped, or holds a dtype that torch has not.
    """
    try:
        whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError) as error:
        given = f"{path}: {str(error).partition(chr(10))[0]}"
        raise AdapterError(f"{path.name} can not be mapped.", given=given, do=AGAIN) from None
    start = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    table = json.loads(whole[8:start].tobytes())
    table.pop("__metadata__", None)
    found, sizes = {}, {dtype: dtype.itemsize for dtype in DTYPES.values()}
    for name, entry in table.items():
        dtype, shape, (first, last) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if dtype is None:
            given, allowed = f"{path}: {name} {entry['dtype']}", ", ".join(DTYPES)
            raise AdapterError(f"{path.name} holds a dtype that is not known here.", given=given, allowed=allowed)
        size = sizes[dtype]
        if first == last:
            found[name] = torch.empty(shape, dtype=dtype)
        elif (start + first) % size:
            # elements across the borders of their size: a copy, laid out as torch wants it
            found[name] = torch.frombuffer(whole[start + first : start + last].copy(), dtype=dtype).view(shape)
        else:
            # each a storage of its own, which is as long as it needs; to resize in place is faster than to view
            flat = torch.frombuffer(whole, dtype=dtype, count=(last - first) // size, offset=start + first)
            found[name] = flat.resize_(shape)
    return found
