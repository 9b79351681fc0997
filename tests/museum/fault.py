"""A silent failure as a value: how it is planted here, how it is planted in the peers, and what each then says.

A fault is *refused* where its run raises a TarsiaError, *reported* where the run ends and tells the user, and
*harmless* where it can be planted and changes nothing. Each is judged against the same run without the fault: that
one must raise nothing and tell nothing of the kind.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import transformers

from tarsia.core.errors import TarsiaError

Told = Sequence[str]
"""What a run told its user, a sentence each; of a harmless fault, what the run computed."""

FAULTS: dict[str, Fault] = {}
"""Every fault of the museum by name, stage by stage. ``stages`` fills it."""


class Harmless:
    """The verdict of a fault that is planted and changes nothing."""


class Reported:
    """The verdict of a fault that the run tells its user of."""


Verdict = type[TarsiaError] | type[Reported] | type[Harmless]


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of one fault: the words of the table's two last columns."""

    peer: str
    tarsia: str


@dataclass(slots=True)
class Fault:
    """One fault. ``threads`` are the issues that it was taken from (``owner/repo#number``).

    ``plant(folder, planted)`` does the run in Tarsia, with the fault or without. ``says`` is a pattern that the
    refusal, or what is told, holds, and that the sound run's does not; a harmless fault's is what it shows.
    """

    name: str
    stage: str
    threads: tuple[str, ...]
    verdict: Verdict
    says: str
    plant: Callable[[Path, bool], Told]
    compare: Callable[[Path], str] | None = field(default=None)

    def peer(self, run: Callable[[Path], str]) -> Callable[[Path], str]:
        """Register what plants the same fault in PEFT and Transformers, and says what came of it."""
        self.compare = run
        return run

    @property
    def key(self) -> str:
        """The name of its test."""
        return self.plant.__name__

    def sound(self, folder: Path) -> Told:
        """The run without the fault. Raises AssertionError where it tells what only the fault should."""
        told = self.plant(folder, False)
        if self.verdict is not Harmless:
            assert not re.search(self.says, "\n".join(told)), f"the sound run says so too: {told}"
        return told

    def faulty(self, folder: Path, sound: Told) -> str:
        """The run with the fault, and what it said. Raises AssertionError where that is not the verdict."""
        if issubclass(self.verdict, TarsiaError):
            with pytest.raises(TarsiaError) as caught:
                self.plant(folder, True)
            error = caught.value
            assert type(error) is self.verdict, f"{type(error).__name__} and not {self.verdict.__name__}: {error}"
            assert re.search(self.says, str(error)), f"{self.says!r} is not in: {error}"
            return f"`{self.verdict.__name__}`: {error.what}"
        told = self.plant(folder, True)
        if self.verdict is Harmless:
            assert list(told) == list(sound), f"not harmless: {told} is not {sound}"
            return f"harmless: {self.says}"
        line = next((line for line in told if re.search(self.says, line)), None)
        assert line is not None, f"not reported: {told}"
        return f"reported: {brief(line, 180)}"

    def observe(self, folder: Path) -> str:
        """What the peers do with the same fault, in words: what they raise, or say, and what came of it."""
        assert self.compare is not None, f"nothing plants {self.name!r} in the peers"
        with listening() as heard:
            try:
                outcome = self.compare(folder)
            except Exception as error:  # noqa: BLE001 (whatever a peer raises is the observation)
                return f"raises `{type(error).__name__}`: {brief(str(error))}"
        return (f"warns ({brief(heard[0])}); " if heard else "silent; ") + outcome


def fault(
    name: str, *threads: str, stage: str, verdict: Verdict, says: str
) -> Callable[[Callable[[Path, bool], Told]], Fault]:
    """Register a fault under the function that plants it."""

    def register(plant: Callable[[Path, bool], Told]) -> Fault:
        assert threads, f"{name!r} names no thread"
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", thread) for thread in threads), threads
        made = Fault(name, stage, threads, verdict, says, plant)
        assert plant.__name__ not in FAULTS, f"two faults are called {plant.__name__}"
        FAULTS[plant.__name__] = made
        return made

    return register


def brief(text: str, most: int = 110) -> str:
    """The first sentence, on one line, without what differs from run to run."""
    line = re.sub(r"\S*/", "", re.sub(r"\s+", " ", re.sub(r"\x1b\[\d*m", "", text.partition("\n")[0].strip())))
    first = re.split(r"(?<=[.!:]) (?=[A-Z\[])", line)[0].rstrip(":")
    return first if len(first) <= most else first[:most].rpartition(" ")[0] + " ..."


@contextmanager
def listening() -> Iterator[list[str]]:
    """Every warning that a user would be shown: Python's, and what the peers log."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear = Ear(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "accelerate")]
    for once in (transformers.utils.logging.warning_once, transformers.utils.logging.info_once):
        once.cache_clear()  # what is said once in a process is said anew, whichever test came before
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, *_, **__: (
            None if issubclass(category, DeprecationWarning | FutureWarning) else heard.append(str(message))
        )
        for logger in loggers:
            logger.addHandler(ear)
        try:
            yield heard
        finally:
            for logger in loggers:
                logger.removeHandler(ear)
