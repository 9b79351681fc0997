"""Whether adapters, and a base that may be known by its files alone, belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from tarsia.adapter.fingerprint import Fingerprint, architecture_of, shards
from tarsia.adapter.four_bits import FourBits
from tarsia.adapter.host import Host, Outline
from tarsia.adapter.value import Adapter
from tarsia.core.errors import AdapterError


def common(adapters: Mapping[str, Adapter], base: Host | Outline) -> Fingerprint | None:
    """The base that all adapters, by name, belong to; None where none says.

    Raises BaseMismatch where they disagree, or ``base``, where it is open, is another; an outline is held by its
    ``Grounds``.
    """
    known = {name: one.fingerprint for name, one in adapters.items() if one.fingerprint is not None}
    for (first, mark), (second, other) in pairwise(known.items()):
        mark.check(other, mine=_called(first, adapters), theirs=_called(second, adapters))
    if not known:
        return None
    name, mark = next(iter(known.items()))
    if isinstance(base, Host):
        mark.check(base.fingerprint, mine=_called(name, adapters), theirs=f"{base.name}, {base.form}")
    return mark


def hold(outline: Outline, wanted: Fingerprint) -> None:
    """Raise BaseMismatch where the files of an outline are not the base that is wanted, in whatever form.

    Where its weights are not on this machine, its architecture alone is looked at.
    """
    found = replace(wanted, architecture=architecture_of(outline.path))
    if weights_here(outline.path):
        found = Fingerprint.of_folder(outline.path)
    # what is rounded as it is opened lies in the files as it was
    allow = () if FourBits.of(wanted.quantisation) is None else ("quantisation",)
    wanted.check(found, allow=allow, mine="the adapter's base", theirs=outline.name)


def weights_here(folder: Path) -> bool:
    """Whether every file with weights of a base is in its folder."""
    try:
        return all(path.is_file() for path in shards(folder))
    except AdapterError:
        return False


def _called(name: str, adapters: Mapping[str, Adapter]) -> str:
    return f"{name}, of {adapters[name].base or 'a base without a name'}"
