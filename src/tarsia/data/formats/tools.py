"""Tools and calls of them, as OpenAI, TRL, ms-swift and LLaMA-Factory write them."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tarsia.data.formats.parts import read_list, read_text
from tarsia.data.formats.registry import Place, Row, shown
from tarsia.data.samples import Call


def read_tools(row: Row, place: Place) -> tuple[str, ...]:
    """The column ``tools``: a list of functions, or its JSON text. Raises DataError."""
    value = row.get("tools")
    if not value:
        return ()
    value = from_json(value, "`tools`", place) if isinstance(value, str) else value
    return tuple(_tool(tool, place) for tool in read_list(value or (), "`tools`", place))


def _tool(value: object, place: Place) -> str:
    value = from_json(value, "a tool", place) if isinstance(value, str) else value
    if isinstance(value, Mapping) and "function" not in value:
        value = {"type": "function", "function": value}
    function = value.get("function") if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise place.error("a tool is not understood.", given=shown(value), allowed=_TOOL)
    return to_json(value, "a tool", place)


_TOOL = '{"name", "description", "parameters"}, or {"type": "function", "function": {...}}'


def read_calls(value: object, place: Place) -> tuple[Call, ...]:
    """A message's ``tool_calls``: [{"id"?, "type"?, "function": {"name", "arguments"}}], or without "function"."""
    return tuple(_call(call, place) for call in read_list(value, "`tool_calls`", place))


def read_call_text(text: str, place: Place) -> tuple[Call, ...]:
    """The calls of a turn that is nothing but their JSON: one {"name", "arguments"} or a list of them."""
    value = from_json(text, "a call of a tool", place)
    return tuple(_call(call, place) for call in (value if isinstance(value, list) else [value]))


def _call(value: object, place: Place) -> Call:
    given = value if isinstance(value, Mapping) else {}
    function = given.get("function") or {k: v for k, v in given.items() if k not in ("id", "type")}
    rest = {k for k in given if k not in ("id", "type", "function")} if "function" in given else set()
    if not isinstance(function, Mapping) or set(function) != {"name", "arguments"} or rest:
        raise place.error(
            "a call of a tool is not understood.", given=shown(value), allowed='{"name", "arguments": {...}}'
        )
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = from_json(arguments, "the arguments of a call", place)
    if not isinstance(arguments, Mapping):
        raise place.error("the arguments of a call are no JSON object.", given=shown(function["arguments"]))
    name = read_text(function["name"], "a tool's name", place)
    text = to_json(arguments, "the arguments of a call", place)
    return Call(name, text, read_text(given.get("id") or "", "a call's id", place))


def from_json(text: str, name: str, place: Place) -> object:
    """What a JSON text says. Raises DataError."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise place.error(f"{name} is not JSON: {error}.", given=shown(text)) from None
    return value


def to_json(value: object, name: str, place: Place) -> str:
    """A value as JSON text. Raises DataError, and where nulls may be the table's and not the row's."""
    if place.columnar and _holds_null(value):
        raise place.error(
            f"{name} has nulls, and this table also writes null for what is absent.",
            given=shown(value),
            do="keep it as JSON text in this column",
        )
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise place.error(f"{name} can not be written as JSON: {error}.", given=shown(value)) from None


def _holds_null(value: object) -> bool:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if one is None:
            return True
        if isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
    return False
