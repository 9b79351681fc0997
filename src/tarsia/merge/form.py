"""What adapters were trained over, and what they can be folded into: their own word, their user's, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tarsia.adapter.four_bits import FourBits
from tarsia.adapter.reading import read_json
from tarsia.adapter.stored import stored_form
from tarsia.adapter.value import Adapter
from tarsia.core.errors import ConfigError

Onto = Literal["dequantised", "original"]


@dataclass(frozen=True, slots=True)
class Form:
    """A base's form: ``asked`` is what the adapters had it rounded to as it was opened, ``held`` what its files hold.

    ``unknown``: some adapter does not say what it was trained over, and nobody said it.
    """

    asked: FourBits | None
    held: FourBits | None
    unknown: bool

    @property
    def numbers(self) -> str:
        """The numbers that all are taken to be trained over."""
        coarse = self.held or self.asked
        return "the files' own numbers" if coarse is None else f"those of {coarse.numbers}"

    @property
    def text(self) -> str | None:
        """What the adapters were trained over; None is the files' own numbers."""
        coarse = self.held or self.asked
        said = [] if coarse is None else [coarse.numbers]
        return ", ".join(said + ["unknown"] * self.unknown) or None


def form_of(folder: Path, adapters: Sequence[Adapter | None], onto: Onto | None, over: FourBits | None) -> Form:
    """What adapters of the base in ``folder`` were trained over; None is one that says nothing of itself.

    ``over`` is what their user says of those that do not. Raises ConfigError where a choice is missing, or is none.
    """
    held = stored_form(read_json(folder / "config.json"), folder)
    silent = [one is None or _on_word(one) for one in adapters]
    marks = [one.fingerprint.quantisation for one in adapters if one is not None and one.fingerprint is not None]
    asked = next((found for mark in marks if (found := FourBits.of(mark)) is not None), None)
    if over is not None:
        asked = _stated(over, held, asked, silent)
    unknown = any(silent) and held is None and over is None
    _check_choice(folder, held, asked, onto, unknown)
    return Form(asked, held, unknown)


def _check_choice(
    folder: Path, held: FourBits | None, asked: FourBits | None, onto: Onto | None, unknown: bool
) -> None:
    """Raise ConfigError where there is a choice and none was made, or none and one was."""
    coarse = held or asked
    if coarse is None and onto is not None:
        raise ConfigError(
            "What the adapter was trained over is not known: PEFT does not write it."
            if unknown
            else "There is nothing to choose: the adapter was trained over the files' own numbers.",
            given=f"--onto {onto}",
            do="if it was trained over 4 bits say which (--over nf4); if not, leave --onto out"
            if unknown
            else "leave it out",
        )
    if coarse is not None and onto is None:
        raise ConfigError(
            f"The adapter was trained over 4 bits ({coarse.numbers}): into which numbers is it folded?",
            allowed="dequantised: those that the 4 bits stand for, which it learnt to make up for; original: those of "
            "the 16-bit files, which it has never seen",
            do="choose on purpose: --onto dequantised (what it was trained over), or --onto original",
        )
    if held is not None and onto == "original":
        raise ConfigError(
            "The base's files hold the 4 bits alone: there are no original numbers.",
            given=f"{folder}: {held.numbers}",
            allowed="dequantised",
            do="fold it --onto dequantised",
        )


def _on_word(adapter: Adapter) -> bool:
    """Whether all that is known of an adapter's base is its importer's word: of its form that says nothing."""
    origin = adapter.card.get("origin")
    return adapter.fingerprint is None or (isinstance(origin, Mapping) and origin.get("made_by") == "PEFT")


def _stated(over: FourBits, held: FourBits | None, asked: FourBits | None, silent: Sequence[bool]) -> FourBits | None:
    """The form that adapters which say none were trained over, as their user has it; None where the files hold it.

    Raises ConfigError where the files or an adapter say another.
    """
    said = held or asked
    if (said is not None and said.scheme != over.scheme) or (said is None and not all(silent)):
        raise ConfigError(
            "What the adapter was trained over is known, and is not that.",
            given=f"--over {over.numbers}",
            allowed="the files' own numbers" if said is None else said.numbers,
            do="leave it out",
        )
    return asked if said is not None else over
