"""YAML without its surprises: 1e-4 is a number, and a key that stands twice is an error; sizes as people write them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tarsia.core.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers; no repeated keys; no words that turn into true or false."""


# YAML 1.1 takes 1e-4 for a text, because it wants a point and a sign
_FLOAT = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:null")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))


_WRITTEN = "close every bracket and quote; put a text with a : or a # in quotes, and indent with spaces"


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError("A key is a text.", given=f"{key!r} in line {key_node.start_mark.line + 1}")
        if key in values:
            raise ConfigError(f"The key {key!r} stands twice.", given=f"line {key_node.start_mark.line + 1}")
        values[key] = loader.construct_object(value_node, deep=True)
    return values


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(path: Path) -> Any:
    """The values of a YAML file. Raises ConfigError where it can not be read or is not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("The recipe can not be read.", given=f"{path}: {error}", do="check the path") from None
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a subclass of SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a tag or an underscore that makes no number
        raise ConfigError("The recipe is not YAML.", given=f"{path}, {_fault(error)}", do=_WRITTEN) from None


def parse_value(text: str) -> Any:
    """One value as YAML reads it: ``1e-4``, ``true``, ``[1, 2]``, ``a text``."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a subclass of SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError("That is no value.", given=f"{text!r}, {_fault(error)}", do=_WRITTEN) from None


def size(given: int | str, key: str) -> int:
    """Bytes of a number, or of a text such as "4GB" (powers of 1000) or "4GiB" (of 1024). ``key`` is whose it is.

    Raises ConfigError for what is no size, or nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([kMGT])(i?))?B?", str(given))
    unit = 0 if found is None else (1024 if found[3] else 1000) ** (" kMGT".index(found[2] or " "))
    bytes_ = 0.0 if found is None else float(found[1]) * unit
    if not 1 <= bytes_ < 2**63:
        raise ConfigError("That is no size.", given=repr(given)[:80], do=f'for example {key}: "4GB"')
    return int(bytes_)


def _fault(error: Exception) -> str:
    """What PyYAML does not understand and where, on one line."""
    mark = getattr(error, "problem_mark", None)
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return " ".join(str(error).split())
    problem = str(error.problem).replace("'<stream end>'", "the end")
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
