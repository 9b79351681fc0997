"""Adapters from elsewhere: folders of PEFT's and repositories of the hub, understood against their base and published.

What PEFT writes names its base and nothing that could prove it. Against the base that the importer gives every tensor
must find its site with the right shape; the adapter then takes that base's fingerprint, and its card says so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from tarsia.adapter import Adapter, Fingerprint, Host, load, open_base, open_outline, save
from tarsia.adapter.files import OURSELVES
from tarsia.adapter.reading import header
from tarsia.core.errors import AdapterError, LibraryError
from tarsia.library import content
from tarsia.library.content import CONFIG, TENSORS
from tarsia.library.store import Library, Published

ON_WORD: Final = "the base that the importer named; names and shapes fit, and nothing in the files proves more"


@dataclass(frozen=True, slots=True)
class Source:
    """Where an adapter's files are: ``folder``; of the hub's also the ``revision``, a commit, that they are of."""

    given: str
    folder: Path
    revision: str | None = None


def arrive(
    library: Library,
    source: str | Path,
    name: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    allow: Collection[str] = (),
    **how: Any,
) -> Published:
    """Publish the adapter in a folder or a repository of the hub (owner/name) as the next version of ``name``.

    One that Tarsia saved is published as it is, once its fingerprint was held to a ``base`` that is given; where it
    has none, a base is refused. One of PEFT's needs its ``base`` (a folder, a hub id or an embedded name); ``allow``
    may say "base name", where that is the right one under another name. ``how`` is ``Library.publish``'s.

    Raises LibraryError where the source is not to be had, AdapterError where the files are not understood or do not
    fit the base, BaseMismatch where they name another one.
    """
    found = fetched(source, revision)
    if (found.folder / OURSELVES).is_file():
        ours = load(found.folder)
        if base is not None:
            if ours.fingerprint is None:
                raise AdapterError(
                    "The adapter does not say which base it was trained on, so it can be held to none.",
                    given=f"{found.given}: no fingerprint; --base {base}",
                    do="leave --base out: it is published as it is, with no fingerprint",
                )
            outline = open_outline(base, processor=False, weights=True)
            ours.fingerprint.check(Fingerprint.of_folder(outline.path), allow=("quantisation",), theirs=outline.name)
        return library.publish(found.folder, name, **{"note": _note(found), **how})
    if base is None:
        raise LibraryError(
            "An adapter that PEFT made is understood only against its base.",
            given=f"{found.given}: no {OURSELVES}",
            do="say which base it was trained on: --base",
        )
    adapter = understood(found, base, allow)
    with tempfile.TemporaryDirectory() as scratch:
        save(adapter, Path(scratch, "adapter"))
        return library.publish(Path(scratch, "adapter"), name, **{"note": _note(found), **how})


def fetched(source: str | Path, revision: str | None = None) -> Source:
    """The folder of a source; of a hub id the adapter's files alone are fetched, never a pickle.

    Raises LibraryError where it is neither a folder nor to be had from the hub.
    """
    text = str(source)
    folder = Path(text).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise LibraryError("A folder has no revisions.", given=f"{text}, revision {revision}", do="leave it out")
        return Source(text, folder)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise LibraryError("There is no such adapter.", given=text, allowed="a folder, or a hub id: owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        place = Path(snapshot_download(text, revision=revision, allow_patterns=list(content.FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LibraryError(
            "The adapter is neither a folder here nor to be had from the hub.",
            given=f"{text}: {first}",
            do="check the name and the connection, or give a folder",
        ) from None
    # the hub's cache names a snapshot's folder by its commit
    return Source(text, place, place.name)


def understood(source: Source, base: str, allow: Collection[str] = ()) -> Adapter:
    """PEFT's adapter against its base, whose fingerprint it takes; where it is from is on its card."""
    host = _host(source.folder, base)
    adapter = load(source.folder, host, allow=allow)
    # the card of a foreign adapter says that its base is not known, and this one's now is
    card = {key: value for key, value in adapter.card.items() if key not in ("base", "base_name")}
    origin = _origin(source) | {"base_name": adapter.base, "base": ON_WORD}
    return replace(
        adapter, base=host.name, fingerprint=host.fingerprint, card=MappingProxyType({**card, "origin": origin})
    )


def _host(folder: Path, base: str) -> Host:
    """The base: without weights where the adapter's tensors are all factors, which are held to names and shapes."""
    if not (folder / TENSORS).is_file() or any(".lora_" not in key for key in header(folder / TENSORS)[0]):
        return open_base(base, dtype="auto", processor=False)
    outline = open_outline(base, processor=False, weights=True)
    return Host(
        name=outline.name,
        path=outline.path,
        model=outline.model,
        processor=None,
        anatomy=outline.anatomy,
        sites=outline.sites,
        fingerprint=Fingerprint.of_folder(outline.path),
    )


def _origin(source: Source) -> dict[str, Any]:
    files = {name: content.hashed(source.folder / name).sha256 for name in (CONFIG, TENSORS)}
    return {"made_by": "PEFT", "source": source.given, "revision": source.revision, "sha256": files}


def _note(source: Source) -> str:
    return f"imported from {source.given}" + (f" at {source.revision}" if source.revision else "")
