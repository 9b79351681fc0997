"""JSON of strangers: every name once, every number finite, every letter whole, nothing left over."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from tarsia.core.errors import TarsiaError
from tarsia.serve.http.errors import Refusal, shown
from tarsia.serve.http.settings import Limits

_DEEPEST: Final = 100
_M = TypeVar("_M", bound=BaseModel)


async def read(request: Request, model: type[_M], limits: Limits) -> _M:
    """The body as what it should be. Raises Refusal: 415 for another media type, 400 for all else."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":  # a page in a browser can send text/plain to anybody, and not this
        error = TarsiaError("A body is JSON here.", given=shown(media), allowed="application/json")
        raise Refusal(415, error, code="unsupported_media_type")
    message = await request.receive()  # all of it (see gate); a Request's own ``body`` would be kept until the answer
    values = loads(message.get("body", b""), limits)
    del message
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _explained(error, model, values) from None


def loads(body: bytes, limits: Limits) -> Any:
    """What JSON says. Raises Refusal (400) where it says it twice, half, or in a way that takes too much memory."""
    pieces = body.count(b",") + body.count(b"[") + body.count(b"{")
    if pieces > limits.structure:
        raise Refusal.invalid("The body has too many pieces.", given=pieces, allowed=limits.structure)
    try:
        text = body.decode("utf8")
        values = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
        _check(values)
    except RecursionError:
        raise Refusal.invalid("The body is nested too deeply.", allowed=_DEEPEST) from None
    except UnicodeDecodeError as error:
        raise Refusal.invalid("The body is not UTF-8.", given=f"byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise Refusal.invalid("The body is no JSON.", given=f"{error.msg}, character {error.pos}") from None
    except ValueError as error:
        raise Refusal.invalid("The body has what JSON should not have.", given=str(error)[:200]) from None
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"the name {shown(twice)} twice in one object")
    return values


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text}, which is no number")


def _check(values: Any) -> None:
    """Raises ValueError for half a letter and for a float beyond the largest; RecursionError beyond the deepest."""
    stack = [(values, 0)]
    while stack:
        value, depth = stack.pop()
        if depth > _DEEPEST:
            raise RecursionError
        if isinstance(value, str):
            _check_text(value)
        elif isinstance(value, dict):
            for name, inner in value.items():
                _check_text(name)
                stack.append((inner, depth + 1))
        elif isinstance(value, list):
            stack.extend((inner, depth + 1) for inner in value)
        elif isinstance(value, float) and value in (float("inf"), float("-inf")):
            raise ValueError("a number that is too large")


def _check_text(text: str) -> None:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("half a surrogate pair, which is no letter")


_BRANCH: Final = re.compile(r"str|dict\[.*|list\[.*|constrained-str|function-.*")
"""What pydantic writes in a place for a type of several."""
_KINDS: Final = {
    "extra_forbidden": "This is not supported here, and nothing is left out silently.",
    "missing": "This has to be said.",
    "union_tag_invalid": "There is none of this kind.",
    "union_tag_not_found": "This has to be said.",
}
_TAGS: Final = ("role", "type")
"""Fields that say which of several types is meant: pydantic writes what they say in a place, beside where they are."""


def _explained(error: ValidationError, model: type[BaseModel], values: Any) -> Refusal:
    """What is wrong, by its name; what was given is not repeated: it may be a picture. A type's name is, shortened.

    Of several things it is the deepest: where a field may be of two types, one of them was meant.
    """
    found = error.errors(include_url=False, include_input=False)
    first = max(found, key=lambda one: len(one["loc"]))
    parts, told = _place(first["loc"], values), first.get("ctx", {})
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        parts.append(str(told["discriminator"]).strip("'"))
    place = ".".join(str(part) if isinstance(part, int) or part.isidentifier() else shown(part) for part in parts)
    names = sorted(model.model_fields)
    top = first["type"] == "extra_forbidden" and len(first["loc"]) == 1
    kinds, tag = told.get("expected_tags"), f": {shown(told['tag'])}" if "tag" in told else ""
    return Refusal.invalid(
        _KINDS.get(first["type"], f"{first['msg'].removeprefix('Value error, ')}."),
        place[:200] or None,
        given=f"{place[:200]}{tag}" if place else "the body",
        allowed=", ".join(names) if top else kinds,
        do="leave it out" if first["type"] == "extra_forbidden" else None,
    )


def _place(loc: Sequence[int | str], values: Any) -> list[int | str]:
    """Where something is in the body: what pydantic says without the names of its types."""
    parts, here, tagged = list[int | str](), values, False
    for part in loc:
        held = here if isinstance(here, dict) else {}
        if not tagged and any(held.get(name) == part for name in _TAGS):
            tagged = True  # a field may have the same name, and comes after it
        elif part in held or isinstance(part, int) or not _BRANCH.fullmatch(part):
            parts.append(part)
            known = part in held or (isinstance(here, list) and isinstance(part, int))
            here, tagged = here[part] if known else None, False
    return parts
