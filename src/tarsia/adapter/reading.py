"""Files that may be broken, foreign or hostile: JSON and safetensors, read wholly or refused.

Nothing that a file says of itself makes memory be taken or time be spent beyond what its bytes account for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tarsia.core import tables
from tarsia.core.errors import AdapterError, QuantError, TarsiaError

AGAIN = "fetch the files again, all of one version"

JSON_BYTES: Final = 1 << 27
"""The longest JSON file that is read: the tokenizers of the largest vocabularies are a quarter of it."""


def of_file(error: QuantError, place: Path) -> QuantError:
    """The same refusal of a weight, told with the file, or the folder of files, that holds it."""
    given = str(place) if error.given is None else f"{place}: {error.given}"
    return QuantError(error.what, given=given, allowed=error.allowed, do=error.do or AGAIN)


@contextmanager
def about(path: Path, what: str = "is incomplete, or was edited") -> Iterator[None]:
    """Whatever goes wrong within is told of the file ``path``, unless it names one of its folder.

    Raises what was refused, with the file named, or AdapterError for any exception that wrong values make.
    """
    try:
        yield
    except TarsiaError as error:
        if str(path.parent) in str(error):
            raise
        given = str(path) if error.given is None else f"{path}: {error.given}"
        raise type(error)(error.what, given=given, allowed=error.allowed, do=error.do or AGAIN) from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError, re.error) as e:
        given = f"{path}: {type(e).__name__} {str(e).partition(chr(10))[0]}"
        raise AdapterError(f"{path.name} {what}.", given=given, do=AGAIN) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises AdapterError where there is none."""
    return parsed(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """All of a JSON file. Raises AdapterError where it is missing, can not be read, or is longer than any."""
    if not path.is_file():
        raise AdapterError(f"{path.name} is missing.", given=str(path.parent), do=AGAIN)
    try:
        size = path.stat().st_size
        if size > JSON_BYTES:
            raise AdapterError(
                f"{path.name} is too long.", given=f"{path}: {size} bytes", allowed=f"{JSON_BYTES} bytes", do=AGAIN
            )
        return path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path.name} can not be read.", given=f"{path}: {error}", do=AGAIN) from None


def parsed(raw: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in ``raw``, which is what ``path`` holds. Raises AdapterError where there is none."""
    return _object(raw, path)


def parsed_strictly(raw: bytes, path: Path) -> dict[str, Any]:
    """As ``parsed``; a key that stands twice and a number that is none are refused too."""
    return _object(raw, path, object_pairs_hook=tables.once, parse_constant=_no_number, parse_float=_finite)


def _object(raw: bytes, path: Path, **how: Any) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), **how)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path.name} can not be read.", given=f"{path}: {error}", do=AGAIN) from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path.name} is no JSON object.", given=str(path), do=AGAIN)
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:80]} is beyond every number")
    return number


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, all finite. Pickles are refused."""
    if not path.is_file():
        raise _missing(path)
    header(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise AdapterError(f"{path.name} can not be read.", given=f"{path}: {error}", do=AGAIN) from None
    with about(path):
        check_finite(tensors)
    return tensors


def _missing(path: Path) -> AdapterError:
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.parent.glob(pattern))
    return AdapterError(
        f"{path.name} is missing." + (" A pickle can run any program and is never read." if pickled else ""),
        given=f"{path.parent}: {', '.join(pickled) or 'no tensors'}",
        allowed="safetensors",
        do="save it again as safetensors, with PEFT, where you trust the file" if pickled else AGAIN,
    )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises AdapterError, naming the tensor, where a value is infinite or no number."""
    for key, value in tensors.items():
        if value.is_floating_point() and not _finite_all(value):
            raise AdapterError(
                "The adapter holds values that are no numbers.", given=key, do="use an earlier checkpoint"
            )


def _finite_all(value: Tensor) -> bool:
    if value.numel() == 0:
        return True
    if value.element_size() == 1:  # torch looks at no number of 8 bits
        value = value.float()
    # what is no number is both extremes; found in one pass, thirty times as fast as isfinite on bfloat16
    return bool(torch.stack(torch.aminmax(value)).isfinite().all())


def header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The table of a safetensors file, without metadata, and where its data begins, in bytes.

    Raises AdapterError where the file is no whole safetensors file: the tensors lie one after another, fill it, and
    are each as long as dtype and shape say.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if length <= min(size - 8, tables.LONGEST) else b""
    except OSError as error:
        raise AdapterError(f"{path.name} can not be read.", given=f"{path}: {error}", do="fetch it again") from None
    try:
        return tables.parse(raw, size - 8 - length), 8 + length
    except ValueError as error:
        given = f"{path}, {size} bytes: {error}"
        raise AdapterError(
            f"{path.name} is truncated or no safetensors file.", given=given, do="fetch it again"
        ) from None
