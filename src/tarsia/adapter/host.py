"""A base model with everything that is known of it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from tarsia.adapter.fingerprint import Fingerprint, form_in_words, shards
from tarsia.adapter.four_bits import FourBits, Quantisation, taken
from tarsia.adapter.origin import Origins, nowhere
from tarsia.adapter.reading import header, of_file, read_json
from tarsia.adapter.stored import stored_form
from tarsia.anatomy import Anatomy, anatomy_of
from tarsia.base import resolve
from tarsia.core.errors import AdapterError, AnatomyError, AttachError, ConfigError, QuantError
from tarsia.core.patch import Origin
from tarsia.core.site import Site

Precision = Literal["float32", "bfloat16", "auto"]

CONFIG = ("config.json",)
TEXTS = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
FILES = (*TEXTS, "*.safetensors")
_TWICE = ("consolidated*", "*/*.safetensors")  # the same weights in another program's form


class QuantisedAlready(ConfigError):
    """A base that is to be rounded to 4 bits, and whose files hold some already."""


@dataclass(frozen=True, eq=False)
class Host:
    """A base model, in eval mode, with its processor, anatomy, sites and fingerprint.

    ``name`` is as the user wrote it, ``path`` the folder that it was read from (None for a model that was
    built in memory). ``variables`` are what its chat template leaves open, a date say. ``quantisation`` is what
    is in 4 bits, rounded as it was opened or so in its files; None where nothing is. ``resolution`` is the most
    pixels along the longer side of a picture that it is shown (None: as many as there are).
    """

    name: str
    path: Path | None
    model: nn.Module
    processor: Any
    anatomy: Anatomy
    sites: tuple[Site, ...]
    fingerprint: Fingerprint
    variables: Mapping[str, str] = field(default_factory=dict)
    quantisation: Quantisation | None = None
    resolution: int | None = None

    @cached_property
    def origin(self) -> Origin:
        """Gives a site's weight as it was before it was rounded to 4 bits, from the files; asked, it may refuse."""
        if self.path is None:
            return nowhere("the base was built in memory")
        if self.quantisation is None:
            return nowhere("the files hold it as it is")
        if stored_form(read_json(self.path / "config.json"), self.path) is not None:
            return nowhere("the base's files hold the 4 bits alone")
        return Origins(self.path, self.model, self.sites)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text by the base's tokenizer, without what it would put around it."""
        if self.processor is None:
            raise AttachError("The base has no tokenizer here.", given=self.name, do="open it with its processor")
        return [int(id_) for id_ in self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]]

    @property
    def form(self) -> str:
        """Whether the base is quantised, to what, and where it was: in a few words."""
        held = None if self.quantisation is None else self.quantisation.form
        return form_in_words(self.fingerprint.quantisation, held)

    @classmethod
    def of(cls, model: nn.Module, *, name: str = "(in memory)", processor: Any = None) -> Self:
        """A host of a model that is in memory already; its fingerprint is taken from there."""
        anatomy = anatomy_of(model.config)
        return cls(
            name=name,
            path=None,
            model=model.eval(),
            processor=processor,
            anatomy=anatomy,
            sites=tuple(anatomy.sites(model)),
            fingerprint=Fingerprint.of_model(model, processor),
        )


def native_bf16(device: torch.device | None = None) -> bool:
    """Whether ``device`` (None: the machine's GPU, else its CPU) computes bfloat16 itself and does not emulate it.

    A GPU of compute capability 8.0 or more (or ROCm's), or a CPU with AVX512-BF16 or AMX.
    """
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:  # not Linux: nothing says so, and float32 is right everywhere
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def open_base(
    name: str,
    *,
    dtype: Precision = "float32",
    device: str = "cpu",
    processor: bool = True,
    variables: Mapping[str, str] | None = None,
    four_bits: FourBits | None = None,
    resolution: int | None = None,
) -> Host:
    """Load a base from a folder, a hub id or an embedded name such as "mini-1".

    ``dtype`` auto is bfloat16 where the device computes it, ``device`` auto a GPU where there is one.
    ``four_bits`` rounds weights to 4 bits as they are read, one after the other, from the numbers of the files:
    the 16-bit model is never in memory, and ``dtype`` is only what is computed in. A base whose files are in
    bitsandbytes' 4 bits, or were written by ``tarsia quantise``, is opened as it is, and takes no ``four_bits``.
    ``resolution`` is the host's.
    Raises ConfigError for an option or a name that makes no sense, AnatomyError for a model that is not
    understood, AdapterError for files that are broken or missing, QuantError for weights that are no numbers,
    SelectionError for a selection of ``four_bits`` that matches nothing.
    """
    place = _device(device)
    chosen = dtype_of(dtype, place)
    folder = folder_of(name)
    anatomy = anatomy_in(folder)
    fingerprint = Fingerprint.of_folder(folder)
    model, quantisation = _loaded(folder, anatomy, chosen, four_bits)
    if quantisation is not None and quantisation.asked is not None:
        fingerprint = replace(fingerprint, quantisation=quantisation.mark)
    model = model.to(place).eval()
    return Host(
        name=name,
        path=folder,
        model=model,
        processor=processor_in(folder) if processor else None,
        anatomy=anatomy,
        sites=tuple(anatomy.sites(model)),
        fingerprint=fingerprint,
        variables=dict(variables or {}),
        quantisation=quantisation,
        resolution=resolution,
    )


@dataclass(frozen=True, eq=False)
class Outline:
    """What can be known of a base without its weights.

    ``model`` is on the meta device; ``context`` is how many tokens it has positions for, None where the
    configuration does not say.
    """

    name: str
    path: Path
    model: nn.Module
    processor: Any
    anatomy: Anatomy
    sites: tuple[Site, ...]
    context: int | None


def open_outline(name: str, *, processor: bool = True, weights: bool = False) -> Outline:
    """Read a base's configuration and processor, and no weights. Raises as ``open_base`` does.

    ``weights`` sees to it that the files with the weights are in ``path`` too.
    """
    folder = folder_of(name, FILES if weights else TEXTS if processor else CONFIG)
    anatomy = anatomy_in(folder)
    model = _shapes(folder, anatomy)
    return Outline(
        name=name,
        path=folder,
        model=model,
        processor=processor_in(folder) if processor else None,
        anatomy=anatomy,
        sites=tuple(anatomy.sites(model)),
        context=getattr(anatomy.config.get_text_config(), "max_position_embeddings", None),
    )


def dtype_of(dtype: str, place: torch.device) -> torch.dtype:
    """What a precision, "auto" too, means on a device. Raises ConfigError for an unknown one."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        return torch.bfloat16 if native_bf16(place) else torch.float32
    if dtype not in known:
        raise ConfigError("Unknown precision.", given=dtype, allowed="float32, bfloat16, auto")
    return known[dtype]


def _device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            "This device is not here.", given=f"{device}: {first}", do='use "cpu", or see `tarsia doctor`'
        ) from None
    return place


def folder_of(name: str, wanted: Sequence[str] = FILES) -> Path:
    """The folder that a base lies in; of a hub id the ``wanted`` files are fetched. Raises as ``open_base`` does."""
    found = resolve(name)
    folder = Path(found).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            kind = "an adapter" if (folder / "adapter_config.json").is_file() else "no model"
            raise ConfigError(
                f"This folder is {kind}.",
                given=name,
                do="give the folder of a base model, with its config.json, or an embedded model: mini-1",
            )
        return folder
    if found.count("/") != 1 or found.startswith((".", "/", "~")):
        raise ConfigError(
            "There is no such model.",
            given=name,
            allowed="a folder with a config.json, a hub id (owner/name), or an embedded model: mini-1",
            do="check the path",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        # what is not understood is refused before its weights are fetched
        anatomy_in(Path(snapshot_download(found, allow_patterns=list(CONFIG))))
        return Path(snapshot_download(found, allow_patterns=list(wanted), ignore_patterns=list(_TWICE)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            "The model is neither a folder here nor to be had from the hub.",
            given=f"{name}: {first}",
            do="check the name and the connection, or give a folder",
        ) from None


def anatomy_in(folder: Path) -> Anatomy:
    """Of a base's folder. Raises AnatomyError for a family that is not known."""
    return anatomy_of(read_json(folder / "config.json"))


def _shapes(folder: Path, anatomy: Anatomy) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForImageTextToText.from_config(anatomy.config)
    except (ImportError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AnatomyError(
            "Transformers can not build a model of this configuration.",
            given=f"{folder}: {first}",
            do="correct its config.json, or fetch it again",
        ) from error
    return model


def _loaded(
    folder: Path, anatomy: Anatomy, dtype: torch.dtype, form: FourBits | None
) -> tuple[nn.Module, Quantisation | None]:
    """The model, and what of it was rounded to ``form`` as it was read."""
    held = stored_form(read_json(folder / "config.json"), folder)
    packed = (name for path in shards(folder) for name in header(path)[0] if ".quant_state." in name)
    if held is None and (unsaid := next(packed, None)):
        raise AdapterError(
            "The base's files hold weights in 4 bits, and its config.json does not say so.",
            given=f"{folder}: {unsaid}",
            do="fetch its config.json again: quantization_config is missing",
        )
    if form is None and held is None:
        return _model(folder, dtype), None
    not_twice(form, held, folder)
    from tarsia.adapter.quantiser import Tarsia4Config

    asked = Tarsia4Config(form or held or FourBits(), anatomy)
    options: dict[str, Any] = {"quantization_config": asked}
    if held is not None:
        config = copy.deepcopy(anatomy.config)
        config.quantization_config = asked.in_place()
        options = {"config": config}
    # Transformers would tell of a refusal as of a defect, with a traceback, before it is told here
    theirs, untold = logging.getLogger("transformers.modeling_utils"), lambda _: asked.refusal is None
    theirs.addFilter(untold)
    try:
        model = _model(folder, dtype, **options)
    except AdapterError:
        refusal = asked.refusal
        if refusal is None:
            raise
        files = shards(folder)
        place = files[0] if len(files) == 1 else folder
        raise (of_file(refusal, place) if isinstance(refusal, QuantError) else refusal) from None
    finally:
        theirs.removeFilter(untold)
    if held is not None:
        values, asked.taken = asked.taken, {}  # the model keeps `asked`: these bytes would stay when it is moved
        return model, taken(held, model, tuple(anatomy.sites(model)), values)
    found = asked.found
    if found is None or found.names != found.losses.keys():
        raise AdapterError(
            "Not all that was to be in 4 bits is.",
            given=", ".join(sorted(found.names - found.losses.keys())[:3]) if found else "nothing was selected",
            do="use a version of transformers that Tarsia is tested with",
        )
    return model, found


def not_twice(asked: FourBits | None, held: FourBits | None, folder: Path) -> None:
    """Raise QuantisedAlready where 4 bits are asked for of a base whose files hold some."""
    if asked is not None and held is not None:
        raise QuantisedAlready(
            "The base is quantised already.",
            given=f"{folder}: {held.kind}",
            do="leave four_bits out, or give a base in 16 bits",
        )


def _model(folder: Path, dtype: torch.dtype, **options: Any) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    try:
        loaded: tuple[nn.Module, dict[str, Any]] = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except ImportError as error:
        raise AdapterError(
            "The base needs a library that is not installed.",
            given=f"{folder}: {' '.join(str(error).split())[:200]}",
            do="install it with pip, in a build that fits your torch, or use a base that is not quantised",
        ) from None
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise AnatomyError(
            "Transformers does not know this as a model of pictures and text.",
            given=f"{folder}: {first}",
            do="give a vision-language model",
        ) from None
    except (OSError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise AdapterError("The base can not be loaded.", given=f"{folder}: {first}", do="fetch it again") from None
    model, report = loaded
    wrong = {
        k: sorted(map(str, v))
        for k, v in report.items()
        if v and k in ("missing_keys", "mismatched_keys", "error_msgs")
    }
    if wrong:
        raise AdapterError(
            "The base is not whole: Transformers would fill parts of it with random numbers.",
            given="; ".join(f"{k} {', '.join(v[:3])}" for k, v in wrong.items()),
            do="fetch it again, or use the version of transformers that it was saved with",
        )
    return model


def processor_in(folder: Path) -> Any:
    """A base's processor of pictures and texts. Raises AdapterError where the files do not make one."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except ImportError as error:  # most families' processors take films too, and need torchvision for them
        raise AdapterError(
            "The base's processor needs a library that is not installed.",
            given=f"{folder}: {str(error).strip().partition('.')[0]}",
            do="install it with pip, in a build that fits your torch",
        ) from None
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(
            "The base has no processor that can be loaded.",
            given=f"{folder}: {first}",
            do="fetch its processor and tokenizer files too",
        ) from None
    # without a picture processor AutoProcessor gives a bare tokenizer, which would leave the pictures out
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise AdapterError(
            "The base's processor does not take both pictures and text.",
            given=f"{folder}: {type(processor).__name__}",
            do="fetch preprocessor_config.json and the tokenizer's files too",
        )
    return processor
