"""Everything that Tarsia refuses, as one tree.

TarsiaError
 +-- ConfigError        a recipe, an option or a method's configuration that makes no sense
 +-- AnatomyError       a model that is not, or not wholly, understood
 +-- SelectionError     a selection that matches nothing, or not all that it names
 +-- AttachError        a patch that can not be put where it was asked for
 |    +-- CompositionError  adapters that can not act together as was asked for
 +-- RouteError         rows of a batch that can not be told apart
 +-- DataError          a row, a picture or a template that would spoil training
 +-- AdapterError       an adapter's files that are broken, foreign or incomplete
 |    +-- BaseMismatch  an adapter that belongs to another base
 +-- TrainingError      a run that can not go on: no gradient, not a number, no space
 +-- PlanError          a memory that can not be foreseen
 +-- MergeError         adapters that can not be combined, or a fold that would lose
 +-- LibraryError       a library of adapters, or what is to go into it
 +-- ServeError         a request that can not be served
"""

from __future__ import annotations


class TarsiaError(Exception):
    """A refusal that says what was given, what was allowed and what to do.

    ``what`` is one sentence; ``given``, ``allowed`` and ``do`` are shown below it, each on its line.
    """

    def __init__(self, what: str, *, given: object = None, allowed: object = None, do: str | None = None) -> None:
        self.what, self.given, self.allowed, self.do = what, given, allowed, do
        lines = [("given", given), ("allowed", allowed), ("to do", do)]
        super().__init__("\n".join([what, *(f"  {k + ':':9}{v}" for k, v in lines if v is not None)]))


class ConfigError(TarsiaError):
    """A recipe, an option or a method's configuration that makes no sense."""


class AnatomyError(TarsiaError):
    """A model that is not, or not wholly, understood."""


class SelectionError(TarsiaError):
    """A selection that matches nothing, or not all that it names."""


class AttachError(TarsiaError):
    """A patch that can not be put where it was asked for."""


class CompositionError(AttachError):
    """Adapters that can not act together as was asked for."""


class RouteError(TarsiaError):
    """Rows of a batch that can not be told apart."""


class DataError(TarsiaError):
    """A row, a picture or a template that would spoil training."""


class QuantError(TarsiaError):
    """A weight that can not be quantised, or a quantised one whose parts do not belong together."""

    def about(self, name: str) -> QuantError:
        """The same, told of the weight ``name``."""
        what = f"{name}: {self.what[:1].lower()}{self.what[1:]}"
        return QuantError(what, given=self.given, allowed=self.allowed, do=self.do)


class AdapterError(TarsiaError):
    """An adapter's files that are broken, foreign or incomplete."""


class BaseMismatch(AdapterError):
    """An adapter that belongs to another base."""


class TrainingError(TarsiaError):
    """A run that can not go on: no gradient, not a number, no space."""


class PlanError(TarsiaError):
    """Something that can not be foreseen, or a machine that does not give what a plan needs."""


class MergeError(TarsiaError):
    """Adapters that can not be combined, or a fold that would lose what was learnt."""


class LibraryError(TarsiaError):
    """Something is wrong with a library of adapters, or with what is to go into it."""


class ServeError(TarsiaError):
    """A request that can not be served, or a server that can not serve.

    ``kind`` says what became of the request, in a word that a client can act on: invalid, unknown_adapter, refused,
    damaged, too_long, timeout, overloaded, lost, internal.
    """

    def __init__(
        self, kind: str, what: str, *, given: object = None, allowed: object = None, do: str | None = None
    ) -> None:
        super().__init__(what, given=given, allowed=allowed, do=do)
        self.kind = kind
