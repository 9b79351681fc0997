"""A run as a value: one YAML file, checked wholly before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from tarsia.core.errors import ConfigError
from tarsia.data.mixture import allot
from tarsia.data.sources import Source
from tarsia.train.advice import advice
from tarsia.train.guidance import KNOWN, advise
from tarsia.train.reading import parse_value, read_yaml, size

if TYPE_CHECKING:
    from tarsia.adapter import FourBits, Host
    from tarsia.train.paged import Form

RATES: Final[Mapping[str, float]] = {method: advise(method)["lr"] for method in sorted(KNOWN)}
"""Peak learning rates where a part names none: those for models of billions of parameters (``tarsia advise``)."""

_UNHASHED: Final = (
    *("out", "threads", "device", "save_every", "eval_every", "data.eval", "routing"),
    *("features.path", "features.limit"),
    *("optimiser.paged", "optimiser.budget", "optimiser.path"),
)
"""Keys that do not change what is computed but for the last bits; a resume looks at threads and device apart."""

LEAST_BUDGET: Final = 1 << 13
"""Bytes: two pages of an optimiser's states."""

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PartRecipe(BaseModel):
    """One method on one selection, with its own peak learning rate. Other keys are the method's options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    method: str
    select: str
    lr: Rate | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What belongs to the method."""
        return dict(self.model_extra or {})

    def configure(self) -> Any:
        """The method's configuration. Raises ConfigError for an unknown method or option, or a wrong type."""
        import tarsia.methods  # noqa: F401 (fills the registry; imports torch)
        from tarsia.core.method import find

        found = find(self.method)
        try:
            TypeAdapter(found.config).validate_json(json.dumps(self.options), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where, (allowed, do) = _dotted(first["loc"]), advice(first)
            raise ConfigError(
                f"The option {where!r} of the method {self.method!r} can not be used: {first['msg']}.",
                given=repr(first["input"]),
                allowed=allowed,
                do=do,
            ) from None
        return found.configure(self.options)

    def refusal(self, error: ConfigError, number: int) -> ConfigError:
        """What ``configure`` refused, with the place of this part, the one at ``number``, in its recipe."""
        key = next((key for key in self.options if self._refuses(key, error)), None)
        place = f"parts.{number}" if key is None else f"parts.{number}.{key}"
        given = f"{error.given or 'nothing else'}" if key is None else repr(self.options[key])
        return ConfigError(
            error.what,
            given=f"{place}: {given} (method {self.method})",
            allowed=error.allowed,
            do=error.do or f"change {place}" + ("" if key is None else ", or leave it out for the method's default"),
        )

    def _refuses(self, key: str, error: ConfigError) -> bool:
        """Whether this option alone is refused in the same words."""
        try:
            alone = {"method": self.method, "select": self.select, key: self.options[key]}
            PartRecipe.model_validate(alone).configure()
        except ConfigError as refused:
            return refused.what == error.what
        return False

    @property
    def rate(self) -> float:
        """The peak learning rate. Raises ConfigError where neither the part nor RATES names one."""
        if self.lr is None and self.method not in RATES:
            raise ConfigError(
                f"The method {self.method!r} has no usual learning rate.", do="give the part an lr: 1e-4, say"
            )
        return RATES[self.method] if self.lr is None else self.lr


class TrainSource(Source):
    """A source that is trained on, with its weight in any unit (see ``DataRecipe``).

    ``rows`` of each step are this source's: for the weighted mode, and then for every source with a weight.
    """

    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    rows: Positive | None = None


class FeatureRecipe(BaseModel):
    """Where to keep what a frozen vision tower makes of each picture (see ``tarsia.train.features``).

    ``path`` is a folder, which runs may share; it holds at most ``limit``: bytes, or a text such as "4GB"
    (powers of 1000) or "4GiB" (of 1024).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[str, Field(min_length=1)]
    limit: Positive | str = "4GB"

    @property
    def bytes(self) -> int:
        """``limit`` as a number. Raises ConfigError where it is none."""
        return size(self.limit, "features.limit")


class OptimiserRecipe(BaseModel):
    """AdamW's states: in 32 or 8 bits (arXiv:2110.02861), and whether they can leave the device's memory.

    With ``paged`` they leave it where a step would run out of memory, and come back; with a ``budget`` (bytes, or a
    text such as "2GB") no more of them are ever there. On a GPU they go to pinned memory of the host, on a processor
    into the folder ``path`` (the run's own ``out/pages`` where none is named). A text is words: "paged 8-bit".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[32, 8] = 32
    paged: bool = False
    budget: Positive | str | None = None
    path: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _words(cls, values: Any) -> Any:
        if not isinstance(values, str):
            return values
        known: dict[str, dict[str, Any]] = {"paged": {"paged": True}, "8-bit": {"bits": 8}, "32-bit": {"bits": 32}}
        words = values.split()
        if not words or set(words) - set(known) or {"8-bit", "32-bit"} <= set(words):
            raise ConfigError(
                "That says nothing of an optimiser's states.",
                given=f"optimiser: {values!r}",
                allowed="paged, 8-bit, 32-bit, paged 8-bit, or a table",
            )
        return {key: value for word in words for key, value in known[word].items()}

    @model_validator(mode="after")
    def _complete(self) -> Self:
        useless = [key for key in ("budget", "path") if getattr(self, key) is not None]
        if useless and not self.paged:
            raise ConfigError(
                "States that are not paged never leave the device's memory.",
                given=f"optimiser.{useless[0]} without optimiser.paged",
                do=f"set optimiser.paged: true, or leave {useless[0]} out",
            )
        _ = self.bytes
        return self

    @property
    def bytes(self) -> int | None:
        """``budget`` as a number; None where there is none. Raises ConfigError for what is no size, or too small."""
        found = None if self.budget is None else size(self.budget, "optimiser.budget")
        if found is not None and found < LEAST_BUDGET:
            raise ConfigError(
                "A budget that small holds no two pages of states.",
                given=f"optimiser.budget {found:,} bytes",
                allowed=f"{LEAST_BUDGET:,} bytes or more",
            )
        return found

    def form(self, out: Path) -> Form:
        """As the optimiser knows it, in a run whose folder is ``out``."""
        from tarsia.train.paged import Form

        return Form(self.bits, self.paged, self.bytes, out / "pages" if self.path is None else Path(self.path))


class FourBitsRecipe(BaseModel):
    """How the base is rounded to 4 bits as it is opened (see ``tarsia.adapter.FourBits``); a text is the ``kind``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["nf4", "fp4", "int4"] = "nf4"
    nested: bool = True
    select: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _kind_alone(cls, values: Any) -> Any:
        return {"kind": values} if isinstance(values, str) else values

    @property
    def form(self) -> FourBits:
        """As the adapter's side knows it. Raises SelectionError where ``select`` is none."""
        from tarsia.adapter import FourBits

        return FourBits(self.kind, self.nested, self.select)


class DataRecipe(BaseModel):
    """Rows to train on, and rows to evaluate on.

    ``mix`` sampled draws each row's source with the probability of its weight; the loss is the mean over all
    labelled tokens of a step. ``mix`` weighted has rows of every source in every step; the loss is the sum
    over the sources of weight times the mean over the source's labelled tokens. Weights are divided by their
    sum. In the weighted mode the rows of a step are shared out by weight, at least one to each source, where
    the sources do not name their ``rows``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: Annotated[tuple[TrainSource, ...], Field(min_length=1)]
    eval: tuple[Source, ...] = ()
    mix: Literal["sampled", "weighted"] = "sampled"

    @model_validator(mode="after")
    def _complete(self) -> Self:
        names = [source.title for source in self.train]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError("Two sources have one name.", given=twice[0], do="give each source a name of its own")
        if not any(source.weight for source in self.train):
            raise ConfigError("Every source has the weight 0.", do="give at least one a weight above 0")
        named = [source.title for source in self.train if source.rows]
        if named and self.mix == "sampled":
            raise ConfigError(
                "Only the weighted mode has a fixed number of rows of a source in every step.",
                given=f"rows of {', '.join(named)}",
                do="leave rows out, or set mix: weighted",
            )
        wanted = [source.title for source in self.train if source.weight]
        if named and named != wanted:
            raise ConfigError(
                "Either every source with a weight names its rows of a step, or none does.",
                given=f"rows of {', '.join(named)}; weights of {', '.join(wanted)}",
            )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Each source's share of the weights, in the recipe's order."""
        whole = sum(source.weight for source in self.train)
        return {source.title: source.weight / whole for source in self.train}

    def rows_of_step(self, rows: int) -> tuple[int, ...] | None:
        """How many of a step's ``rows`` each source gives in the weighted mode; None in the sampled mode.

        Raises ConfigError where they do not fit into the step.
        """
        if self.mix == "sampled":
            return None
        named = tuple(source.rows or 0 for source in self.train)
        if not any(named):
            return allot([source.weight for source in self.train], rows)
        if sum(named) != rows:
            raise ConfigError(
                "The sources' rows are not the rows of a step.",
                given=f"{' + '.join(map(str, named))} = {sum(named)} of batch * accumulate = {rows}",
                do="change rows, batch or accumulate",
            )
        return named


class Recipe(BaseModel):
    """Everything that decides a run. The same recipe on the same machine gives the same bits.

    ``model`` is a folder, a hub id or "mini-1". Exactly one of ``steps`` and ``epochs`` is given; an epoch is
    as many rows as all sources hold together. ``batch`` rows make a micro-batch, ``accumulate`` of them a
    step. ``batching`` grouped deals a step's rows out to its micro-batches by length, so that there is less
    padding; packed lays the rows of a micro-batch end to end, where the family allows it. Neither changes
    which rows are in a step, nor its loss and gradient but for the last bits. ``warmup`` is in steps, or a
    share of all steps where it lies below 1. ``clip`` bounds the 2-norm of the gradient. ``precision`` is the
    frozen base's: patches are float32 always. ``device`` auto is a GPU where there is one. ``checkpointing``
    recomputes activations in the backward pass. ``save_every`` and ``eval_every`` are in steps; the last step
    is always saved. ``variables`` are the chat template's own, a date say. ``resolution`` is the most pixels
    along the longer side of a picture: a larger one is shrunk before the base's processor gets it.
    ``optimiser`` is where AdamW's states are, and in how many bits. ``features`` keeps the outputs of a frozen vision
    tower on disk. ``four_bits`` rounds the base's weights to 4 bits as it is opened: it, and nothing that is trained.
    ``routing`` is how many pictures, at most, the card describes, for a server to choose by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, Field(min_length=1)]
    parts: Annotated[tuple[PartRecipe, ...], Field(min_length=1)]
    data: DataRecipe
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    batch: Positive = 8
    accumulate: Positive = 1
    batching: Literal["plain", "grouped", "packed"] = "plain"
    warmup: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.03
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    clip: Rate | None = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpointing: bool = False
    seed: NotNegative = 0
    save_every: Positive = 100
    eval_every: Positive | None = None
    max_length: Positive | None = None
    variables: Mapping[str, str] = Field(default_factory=dict)
    resolution: Positive | None = None
    threads: Positive | None = None
    features: FeatureRecipe | None = None
    four_bits: FourBitsRecipe | None = None
    optimiser: OptimiserRecipe | None = None
    routing: NotNegative = 128
    out: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(
                "A recipe gives either steps or epochs.",
                given="neither" if self.steps is None else f"steps {self.steps} and epochs {self.epochs}",
                do="for example steps: 300",
            )
        if self.warmup >= 1 and not self.warmup.is_integer():
            raise ConfigError("A warm-up is a whole number of steps, or a share below 1.", given=self.warmup)
        self.data.rows_of_step(self.batch * self.accumulate)
        self._check_batching()
        if self.features is not None:
            _ = self.features.bytes
        if self.four_bits is not None:
            _ = self.four_bits.form
        for number, part in enumerate(self.parts):
            try:
                part.configure()
                _ = part.rate
            except ConfigError as error:
                raise part.refusal(error, number) from None
        self._check_leads()
        return self

    def _check_leads(self) -> None:
        """Refuse what prompts and prefixes, which stand in every layer's cache, can not be trained with."""
        from tarsia.core.method import find
        from tarsia.core.site import Kind

        leads = [part.method for part in self.parts if Kind.SEQUENCE in find(part.method).kinds]
        if leads and self.batching == "packed":
            raise ConfigError(
                "Rows that lie end to end in one line have no place for a prompt or prefix before each.",
                given=f"batching packed, {leads[0]}",
                do="set batching: grouped, or plain",
            )
        if leads and self.checkpointing:
            raise ConfigError(
                "Where activations are checkpointed, Transformers drops the cache that a prompt or prefix stands in.",
                given=f"checkpointing true, {leads[0]}",
                do="leave checkpointing out",
            )

    def _check_batching(self) -> None:
        if self.batching == "grouped" and self.accumulate == 1:
            raise ConfigError(
                "A step of one micro-batch has nothing to group.",
                given="batching grouped, accumulate 1",
                do="raise accumulate and lower batch, or set batching: packed, or plain",
            )
        if self.batching == "packed" and self.batch == 1:
            raise ConfigError(
                "A micro-batch of one row has nothing to pack.",
                given="batching packed, batch 1",
                do="raise batch, or set batching: plain",
            )

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file and apply ``key=value`` overrides, such as ``parts.0.lr=1e-4``.

        An override of ``steps`` takes the place of the file's ``epochs``, and the reverse.
        Raises ConfigError, naming the nearest key, for anything that is not understood.
        """
        return cls.of(read_yaml(Path(path)), overrides)

    @classmethod
    def of(cls, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Build from plain values, as a YAML file holds them."""
        plain = json.loads(_plain(values))
        for override in overrides:
            _override(plain, override)
        _one_length(plain, {override.partition("=")[0].strip() for override in overrides})
        try:
            # JSON mode takes a list for a tuple and still no string for a number
            return cls.model_validate_json(json.dumps(plain), strict=True)
        except ValidationError as error:
            raise _refusal(error, cls, plain) from None

    @property
    def resolved(self) -> dict[str, Any]:
        """Every value, defaults too, as plain JSON values; methods' defaults filled in."""
        values = self.model_dump(mode="json")
        named = [{"method": part.method, "select": part.select, "lr": part.rate} for part in self.parts]
        options = [dataclasses.asdict(part.configure()) for part in self.parts]
        values["parts"] = [a | b for a, b in zip(named, options, strict=True)]
        return values

    @property
    def hash(self) -> str:
        """SHA-256 over the values that decide what is computed, whatever the order of the keys.

        Only inside a method's tables (ranks by glob, for one) the order has a meaning and counts.
        """
        values = _computed(self.resolved)
        for key in ("four_bits", "resolution"):
            if values[key] is None:
                del values[key]  # a run that began before there was this key goes on
        if self.optimiser is None or self.optimiser.bits == 32:
            del values["optimiser"]  # where states of 32 bits are changes no number
        values["parts"] = [
            {key: list(value.items()) if isinstance(value, Mapping) else value for key, value in part.items()}
            for part in values["parts"]
        ]
        return hashlib.sha256(json.dumps(_canonical(values), sort_keys=True).encode()).hexdigest()

    def open(self) -> Host:
        """The base, as the recipe says. Raises as ``tarsia.adapter.open_base`` does."""
        from tarsia.adapter import open_base

        form = None if self.four_bits is None else self.four_bits.form
        return open_base(
            self.model,
            dtype=self.precision,
            device=self.device,
            variables=self.variables,
            four_bits=form,
            resolution=self.resolution,
        )

    def steps_for(self, rows: int) -> int:
        """Optimiser steps of the whole run where the sources hold ``rows`` rows together."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * rows / (self.batch * self.accumulate)))

    def warmup_steps(self, steps: int) -> int:
        """Steps of warm-up. Raises ConfigError where they would fill the whole run."""
        warmup = int(self.warmup) if self.warmup >= 1 else round(self.warmup * steps)
        if warmup >= steps and warmup > 0:
            raise ConfigError("The warm-up is as long as the run.", given=f"{warmup} of {steps} steps", do="shorten it")
        return warmup


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, ...]:
    """``key: theirs -> ours`` for every value that differs between two resolved recipes."""
    a, b = dict(_leaves(_computed(ours))), dict(_leaves(_computed(theirs)))
    return tuple(
        f"{key}: {b.get(key, '(none)')} -> {a.get(key, '(none)')}" for key in {**b, **a} if a.get(key) != b.get(key)
    )


def _computed(resolved: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """``resolved`` without what changes nothing that is computed."""
    return {
        key: _computed(value, f"{path}{key}.") if isinstance(value, Mapping) else value
        for key, value in resolved.items()
        if f"{path}{key}" not in _UNHASHED
    }


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | list) and value:
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _canonical(value: Any) -> Any:
    """16 and 16.0 are one number."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _plain(values: Any) -> str:
    if not isinstance(values, Mapping):
        raise ConfigError("A recipe is a table of keys and values.", given=type(values).__name__)
    try:
        return json.dumps(values, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError("A recipe holds text, numbers, true, false, lists and tables.", given=str(error)) from None


def _override(values: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError("An override is written key=value.", given=repr(text), do="for example parts.0.lr=1e-4")
    place: Any = values
    for key in keys[:-1]:
        if isinstance(place, dict) and key not in place:
            place[key] = {}
        place = _enter(place, key, text)
    if isinstance(place, list):
        _enter(place, keys[-1], text)
        place[int(keys[-1])] = parse_value(value)
    elif isinstance(place, dict):
        place[keys[-1]] = parse_value(value)
    else:
        raise ConfigError("An override goes through a value that holds no others.", given=repr(text))


def _one_length(values: dict[str, Any], overridden: Set[str]) -> None:
    """A run has one length: whichever of steps and epochs was overridden alone takes the other's place."""
    for key, other in (("steps", "epochs"), ("epochs", "steps")):
        if key in overridden and other not in overridden and values.get(key) is not None:
            values.pop(other, None)


def _enter(place: Any, key: str, text: str) -> Any:
    if isinstance(place, dict):
        return place[key]
    if not isinstance(place, list):
        raise ConfigError("An override goes through a value that holds no others.", given=repr(text))
    if not re.fullmatch(r"\d+", key) or int(key) >= len(place):
        raise ConfigError(
            "An override names no entry of the list.", given=repr(text), allowed=f"0..{len(place) - 1} for {key!r}"
        )
    return place[int(key)]


def _dotted(location: Sequence[int | str]) -> str:
    return ".".join(map(str, location))


def _place(location: Sequence[int | str], values: Any) -> tuple[int | str, ...]:
    """``location`` without what pydantic adds to it: which type of several refused a value."""
    place = []
    for key in location:
        if not isinstance(values, Mapping | list):
            break
        place.append(key)
        values = (values if isinstance(values, Mapping) else dict(enumerate(values))).get(key)
    return tuple(place)


def _refusal(error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]) -> ConfigError:
    """The first thing that is wrong, with the nearest key where one is unknown or missing."""
    # a misspelt key is also a missing one: the misspelling is what helps
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    place, kind = _place(first["loc"], values), first["type"]
    where = _dotted(place)
    if kind == "extra_forbidden":
        known = sorted(_fields(model, place[:-1]))
        near = difflib.get_close_matches(str(place[-1]), known, 1, 0.3)
        do = f"did you mean {near[0]}?" if near else "remove it"
        return ConfigError(f"A recipe has no key {where!r}.", given=where, allowed=", ".join(known), do=do)
    if kind == "missing":
        return ConfigError(f"The recipe's {where!r} is missing.", do=f"add {where}")
    allowed, way = advice(first)
    if kind == "model_type":
        way = f"write its keys below it: {', '.join(_fields(model, place))}"
    what = first["msg"].removeprefix("Value error, ")
    return ConfigError(
        f"The recipe's {where!r} can not be used: {what}.", given=repr(first["input"]), allowed=allowed, do=way
    )


def _fields(model: type[BaseModel], location: Sequence[int | str]) -> Iterator[str]:
    """Names of the keys that are known at this place."""
    nested: Mapping[tuple[str, ...], type[BaseModel]] = {
        (): model,
        ("parts",): PartRecipe,
        ("data",): DataRecipe,
        ("data", "train"): TrainSource,
        ("data", "eval"): Source,
        ("features",): FeatureRecipe,
        ("four_bits",): FourBitsRecipe,
        ("optimiser",): OptimiserRecipe,
    }
    yield from nested[tuple(str(key) for key in location if isinstance(key, str))].model_fields
