"""What to do about a value that does not fit, by the kind of pydantic's error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, Final

_WAYS: Final[Mapping[str, str]] = {
    "bool_type": "write true or false",
    "dict_type": "write a table of keys and values",
    "finite_number": "give a finite number",
    "float_type": "write a number, without quotes",
    "greater_than": "give more than {gt}",
    "greater_than_equal": "give {ge} or more",
    "int_type": "write a whole number, without quotes",
    "less_than": "give less than {lt}",
    "string_too_short": "write a text that is not empty",
    "string_type": "write a text, in quotes where it looks like a number",
    "too_long": "give no more than {max_length}",
    "too_short": "give at least {min_length}",
    "tuple_type": "write a list",
}


def advice(error: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """What is allowed in place of a value, and what to do, as far as an entry of ``ValidationError.errors()`` tells."""
    told = error.get("ctx", {})
    if error["type"] != "literal_error":
        way = _WAYS.get(error["type"])
        return None, way and way.format(**told)
    allowed = re.findall(r"'([^']*)'", told["expected"])
    near = difflib.get_close_matches(str(error["input"]), allowed, 1, 0.3)
    return ", ".join(allowed), f"did you mean {near[0]}?" if near else "choose one of these"
