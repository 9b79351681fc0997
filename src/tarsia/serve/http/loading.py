"""From where an alias may be made: references of the library, and folders that the owner named."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tarsia.core.errors import LibraryError, TarsiaError
from tarsia.library.places import CURRENT, Reference, check_name
from tarsia.serve.http.errors import Refusal, shown
from tarsia.serve.http.keys import Key
from tarsia.serve.http.settings import Settings
from tarsia.serve.request import AUTO
from tarsia.serve.wire import Model


def permitted(settings: Settings, key: Key) -> None:
    """Raises Refusal (403) where aliases may not be made here, or not by this key."""
    if not settings.loading:
        error = TarsiaError(
            "Adapters are not loaded by request here.", do="the server's owner can allow it (--loading)"
        )
        raise Refusal(403, error, code="loading_off")
    if not key.admin:
        raise Refusal(403, "This key may not load or unload adapters.", code="permission_denied")


def alias(name: str, base: str | None) -> str:
    """A name that may be an alias. Raises Refusal (400)."""
    try:
        check_name(name)
    except LibraryError as error:
        raise Refusal.invalid(error.what, "lora_name", given=shown(name), allowed=error.allowed) from None
    if name in (base, AUTO, CURRENT):
        raise Refusal.invalid("This name means something else here.", "lora_name", given=name)
    return name


def source(path: str, sources: Sequence[str], key: Key) -> str:
    """What the worker loads: a reference whose name the key may use, or a folder's own path below a source.

    Raises Refusal: the same whether something is there or not.
    """
    try:
        reference = Reference.parse(path)
    except LibraryError:
        return _folder(path, sources)
    if not key.may(reference.name):
        raise Refusal.no_source(path)
    return str(reference)


def _folder(path: str, sources: Sequence[str]) -> str:
    if os.path.isabs(path) and "\0" not in path and ".." not in Path(path).parts:
        for allowed in sources:
            if Path(path).is_relative_to(allowed):  # else nothing is asked of the disk
                real = Path(os.path.realpath(path))
                if real.is_relative_to(os.path.realpath(allowed)):
                    return str(real)
    raise Refusal.invalid(
        "An adapter is not loaded from there.",
        "lora_path",
        given=shown(path),
        allowed="a reference of the library, or a folder's whole path below one that the server's owner allowed",
    )


def free(name: str, models: Sequence[Model], *, replace: bool) -> None:
    """Raises Refusal (400) where a name is taken: by an alias that is not to be replaced, or by the library."""
    held = next((model for model in models if model.name == name), None)
    if held is None:
        return
    if held.source is None:
        raise Refusal.invalid("The library has an adapter of this name.", "lora_name", given=name)
    if not replace:
        raise Refusal.invalid(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True.",
            "lora_name",
        )
