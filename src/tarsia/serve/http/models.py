"""What may be asked for by ``model``, and what a key may see of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final

from tarsia.core.errors import LibraryError
from tarsia.library.places import Reference
from tarsia.serve.http.answers import ModelFacts, ModelList, Permission
from tarsia.serve.http.errors import Refusal
from tarsia.serve.http.keys import Key
from tarsia.serve.request import AUTO
from tarsia.serve.wire import Model, Ready, ServedAdapter, Started

_ROUTED: Final = ("adapter", "choice", "name", "nearest", "runner_up")
"""Where the router says a name."""
_STARTED: Final = int(time.time())


def base_name(given: str | None, ready: Ready | None) -> str | None:
    """What the base is asked for by: the owner's word, a hub's id, or a folder's last name (its path is nobody's)."""
    if given is not None or ready is None:
        return given
    path = PurePath(ready.model)
    return path.name if path.is_absolute() or ready.model.startswith(("./", "../")) else ready.model


def hidden(models: Sequence[Model], base: str | None) -> list[str]:
    """Adapters of the library whose names mean something else here, so that nobody reaches them by these."""
    return sorted(model.name for model in models if model.source is None and model.name in (base, AUTO))


def unreached(name: str, base: str | None) -> str:
    """What to do about one of them."""
    do = f"publish it under another name, or ask for it by its version ({name}@1)"
    return f"serve the base under another name (--name), {do}" if name == base else do


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asked for: ``adapter`` as the worker takes it, ``reference`` where it is one adapter's."""

    name: str
    adapter: str | None
    reference: Reference | None

    def check(self, key: Key, started: Started) -> None:
        """Raises Refusal (500) where another answers than was asked for: never another's, never silently the base.

        So it does where the router speaks of an adapter that is none of this key's; 403 where it leaves the request to
        the base, and the key may not use that.
        """
        by = started.adapter
        if self.adapter == AUTO:
            if by is None and not key.base:
                raise Refusal.abstained()
            told = [(started.routed or {}).get(name) for name in _ROUTED]
            right = all(key.may(name) for name in (by and by.name, *told) if isinstance(name, str))
        elif self.reference is None:
            right = by is None
        else:
            right = by is not None and _is(self.reference, by)
        if not right:
            raise Refusal(500, "Another adapter answered than was asked for: nothing of it is sent.", code="mixed_up")


def _is(asked: Reference, by: ServedAdapter) -> bool:
    """Whether what answers is what was asked for; which version a tag means is the library's to say."""
    return (
        by.name == asked.name
        and asked.number in (None, by.version)
        and by.hash.rpartition(":")[2].startswith(asked.hash or "")
    )


def sourced(key: Key, started: Started) -> Started:
    """The same without the source of a name that was loaded where the key may not use that."""
    by = started.adapter
    if by is None or by.source is None or key.may(Reference.parse(by.source).name):
        return started
    return started.model_copy(update={"adapter": by.model_copy(update={"source": None})})


def asked(name: str, base: str | None, key: Key, *, routed: bool) -> Asked:
    """What a name means. Raises Refusal (404), the same for what is not there and what is not this key's."""
    if name == base and key.base:
        return Asked(name, None, None)
    if name == AUTO:
        if not routed:
            raise Refusal.invalid("This server does not choose adapters.", "model", given=AUTO)
        return Asked(name, AUTO, None)
    try:
        reference = Reference.parse(name)
    except LibraryError as error:
        raise Refusal.unknown(error if key.unbounded else None) from None
    if name == base or not key.may(reference.name):
        raise Refusal.unknown()
    return Asked(name, str(reference), reference)


def listed(models: Sequence[Model], base: str | None, ready: Ready | None, key: Key) -> ModelList:
    """The base and the adapters that a key may use, without those of another base."""
    length = None if ready is None else min(ready.context, ready.most_tokens)
    found = []
    if base is not None and key.base:
        found.append(_facts(base, base, None, length))
    for model in models:
        if key.may(model.name) and model.name not in (base, AUTO) and not model.foreign:
            facts = _facts(model.name, _root(model, key), base, length)
            facts.tarsia.update(version=model.version, hash=model.hash, methods=model.methods, bytes=model.bytes)
            facts.tarsia.update({} if model.unproved is None else {"unproved": model.unproved})
            found.append(facts)
    return ModelList(data=found)


def _root(model: Model, key: Key) -> str:
    """What the library calls what a name means now; the name itself for a folder, and for what is not this key's."""
    if model.version is None:
        return model.name
    name = model.name if model.source is None else Reference.parse(model.source).name
    return f"{name}@{model.version}" if key.may(name) else model.name


def find(models: ModelList, name: str) -> ModelFacts:
    """One of the models that are listed, by its name, or the version or hash that this means now.

    Raises Refusal (404).
    """
    for model in models.data:
        if model.id == name:
            return model
    try:
        reference = Reference.parse(name)
    except LibraryError:
        raise Refusal.unknown() from None
    for model in models.data:
        version, digest = model.tarsia.get("version"), str(model.tarsia.get("hash", ""))
        if model.id == reference.name and reference.tag is None and model.parent is not None:
            by_hash = reference.hash is not None and digest.rpartition(":")[2].startswith(reference.hash)
            if by_hash or (reference.number is not None and reference.number == version):
                return model
    raise Refusal.unknown()


def _facts(name: str, root: str, parent: str | None, length: int | None) -> ModelFacts:
    return ModelFacts(
        id=name,
        created=_STARTED,
        root=root,
        parent=parent,
        max_model_len=length,
        permission=[Permission(id=f"modelperm-{name}", created=_STARTED)],
    )
