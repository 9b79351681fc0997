"""Which base: digests of everything that an adapter's meaning depends on."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from tarsia.adapter.four_bits import PREFIX, FourBits
from tarsia.adapter.reading import header, read_json
from tarsia.core.errors import AdapterError, BaseMismatch, ConfigError
from tarsia.quant.tensor import Weight4

NONE = "none"
"""The digest of a thing that the base does not have."""

PLAIN = "not quantised"
"""The form, in words, of a base in 16 or 32 bits."""

_OPTIONAL = ("processor", "template", "quantisation")
_STORAGE = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "quantization_config", "architectures"}
_PROCESSOR_JSON = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_PIECE = 1 << 22
"""Bytes that are hashed at a time."""

_PROCESSOR_BYTES = ("merges.txt", "vocab.txt", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Digests of a base model, each independent of sharding and of the dtype that it is loaded in.

    ``weights``: every tensor's name, dtype, shape and bytes as they lie in the safetensors files (prefix
    "files:"), or in memory for a model that was built there (prefix "memory:"). ``architecture``: config.json
    without what says only how it was stored. ``quantisation``: its ``quantization_config``, or, in words, the
    4 bits that the base was rounded to as it was opened (``FourBits.mark``). ``processor``: the files of the
    tokenizer and the picture processor. ``template``: the chat template.
    """

    weights: str
    architecture: str
    quantisation: str
    processor: str
    template: str

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """The fingerprint of a checkpoint folder. Raises AdapterError where it has no whole safetensors files."""
        config = read_json(folder / "config.json")
        return cls(
            weights="files:" + _digest(_stored(shards(folder))),
            architecture=_architecture(config),
            quantisation=_canonical(config.get("quantization_config")),
            processor=_processor(folder),
            template=_template(folder),
        )

    @classmethod
    def of_model(cls, model: nn.Module, processor: Any = None) -> Self:
        """The fingerprint of a model in memory, without what slots have put into it."""
        config: Any = model.config
        config = config.to_dict()
        template = getattr(processor, "chat_template", None)
        return cls(
            weights="memory:" + _digest(_held(model)),
            architecture=_architecture(config),
            quantisation=_canonical(config.get("quantization_config")),
            processor=NONE if processor is None else type(processor).__name__,
            template=NONE if not template else _canonical(template),
        )

    @classmethod
    def read(cls, values: Mapping[str, str]) -> Self:
        """From the dictionary that ``dataclasses.asdict`` makes."""
        if set(values) != set(cls.__slots__) or not all(isinstance(v, str) for v in values.values()):
            raise AdapterError(
                "The fingerprint in tarsia.json is not one.", given=", ".join(values), allowed=", ".join(cls.__slots__)
            )
        return cls(**values)

    def check(
        self, other: Fingerprint, *, allow: Collection[str] = (), mine: str | None = None, theirs: str | None = None
    ) -> None:
        """Raise BaseMismatch, naming the parts, where ``other`` (the base at hand) is another base than this.

        ``allow`` may name "processor", "template" and "quantisation": a difference there is then accepted. ``mine``
        and ``theirs`` are what users call the two bases, with their forms (None: only the forms are told).
        """
        for name in allow:
            if name not in _OPTIONAL:
                raise ConfigError("This difference can not be allowed.", given=name, allowed=", ".join(_OPTIONAL))
        a, b = asdict(self), asdict(other)
        differing = [name for name in a if a[name] != b[name] and name not in allow]
        if not differing:
            return
        given = _told(theirs or f"a base {form_in_words(other.quantisation)}", b, differing)
        wanted = _told(mine or f"a base {form_in_words(self.quantisation)}", a, differing)
        if differing == ["quantisation"]:
            self._refuse_form(other, given, wanted)
        kinds = {digest.weights.partition(":")[0] for digest in (self, other)}
        do = "open the base that it was trained on"
        if all(name in _OPTIONAL for name in differing):
            do += f", or allow={tuple(differing)!r} if you know why it differs"
        if len(kinds) == 2:
            do = "a model built in memory is never taken for one from files: open both the same way"
        raise BaseMismatch(
            f"The adapter belongs to another base: not the same {' and '.join(differing)}.",
            given=given,
            allowed=wanted,
            do=do,
        )

    def _refuse_form(self, other: Fingerprint, given: str, wanted: str) -> NoReturn:
        mine, theirs = FourBits.of(self.quantisation), FourBits.of(other.quantisation)
        alike = mine is not None and mine == theirs
        raise BaseMismatch(
            "The adapter belongs to this base in another form, whose rounding it learnt to make up for.",
            given=given,
            allowed=wanted,
            do="use the version of tarsia that it was trained with: this one selects other weights"
            if alike
            else "open the base in that form, or, to judge the adapter over this one on purpose, allow `quantisation`",
        )


def form_in_words(quantisation: str, held: FourBits | None = None) -> str:
    """The form of a base with this ``quantisation`` in its fingerprint, ``held`` where its files hold it quantised."""
    form = FourBits.of(quantisation)
    if form is not None:
        return f"rounded to {form.numbers} as it is opened ({form.select or 'language; vision'})"
    if quantisation == NONE:
        return PLAIN
    return f"{held.numbers} in its files" if held is not None else "quantised in its files"


def _told(base: str, digests: Mapping[str, str], differing: Collection[str]) -> str:
    """The base in words, and the digests that say what words do not."""
    said = {name for name in differing if name == "quantisation" and digests[name].startswith((PREFIX, NONE))}
    shown = [f"{name} {digests[name][:24]}" for name in differing if name not in said]
    return base + (f" ({', '.join(shown)})" if shown else "")


def _digest(entries: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    total = hashlib.sha256()
    for name, dtype, shape, content in sorted(entries):
        total.update(json.dumps([name, dtype, shape, content]).encode())
    return total.hexdigest()


def _canonical(value: object) -> str:
    if not value:
        return NONE
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def architecture_of(folder: Path) -> str:
    """The part of a fingerprint that config.json alone tells."""
    return _architecture(read_json(folder / "config.json"))


def _architecture(config: Mapping[str, Any]) -> str:
    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): kept(v) for k, v in value.items() if k not in _STORAGE}
        return [kept(v) for v in value] if isinstance(value, list | tuple) else value

    return _canonical(kept(config))


def shards(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a base. Raises AdapterError where there are none."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return (whole,)
    if index.is_file():
        return tuple(folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values())))
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    raise AdapterError(
        "The base has no safetensors files.",
        given=f"{folder}: {', '.join(pickled) or 'no weights'}",
        allowed="model.safetensors, or model.safetensors.index.json and its shards (pickles are never read)",
        do="use a revision of the model with safetensors",
    )


def _stored(paths: Iterable[Path]) -> list[tuple[str, str, tuple[int, ...], str]]:
    entries = []
    # hashing releases the interpreter's lock, so threads read and hash several tensors at a time
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for path in paths:
            table, start = header(path)
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as bytes_:

                def content(span: tuple[int, int], bytes_: mmap.mmap = bytes_, start: int = start) -> str:
                    digest = hashlib.sha256()
                    for first in range(start + span[0], start + span[1], _PIECE):
                        with memoryview(bytes_) as view, view[first : min(first + _PIECE, start + span[1])] as part:
                            digest.update(part)
                        _forget(bytes_, first, start + span[1])
                    return digest.hexdigest()

                digests = pool.map(content, [tuple(entry["data_offsets"]) for entry in table.values()])
                for (name, entry), digest in zip(table.items(), digests, strict=True):
                    entries.append((name, str(entry["dtype"]), tuple(entry["shape"]), digest))
    return entries


def _forget(bytes_: mmap.mmap, first: int, end: int) -> None:
    """Let go of the pages of a piece: what was read once is not to count as this process's memory."""
    low, high = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, min(first + _PIECE, end) // mmap.PAGESIZE * mmap.PAGESIZE
    if high > low and hasattr(mmap, "MADV_DONTNEED"):
        bytes_.madvise(mmap.MADV_DONTNEED, low, high - low)


def _held(model: nn.Module) -> list[tuple[str, str, tuple[int, ...], str]]:
    from tarsia.core.slot import Slot

    inlaid = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Slot))
    entries = []
    for name, value in model.state_dict().items():
        if name.startswith(inlaid):
            continue
        if value.is_meta:
            raise AdapterError(
                "A model whose weights are not in memory has no fingerprint from there.",
                given=name,
                do="load the base with open_base, or take its fingerprint before it is offloaded",
            )
        for part, tensor in stored(value).items():
            raw: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            entries.append((name + part, str(value.dtype), tuple(value.shape), hashlib.sha256(raw).hexdigest()))
    return entries


def stored(value: Tensor) -> dict[str, Tensor]:
    """The plain tensors that hold a parameter, by what each is: itself, or the parts of a weight in 4 bits."""
    if not isinstance(value, Weight4):
        return {"": value}
    scheme = value.value.scheme
    return {f" {scheme.kind}{scheme.block} {key}": tensor for key, tensor in value.value.tensors.items()}


def _processor(folder: Path) -> str:
    found: list[tuple[str, str]] = []
    for name in _PROCESSOR_JSON:
        if (folder / name).is_file():
            fields = {k: v for k, v in read_json(folder / name).items() if k not in {"chat_template", *_STORAGE}}
            found.append((name, _canonical(fields)))
    for name in _PROCESSOR_BYTES:
        if (folder / name).is_file():
            found.append((name, hashlib.sha256((folder / name).read_bytes()).hexdigest()))
    return _canonical(found)


def _template(folder: Path) -> str:
    found: dict[str, Any] = {}
    for path in sorted([folder / "chat_template.jinja", *(folder / "additional_chat_templates").glob("*.jinja")]):
        if path.is_file():
            found[path.name] = path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if template:
            found[name] = template
    return _canonical(found)
