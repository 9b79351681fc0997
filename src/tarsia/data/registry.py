"""LLaMA-Factory's dataset_info.json: which file an entry names, and its rows in the usual spelling."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tarsia.core.errors import DataError
from tarsia.data.formats.registry import Place, Row, shown

_FIELDS: Final = frozenset(
    {"file_name", "hf_hub_url", "formatting", "columns", "tags", "split", "subset", "num_samples"}
)
_COLUMNS: Final[Mapping[str, Mapping[str, str]]] = {
    "sharegpt": {"messages": "conversations", "system": "", "tools": "", "images": "", "videos": "", "audios": ""},
    "alpaca": {
        "prompt": "instruction", "query": "input", "response": "output", "history": "", "system": "",
        "images": "", "videos": "", "audios": "",
    },
}  # fmt: skip
"""What an entry's columns are called where it does not say; "" is a column that it then does not have."""
_TAGS: Final[Mapping[str, str]] = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_SPEAKERS: Final = {tag: _TAGS[tag] for tag in _TAGS if tag not in ("role_tag", "content_tag")}


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: ``path`` as a Source's, ``columns`` from role in a row to the table's name, and the turns' tags."""

    path: str
    formatting: str
    columns: Mapping[str, str]
    tags: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    subset: str | None = None
    limit: int | None = None

    def usual(self, row: Row, place: Place) -> Row:
        """The row in the columns and tags that LLaMA-Factory has where an entry says nothing. Raises DataError."""
        theirs = {name: key for key, name in self.columns.items() if name}
        row = {theirs.get(key, key): value for key, value in row.items() if value is not None}
        return self._alpaca(row, place) if self.formatting == "alpaca" else self._sharegpt(row, place)

    def _sharegpt(self, row: dict[str, object], place: Place) -> Row:
        turns = row.pop("messages", None)
        if not isinstance(turns, list | tuple):
            raise place.error("the entry's column of messages is not there, or is no list.", given=shown(turns))
        return {"conversations": [self._turn(turn, place) for turn in turns], **row}

    def _turn(self, turn: object, place: Place) -> Mapping[str, object]:
        tags = self.tags
        given = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, Mapping) else {}
        if set(given) != {tags["role_tag"], tags["content_tag"]}:
            raise place.error(
                "a turn has other keys than the entry's tags.",
                given=shown(turn),
                allowed=f"{tags['role_tag']}, {tags['content_tag']}",
            )
        speaker = given[tags["role_tag"]]
        usual = next((usual for tag, usual in _SPEAKERS.items() if tags[tag] == speaker), None)
        if usual is None:
            raise place.error(
                "a turn is of a speaker that the entry's tags do not name.",
                given=shown(speaker),
                allowed=", ".join(tags[tag] for tag in _SPEAKERS),
            )
        return {"from": usual, "value": given[tags["content_tag"]]}

    def _alpaca(self, row: dict[str, object], place: Place) -> Row:
        prompt, query, response = (row.pop(name, "") for name in ("prompt", "query", "response"))
        history = row.pop("history", [])
        if not isinstance(history, list | tuple) or not all(
            isinstance(h, list | tuple) and len(h) == 2 for h in history
        ):
            raise place.error("the history is not a list of [question, answer].", given=shown(history))
        texts = [*(text for pair in history for text in pair), prompt, query, response]
        if not all(isinstance(text, str) for text in texts):
            raise place.error("an instruction, input, output or history is not a text.", given=shown(texts))
        asked = "\n".join(str(text) for text in (prompt, query) if text)
        turns = [*(text for pair in history for text in pair), asked, response]
        speakers = ("human", "gpt")
        return {"conversations": [{"from": speakers[i % 2], "value": t} for i, t in enumerate(turns)], **row}


def read_entry(path: Path, name: str) -> Entry:
    """The entry ``name`` of a dataset_info.json; its file lies beside it, as in LLaMA-Factory.

    Raises DataError where the file is none, has no such entry, or the entry asks for what is not built in:
    preferences, a loading script, other hubs, other formats.
    """
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("The dataset_info.json can not be read.", given=f"{path}: {error}") from None
    if not isinstance(entries, dict) or not isinstance(entries.get(name), dict):
        names = ", ".join(map(str, entries))[:200] if isinstance(entries, dict) else None
        raise DataError("The dataset_info.json has no such entry.", given=f"{path}: {name}", allowed=names)
    given: dict[str, object] = {k: v for k, v in entries[name].items() if v not in (None, False)}
    if unknown := sorted(set(given) - _FIELDS):
        raise DataError(
            f"The entry {name} asks for what is not built in.",
            given=", ".join(unknown),
            allowed=", ".join(sorted(_FIELDS)),
            do="give the rows as a file of their own",
        )
    formatting = str(given.get("formatting", "alpaca"))
    columns, tags = given.get("columns", {}), given.get("tags", {})
    known = _COLUMNS.get(formatting, {})
    if (
        not known
        or not isinstance(columns, dict)
        or not set(columns) <= set(known)
        or not all(map(_is_text, columns.values()))
    ):
        raise DataError(
            f"The format or the columns of the entry {name} are not understood.",
            given=f"{formatting}: {shown(columns)}",
            allowed="; ".join(f"{kind}: {', '.join(names)}" for kind, names in _COLUMNS.items()),
        )
    if not isinstance(tags, dict) or not set(tags) <= set(_TAGS) or not all(map(_is_text, tags.values())):
        raise DataError(
            f"The tags of the entry {name} are not understood.", given=shown(tags), allowed=", ".join(_TAGS)
        )
    where, which = _where(path, name, given), _which(name, given)
    return Entry(where, formatting, {**known, **columns}, {**_TAGS, **tags}, *which)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _where(path: Path, name: str, given: Mapping[str, object]) -> str:
    file, hub = given.get("file_name"), given.get("hf_hub_url")
    if (file is None) == (hub is None) or not isinstance(file or hub, str):
        raise DataError(f"The entry {name} names no file and no hub id, or both.", given=shown(dict(given)))
    return f"hub:{hub}" if hub else str(path.parent / str(file))


def _which(name: str, given: Mapping[str, object]) -> tuple[str | None, str | None, int | None]:
    split, subset, limit = (given.get(key) for key in ("split", "subset", "num_samples"))
    for value in (split, subset):
        if not (value is None or isinstance(value, str)):
            raise DataError(f"The split or subset of the entry {name} is not a name.", given=shown(value))
    if not (limit is None or (isinstance(limit, int) and limit > 0)):
        raise DataError(f"The num_samples of the entry {name} is not a number of rows.", given=shown(limit))
    return (None if split is None else str(split)), (None if subset is None else str(subset)), limit
