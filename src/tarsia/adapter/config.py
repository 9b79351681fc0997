"""``adapter_config.json`` as peft 0.21.2 reads it: which modules, of what rank, at what scale."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

from tarsia.adapter.patterns import fault
from tarsia.core.errors import AdapterError

if TYPE_CHECKING:
    from tarsia.adapter.value import Adapter

DUMMY = "dummy-target-modules"
"""What PEFT takes for "no module has a LoRA update" (peft/utils/constants.py)."""

OURS = "TARSIA"
"""The ``peft_type`` of an adapter that PEFT has no place for; PEFT refuses it by name."""

# Without effect on what a trained adapter computes.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
_READ = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}
# Where patterns stand in the expressions that PEFT makes of them.
_SAVES, _LAYERS, _OWN = r"(^|.*\.)%s($|\..*)", r"(?:^|.*?\.)%s\.(?P<index>\d+)\.", r"(.*\.)?(%s)$"
_ANY_LAYER = r".*?\.[^.]*\.(?P<index>\d+)\."
_FRAMES = {"rank_pattern": _OWN, "alpha_pattern": _OWN, "modules_to_save": _SAVES, "layers_pattern": _LAYERS}
_MANY = 1 << 13
"""Names in a list, and patterns in a table, of a configuration: each is held to each module."""
# Initialisations that leave the base's weights as they are.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The fields of a LoRA ``adapter_config.json`` that decide what is computed."""

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | str
    modules_to_save: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    use_rslora: bool
    use_dora: bool
    dropout: float

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        """Raises AdapterError, naming the field, for anything that would change the mathematics unheard."""
        if fields.get("peft_type") != "LORA":
            raise AdapterError(
                "This kind of adapter can not be read.",
                given=f"peft_type {fields.get('peft_type')!r}",
                allowed="LORA, PROMPT_TUNING, PREFIX_TUNING",
            )
        for key, value in fields.items():
            if key not in _IGNORED | _READ and value not in (None, False, "", [], {}):
                raise AdapterError(
                    f"The adapter uses {key}, which changes what it computes and is not known here.",
                    given=f"{key}: {value!r}",
                    allowed=f"no {key}",
                    do="let PEFT fold it into the base, or train without it",
                )
        _refuse(fields, "bias", fields.get("bias", "none") in ("none", None), '"none"')
        _refuse(fields, "fan_in_fan_out", not fields.get("fan_in_fan_out"), "false: no weight here is transposed")
        init = fields.get("init_lora_weights", True)
        _refuse(fields, "init_lora_weights", init in _PLAIN_INITS, "an initialisation that leaves the base as it is")
        for key in ("r", "lora_alpha", "target_modules"):
            _refuse(fields, key, bool(fields.get(key)), "a value")
        _refuse(fields, "r", _is_rank(fields["r"]), "a whole number of at least 1")
        _check_forms(fields)
        targets, excluded = fields["target_modules"], fields.get("exclude_modules") or ()
        layers, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern") or ()
        return cls(
            r=fields["r"],
            lora_alpha=_number(fields, "lora_alpha"),
            target_modules=targets if isinstance(targets, str) else tuple(targets),
            modules_to_save=tuple(fields.get("modules_to_save") or ()),
            rank_pattern=dict(fields.get("rank_pattern") or {}),
            alpha_pattern=dict(fields.get("alpha_pattern") or {}),
            exclude_modules=excluded if isinstance(excluded, str) else tuple(excluded),
            layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers or ()),
            layers_pattern=(patterns,) if isinstance(patterns, str) else tuple(patterns),
            use_rslora=bool(fields.get("use_rslora")),
            use_dora=bool(fields.get("use_dora")),
            dropout=float(fields.get("lora_dropout") or 0.0),
        )

    def targets(self, path: str) -> bool:
        """Whether a LoRA update goes to the module (peft.tuners.tuners_utils.check_target_module_exists)."""
        if isinstance(self.exclude_modules, str):
            if re.fullmatch(self.exclude_modules, path):
                return False
        elif _ends(path, self.exclude_modules):
            return False
        if any(_framed(_SAVES, module).match(path) for module in self.modules_to_save):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules == DUMMY:
                return False
            if self.target_modules.lower() == "all-linear":
                return path.rpartition(".")[2] != "lm_head"
            return re.fullmatch(self.target_modules, path) is not None
        return _ends(path, self.target_modules) and self._layer(path)

    def _layer(self, path: str) -> bool:
        if not self.layers_to_transform:
            return True
        framed = [_framed(_LAYERS, pattern) for pattern in self.layers_pattern] or [_framed(_ANY_LAYER, "")]
        found = next((match for pattern in framed if (match := pattern.match(path))), None)
        return found is not None and int(found["index"]) in self.layers_to_transform

    def saves(self, module: str) -> bool:
        """Whether the module is replaced whole (peft.utils.other._set_trainable: names that end alike)."""
        return any(module.endswith(name) for name in self.modules_to_save)

    def rank(self, path: str) -> int:
        """Rank of the update at the module."""
        return int(_pattern(self.rank_pattern, path, self.r))

    def scale(self, path: str) -> float:
        """What B A is multiplied with at the module."""
        alpha, rank = _pattern(self.alpha_pattern, path, self.lora_alpha), self.rank(path)
        return float(alpha / (math.sqrt(rank) if self.use_rslora else rank))


def _ends(path: str, names: Sequence[str]) -> bool:
    return path in names or any(path.endswith(f".{name}") for name in names)


@lru_cache(1 << 14)
def _framed(frame: str, pattern: str) -> re.Pattern[str]:
    """Compiled once: an adapter with a rank for each module asks for each of its patterns at each module."""
    return re.compile(frame.replace("%s", pattern))


def _pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((v for k, v in patterns.items() if _framed(_OWN, k).match(path)), default)


def _refuse(fields: Mapping[str, Any], key: str, fine: bool, allowed: str) -> None:
    if not fine:
        raise AdapterError(
            f"The adapter's {key} can not be used here.", given=f"{key}: {fields.get(key)!r}", allowed=allowed
        )


def _check_forms(fields: Mapping[str, Any]) -> None:
    """Refuse values of another form than PEFT's, and what is no regular expression where PEFT takes it for one."""
    for key, known in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        table = fields.get(key) or {}
        _refuse(fields, key, isinstance(table, Mapping) and len(table) <= _MANY, f"a table, of {_MANY} at most")
        _refuse(fields, key, all(map(known, table.values())), "numbers by pattern")
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        names = fields.get(key) or ()
        text = isinstance(names, str) and key != "modules_to_save"
        fine = text or (isinstance(names, list | tuple | set) and all(isinstance(name, str) and name for name in names))
        fine = fine and (text or len(names) <= _MANY)
        _refuse(fields, key, fine, "a list of names" + (" or a pattern" if key != "modules_to_save" else ""))
    layers = fields.get("layers_to_transform")
    listed = [layers] if isinstance(layers, int) else layers or []
    fine = isinstance(listed, list | tuple) and all(isinstance(n, int) for n in listed)
    _refuse(fields, "layers_to_transform", fine, "numbers of layers")
    dropout = fields.get("lora_dropout") or 0
    _refuse(fields, "lora_dropout", _is_number(dropout) and 0 <= dropout < 1, "at least 0 and below 1")
    patterns = [(key, fields[key]) for key in ("target_modules", "exclude_modules") if isinstance(fields.get(key), str)]
    for key in _FRAMES:
        given = fields.get(key) or ()
        patterns += [(key, pattern) for pattern in ([given] if isinstance(given, str) else given)]
    for key, pattern in patterns:
        why = fault(pattern, _FRAMES.get(key, "%s"))
        if why is not None:
            raise AdapterError(
                f"The adapter's {key} holds no regular expression that can be used.", given=f"{pattern[:200]!r}: {why}"
            )


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(fields: Mapping[str, Any], key: str) -> float:
    _refuse(fields, key, _is_number(fields[key]), "a number")
    return float(fields[key])


def write(adapter: Adapter) -> dict[str, Any]:
    """The ``adapter_config.json`` of an adapter that PEFT has a place for.

    Scales are written as alpha / r whatever made them, so that readers which know nothing of rsLoRA agree.
    """
    held = {path: adapter.patches[path] for path in adapter.layout.targets}
    ranks = {path: patched.factors["A"].shape[0] for path, patched in held.items()}
    alphas = {path: _alpha(float(patched.constants["scale"]), ranks[path]) for path, patched in held.items()}
    rank, alpha = _commonest(ranks.values(), 8), _commonest(alphas.values(), 8.0)
    return {
        "alpha_pattern": {re.escape(path): _plain(v) for path, v in alphas.items() if v != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": adapter.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(alpha),
        "lora_dropout": _commonest([float(patched.constants["dropout"]) for patched in held.values()], 0.0),
        "modules_to_save": list(adapter.layout.saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {re.escape(path): v for path, v in ranks.items() if v != rank},
        "revision": None,
        "target_modules": list(adapter.layout.targets) or DUMMY,
        "task_type": None,
        "use_dora": any("magnitude" in patched.factors for patched in held.values()),
        "use_rslora": False,
    }


def _alpha(scale: float, rank: int) -> float:
    """An alpha with alpha / rank == scale to the bit, where there is one."""
    alpha = scale * rank
    near = (float(round(alpha)), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in near if a / rank == scale), alpha)


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _commonest(values: Any, default: Any) -> Any:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default
