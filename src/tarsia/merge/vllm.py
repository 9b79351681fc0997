"""vLLM's rules for an adapter's folder, as a table: which a folder breaks, and what the server must be started with.

Read from the sources of vLLM 0.33.0, named by rule; older versions know fewer fields and break on the same ones or
worse: they take no notice of ``rank_pattern`` and ``alpha_pattern``, so that a folder whose scales differ is served
with wrong ones. What is exported here has one scale, 1, at every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tarsia.adapter.config import PeftConfig
from tarsia.adapter.reading import header, read_json
from tarsia.core.errors import AdapterError, MergeError
from tarsia.merge.served import FAMILIES, VERSION, spot_of

RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank can be (config/lora.py, MaxLoRARanks); 16 where it is not given."""

_DEFAULT_RANK: Final = 16
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_SIDES: Final = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_PLAIN_STARTS: Final = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_UNKNOWN_THERE: Final = (
    "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora", "fan_in_fan_out", "target_parameters",
    "trainable_token_indices", "megatron_config",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Folder:
    """What a rule looks at: the fields of adapter_config.json, each tensor's shape by name, the base's config.json."""

    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    base: Mapping[str, Any] | None = None

    @property
    def family(self) -> str | None:
        """The base's family, where the base is known."""
        return None if self.base is None else str(self.base.get("model_type"))

    @property
    def modules(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shapes of A and B by the name that the file has for their module; other tensors are left out."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in self.shapes.items():
            for ending, side in _SIDES.items():
                if name.endswith(ending):
                    path = name.removeprefix(_PREFIX).removesuffix(ending)
                    found.setdefault(path, {})[side] = shape
        return found

    @property
    def rank(self) -> int:
        """The highest rank that the configuration speaks of, 0 where it has none."""
        pattern = self.fields.get("rank_pattern") or {}
        ranks = [self.fields.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ())]
        return max((r for r in ranks if isinstance(r, int) and not isinstance(r, bool)), default=0)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: its ``name``, what it ``says``, where vLLM has it (``source``), and what of a folder breaks it."""

    name: str
    says: str
    source: str
    breaks: Callable[[Folder], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Broken:
    """A rule that a folder breaks, and by what."""

    rule: str
    says: str
    source: str
    given: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """The rules that a folder breaks, and the options that vLLM must be started with to serve it.

    ``unchecked`` says what could not be looked at.
    """

    broken: tuple[Broken, ...]
    options: tuple[str, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def served(self) -> bool:
        """Whether no rule is broken."""
        return not self.broken


RULES: dict[str, Rule] = {}
"""Every rule by name, in the order in which they are judged."""


def _rule(name: str, says: str, source: str) -> Callable[[Callable[[Folder], Iterator[str]]], None]:
    def register(breaks: Callable[[Folder], Iterator[str]]) -> None:
        RULES[name] = Rule(name, says, source, breaks)

    return register


@_rule("type", "only LoRA is served", "requirements of PEFTHelper: r, lora_alpha; peft_type itself is never read")
def _type(folder: Folder) -> Iterator[str]:
    kind = folder.fields.get("peft_type")
    if kind != "LORA":
        yield f"peft_type {kind!r}"


@_rule("fields", "r, lora_alpha and target_modules must be there", "lora/peft_helper.py, from_dict")
def _fields(folder: Folder) -> Iterator[str]:
    for name in ("r", "lora_alpha", "target_modules"):
        if folder.fields.get(name) in (None, "", []):
            yield f"no {name}"


@_rule("rank", "a rank is a whole number of at least 1", "lora/peft_helper.py, __post_init__")
def _rank(folder: Folder) -> Iterator[str]:
    pattern = folder.fields.get("rank_pattern") or {}
    for where, rank in {"r": folder.fields.get("r"), **(pattern if isinstance(pattern, Mapping) else {})}.items():
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            yield f"{where}: {rank!r}"


@_rule("max rank", f"a rank is at most {RANKS[-1]}", "config/lora.py, MaxLoRARanks; peft_helper.py, validate_legal")
def _max_rank(folder: Folder) -> Iterator[str]:
    if folder.rank > RANKS[-1]:
        yield f"rank {folder.rank}"


@_rule("whole modules", "no module is replaced whole", "lora/peft_helper.py, _validate_features")
def _whole(folder: Folder) -> Iterator[str]:
    names = folder.fields.get("modules_to_save")
    if names:
        yield f"modules_to_save {names}"


@_rule("dora", "no DoRA", "lora/peft_helper.py, _validate_features")
def _dora(folder: Folder) -> Iterator[str]:
    if folder.fields.get("use_dora"):
        yield "use_dora"


@_rule("bias", "no bias is changed", "lora/peft_helper.py, validate_legal and _validate_features")
def _bias(folder: Folder) -> Iterator[str]:
    if folder.fields.get("bias", "none") not in ("none", None):
        yield f"bias {folder.fields['bias']!r}"
    if folder.fields.get("lora_bias"):
        yield "lora_bias"


@_rule("start", "A and B did not start by changing the base", "lora/peft_helper.py, _init_is_supported")
def _start(folder: Folder) -> Iterator[str]:
    start = folder.fields.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        yield f"init_lora_weights {start!r}"


@_rule("variants", "no variant of LoRA", "lora/peft_helper.py, _validate_features; the last four it never reads")
def _variants(folder: Folder) -> Iterator[str]:
    for name in _UNKNOWN_THERE:
        if folder.fields.get(name):
            yield f"{name}: {folder.fields[name]!r}"


@_rule(
    "names", "every tensor is a module's lora_A.weight or lora_B.weight", "lora/utils.py, parse_fine_tuned_lora_name"
)
def _names(folder: Folder) -> Iterator[str]:
    for name in folder.shapes:
        if not (name.startswith(_PREFIX) and name.endswith(tuple(_SIDES))):
            yield name


@_rule("some", "there is at least one update", "lora/model_manager.py, _create_merged_loras_inplace: next(iter(loras))")
def _some(folder: Folder) -> Iterator[str]:
    if not folder.modules:
        yield "no update"


@_rule("shapes", "A is [rank, in] and B [out, rank], of the rank that the configuration has", "lora/layers, set_lora")
def _shapes(folder: Folder) -> Iterator[str]:
    try:
        config = PeftConfig.read({**folder.fields, "peft_type": "LORA"})
    except AdapterError as error:
        yield f"ranks can not be told: {error.what}"
        return
    for path, sides in folder.modules.items():
        a, b, rank = sides.get("A"), sides.get("B"), config.rank(path)
        if a is None or b is None:
            yield f"{path}: lora_{'A' if a else 'B'} alone"
        elif len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
            yield f"{path}: lora_A {a}, lora_B {b}, rank {rank}"


@_rule("family", "the base's class has LoRA", "model_executor/models, SupportsLoRA")
def _family(folder: Folder) -> Iterator[str]:
    if folder.family is None:
        return
    served = FAMILIES.get(folder.family)
    if served is None:
        yield f"{folder.family} is not known here"
    elif served.why:
        yield f"{folder.family}: {served.why}"


@_rule(
    "modules",
    "every update is at a layer that has LoRA there, under its name there: others are left out without a word",
    "lora/model_manager.py, _create_lora_modules; hf_to_vllm_mapper and get_mm_mapping of the base's class",
)
def _modules(folder: Folder) -> Iterator[str]:
    if folder.base is None or not getattr(FAMILIES.get(str(folder.family)), "regions", ()):
        return
    for path in folder.modules:
        if spot_of(folder.base, path) is None:
            yield path


def read(folder: Path, base: Mapping[str, Any] | None = None) -> Folder:
    """What the rules look at in an adapter's ``folder``. Raises AdapterError where its files are none."""
    table, _ = header(_tensors(folder))
    return Folder(read_json(folder / _CONFIG), {name: tuple(entry["shape"]) for name, entry in table.items()}, base)


def _tensors(folder: Path) -> Path:
    path = folder / _TENSORS
    if not path.is_file():
        raise AdapterError(
            f"{_TENSORS} is missing.", given=str(folder), do="give an adapter's folder; pickles are never read"
        )
    return path


def judge(folder: Folder) -> Judgement:
    """Hold a folder against every rule. Its modules are looked at where the base is known, and else that is said."""
    broken = [
        Broken(rule.name, rule.says, rule.source, given) for rule in RULES.values() for given in rule.breaks(folder)
    ]
    unchecked = () if folder.base is not None else ("modules: the base's config.json is not at hand",)
    return Judgement(tuple(broken), tuple(_options(folder)), unchecked)


def refuse(judgement: Judgement, where: object) -> None:
    """Raise MergeError, naming each rule, where one is broken."""
    if judgement.served:
        return
    told = [f"{b.rule}: {b.given} ({b.says})" for b in judgement.broken]
    more = f"; and {len(told) - 8} more" if len(told) > 8 else ""
    raise MergeError(
        f"vLLM {VERSION} would not serve this adapter as it is.",
        given=f"{where}: {'; '.join(told[:8])}{more}",
        do="tarsia export --to vllm, with --rank or --max-error, or fold it into the base: tarsia fold",
    )


def _options(folder: Folder) -> Iterator[str]:
    """What vLLM must be started with."""
    yield "--enable-lora"
    if folder.rank > _DEFAULT_RANK:
        yield f"--max-lora-rank {next((r for r in RANKS if r >= folder.rank), RANKS[-1])}"
    if folder.base is not None:
        spots = [spot_of(folder.base, path) for path in folder.modules]
        if any(found is not None and found.tower for found in spots):
            yield "--enable-tower-connector-lora"
