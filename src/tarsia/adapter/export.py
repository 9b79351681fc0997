"""A base written anew with its weights in 4 bits, as bitsandbytes and Transformers read them."""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tarsia.adapter.atomic import write_folder
from tarsia.adapter.fingerprint import shards
from tarsia.adapter.four_bits import FourBits, Quantisation, choose
from tarsia.adapter.host import Outline, open_outline
from tarsia.adapter.pages import give_back
from tarsia.adapter.reading import header, of_file, read_json
from tarsia.adapter.stored import stored_form, written_config
from tarsia.adapter.tensors import TensorFile
from tarsia.core.errors import AdapterError, ConfigError, QuantError
from tarsia.core.site import Kind
from tarsia.quant.rounding import lost, rounded
from tarsia.quant.state import to_tensors

_INDEX: Final = "model.safetensors.index.json"
_COPIED: Final = ("*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*.jinja")

Show = Callable[[str], None]
"""Told, before each file is read, what is done with it."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: the report of the quantisation, and ``files``: what its weights take there, in bytes.

    ``parts`` are the bytes of the quantised weights with all that is stored beside them, ``whole`` those of the
    shards, ``source`` those of the shards that they were made from.
    """

    report: Mapping[str, Any]
    parts: int
    whole: int
    source: int

    @property
    def bits(self) -> float:
        """Bits a quantised parameter in the file: tables and states too, and no header."""
        return 8 * self.parts / int(self.report["parameters"])


def quantise(name: str, out: Path | str, form: FourBits | None = None, show: Show = lambda line: None) -> Written:
    """Write the base ``name`` into the folder ``out`` with weights in 4 bits, shard by shard as it is sharded.

    One tensor at a time is in memory, and ``out`` is there whole or not at all. Transformers with bitsandbytes
    opens it (INT4, which bitsandbytes has not, only ``open_base``). Raises as ``open_base`` does, ConfigError
    where the base is quantised already, and AdapterError where ``out`` is taken or can not be written.
    """
    form = form or FourBits()
    outline = open_outline(name, processor=False, weights=True)
    folder, out = outline.path, Path(out)
    config = read_json(folder / "config.json")
    if stored_form(config, folder) is not None:
        raise ConfigError("The base is quantised already.", given=str(folder), do="give a base in 16 bits")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("Something is there already.", given=str(out), do="choose another folder, or remove it first")
    found = choose(form, outline.model, outline.sites, kinds=frozenset({Kind.WEIGHT}))
    sources = shards(folder)
    tables = {path: header(path)[0] for path in sources}
    names = _spelled(outline.model, found, [key for table in tables.values() for key in table])
    dtype = _dtype([table[key] for table in tables.values() for key in table if key in names])
    config["quantization_config"] = written_config(found.form, outline.model, found.names, dtype)
    parts: list[int] = []

    def write(fresh: Path) -> None:
        index: dict[str, str] = {}
        for number, path in enumerate(sources, 1):
            of = f" ({number} of {len(sources)})" if len(sources) > 1 else ""
            show(f"rounding the weights of {path.name} to {found.form.kind}{of}")
            with TensorFile(fresh / path.name, {"format": "pt"}) as file:
                for key, count in _shard(path, tables[path], names, found, file, index):
                    parts.append(count if key in names else 0)
        copy_beside(folder, fresh)
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if len(sources) > 1 or (folder / _INDEX).is_file():
            total = sum(_bytes(header(fresh / path.name)[0]) for path in sources)
            held = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
            (fresh / _INDEX).write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")

    write_folder(out, write, lambda there: False, what="checkpoint")
    whole = sum((out / path.name).stat().st_size for path in sources)
    return Written(found.report(outline.sites), sum(parts), whole, sum(path.stat().st_size for path in sources))


def _shard(
    path: Path,
    table: Mapping[str, Any],
    names: Mapping[str, str],
    found: Quantisation,
    file: TensorFile,
    index: dict[str, str],
) -> Iterator[tuple[str, int]]:
    """Write one shard; gives each of its keys and the bytes that were written for it."""
    with (
        _opened(path) as tensors,
        path.open("rb") as raw,
        mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as bytes_,
    ):
        start = 8 + int.from_bytes(bytes_[:8], "little")
        for key, entry in table.items():
            if key in names:
                parts = _parts(path, key, names[key], tensors.get_tensor(key), found)
                written = {part: file.add(part, tensor) for part, tensor in parts.items()}
                index |= dict.fromkeys(written, path.name)
                yield key, sum(written.values())
                continue
            first, last = entry["data_offsets"]
            size = max(1, (last - first) // max(1, _count(entry["shape"])))
            with memoryview(bytes_) as view, view[start + first : start + last] as part:
                yield key, file.add_bytes(key, entry["dtype"], entry["shape"], size, part)
            index[key] = path.name


def _parts(path: Path, key: str, name: str, weight: Tensor, found: Quantisation) -> dict[str, Tensor]:
    try:
        value = rounded(weight, found.form.scheme, done=give_back)
        found.losses[name] = lost(weight, value, give_back)
    except QuantError as error:
        raise of_file(error.about(name), path) from None
    return to_tensors(key, value)


def _spelled(model: nn.Module, found: Quantisation, keys: list[str]) -> dict[str, str]:
    """The chosen parameters by the names that the files give them.

    Raises ConfigError where the files hold one in pieces, and AdapterError where they lack one.
    """
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state, prefix = model.state_dict(), getattr(model, "base_model_prefix", None)
    names, pieces = {}, []
    for key in keys:
        renamed, converter = rename_source_key(key, renamings, converters, prefix, state)
        if renamed not in state and key in state:
            renamed, converter = rename_source_key(key, [], [], prefix, state)
        if renamed in found.names:
            names[key] = renamed
            pieces += [key] if converter is not None else []
    if pieces:
        raise ConfigError(
            "The files hold these weights otherwise than the model has them, so they can not be quantised there.",
            given=", ".join(pieces[:3]),
            do="leave them out of the selection, or save the model anew with the installed transformers",
        )
    if missing := sorted(found.names - set(names.values())):
        raise AdapterError("The base is not whole.", given=", ".join(missing[:3]), do="fetch it again")
    return names


def _dtype(entries: list[Mapping[str, Any]]) -> str:
    """What to compute in: the dtype that most of the weights to be quantised are stored in."""
    known = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    held = [str(entry["dtype"]) for entry in entries]
    return known.get(max(set(held), key=held.count), "float32")


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _bytes(table: Mapping[str, Any]) -> int:
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in table.values())


def copy_beside(folder: Path, fresh: Path) -> None:
    """Copy what lies beside a base's weights, but for config.json and the weights' index: the processor's files."""
    for pattern in _COPIED:
        for path in folder.glob(pattern):
            if path.name not in ("config.json", _INDEX):
                place = fresh / path.relative_to(folder)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, place)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise AdapterError(f"{path.name} can not be read.", given=f"{path}: {error}", do="fetch it again") from None


__all__ = ["Outline", "Written", "quantise"]
