"""From tokens to text, as far as it is sure: no half characters, nothing of a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from transformers.convert_slow_tokenizer import bytes_to_unicode

from tarsia.core.errors import ServeError

_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's spelling of a byte
_LETTERS: Final = {letter: byte for byte, letter in bytes_to_unicode().items()}
_BROKEN: Final = "\ufffd"


class Spelling:
    """How one base's tokens are spelt. ``special`` are the ids that are never shown."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self.special = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._added = frozenset(tokenizer.added_tokens_decoder)
        decoder = str(self._tokenizer.decoder)
        self._by_letter = "ByteLevel(" in decoder
        names = tokenizer.get_vocab().items() if "ByteFallback(" in decoder else ()
        self._bytes = {i: bytes.fromhex(found[1]) for name, i in names if (found := _BYTE.fullmatch(name))}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens, and without the cleaning that takes blanks out of a text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def pends(self, token: int) -> bool:
        """Whether what follows may change what the text ends with: bytes that are read together until none follows."""
        return token in self._bytes

    def alone(self, token: int) -> tuple[str, bytes]:
        """One token as it would be shown by itself, special ones too, and its bytes."""
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return "", b""
        if token in self._added:
            raw = name.encode()
        elif token in self._bytes:
            raw = self._bytes[token]
        elif self._by_letter and all(letter in _LETTERS for letter in name):
            raw = bytes(_LETTERS[letter] for letter in name)
        else:
            raw = name.replace("\u2581", " ").encode()
        return raw.decode(errors="replace"), raw


class Words:
    """The text of one answer, token by token.

    What ``add`` and at last ``flush`` gave, joined, is what the tokenizer decodes from all the ids, up to the first
    stop string: the one that is complete first, the longest of those that are complete at once. ``stopped`` says
    that one was met; nothing is given after it.
    """

    def __init__(self, spelling: Spelling, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise ValueError("a stop string has no letters")
        self.stopped = False
        self._spelling, self._stop = spelling, tuple(stop)
        self._ids: list[int] = []
        self._sure: list[str] = []
        self._known: list[int] = []  # the last ids whose text is sure
        self._shown = ""  # the text of these alone
        self._new: list[int] = []
        self._held = ""  # sure, and perhaps a stop string's beginning

    def add(self, token: int) -> str:
        """What of the text is sure now, and was not before."""
        if self.stopped:
            return ""
        self._ids.append(token)
        if token in self._spelling.special:
            return ""
        self._new.append(token)
        if self._spelling.pends(token):
            return ""
        text = self._spelling.decode(self._known + self._new)
        if not text.startswith(self._shown):
            raise _torn(self._shown, text)
        if text.endswith(_BROKEN) or text == self._shown:
            return ""
        sure = text[len(self._shown) :]
        self._known, self._new = self._new, []
        self._shown = self._spelling.decode(self._known)
        self._sure.append(sure)
        return self._past(sure)

    def flush(self) -> str:
        """What is left when nothing follows. Raises ServeError where the parts do not make the tokenizer's text."""
        if self.stopped:
            return ""
        whole, parts = self._spelling.decode(self._ids), "".join(self._sure)
        if not whole.startswith(parts):
            raise _torn(parts, whole)
        rest = self._past(whole[len(parts) :])
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _past(self, sure: str) -> str:
        """What can be given of what was held and ``sure``: neither a stop string nor what may become one."""
        text = self._held + sure
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _torn(part: str, whole: str) -> ServeError:
    return ServeError(
        "internal", "A text was told in parts that do not make it.", given=f"{part[-40:]!r} in {whole[-80:]!r}"
    )


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of ``text`` begin ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
