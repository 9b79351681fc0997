"""The address of a remote as it may be shown, kept and sent on: without what may be a secret."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

HIDDEN: Final = "***"
"""What stands where something was taken out."""

_AUTHORITY = re.compile(r"(?P<protocol>.*?://)(?P<rest>.*)", re.DOTALL)


def parted(url: str) -> tuple[str, tuple[str, ...]]:
    """The address without user, password and query, and these. A path is all shown.

    What stands before an @ is a user's; a password may hold / and @ as they are, so where a colon stands in what
    should be the host, all up to the last @ is taken out, rather more than too little.
    """
    match = _AUTHORITY.fullmatch(url)
    if match is None:
        return url, ()
    rest, mark, query = match["rest"].partition("?")
    if "@" in query and ":" in rest.partition("/")[0]:  # the mark is the password's
        rest, mark, query = match["rest"], "", ""
    host = rest.partition("/")[0]
    user, at, shown = rest.rpartition("@") if ":" in host else host.rpartition("@")
    if ":" not in host:
        shown += rest[len(host) :]
    text = f"{match['protocol']}{HIDDEN + at if at else ''}{shown}{mark + HIDDEN if mark else ''}"
    name, _, password = user.partition(":")
    values = (pair.rpartition("=")[2] for pair in re.split("[&;#]", query))
    return text, tuple(part for part in (user, name, password, query, *values) if part)


def clean(url: str, text: str) -> str:
    """A text that may repeat the address or its secrets, written as they are or unquoted, without these."""
    shown, secrets = parted(url)
    text = text.replace(url, shown)
    for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text
