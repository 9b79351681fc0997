"""Text of foreign hands that would act on a terminal is not published, and where it is there, shown as its codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from library import shelved

from tarsia.adapter import save
from tarsia.cli import main, shelf
from tarsia.core.errors import LibraryError
from tarsia.core.visible import visible
from tarsia.library import Library, places
from tarsia.library.cache import Cache
from tarsia.library.remote import Remote

OWNED = "\x1b]0;owned\x07\nfake row"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setenv("TARSIA_LIBRARY", str(tmp_path / "library"))
    save(shelved.adapter(), tmp_path / "sound")
    made = Library.make(tmp_path / "library")
    made.publish(tmp_path / "sound", "cat", who="Zoë 🐈", note="naïve\u00a0: ‏עברית")
    return made


def hostile(folder: Path, text: str = OWNED) -> Path:
    """An adapter whose base and card say more than they should."""
    adapter = shelved.adapter(1, card={f"k{text}": 1, "recipe": {"optimiser": text, text: 2}, "data": {"rows": [text]}})
    save(replace(adapter, base=f"owner/base{text}", card=MappingProxyType(adapter.card)), folder)
    return folder


CODES = (*range(32), 127, 0x85, 0x9B, 0x2028, 0x202E, 0x2066)


def test_every_such_character_is_refused_and_shown(library: Library, tmp_path: Path) -> None:
    texts = [f"a{chr(code)}b" for code in CODES]
    assert all(visible(text).isprintable() and len(visible(text)) >= 4 for text in texts)
    for text in texts:
        for how in ({"who": text}, {"note": text}):
            with pytest.raises(LibraryError, match="can not be kept") as told:
                library.publish(tmp_path / "sound", "dog", **how)
            assert repr(text) in str(told.value)
    for how in ({"who": OWNED}, {"why": OWNED}):
        with pytest.raises(LibraryError, match="can not be kept"):
            library.tag("cat", "stable", **how)


def test_a_hostile_base_is_not_published(library: Library, tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="can not be kept") as told:
        library.publish(hostile(tmp_path / "bad"), "cat", new_base=True)
    assert "\x1b" not in str(told.value)
    assert [version.number for version in library.search(every=True)] == [1]


def test_nor_a_hostile_method(library: Library, tmp_path: Path) -> None:
    path = tmp_path / "sound" / "tarsia.json"
    described: dict[str, Any] = json.loads(path.read_text())
    described.pop("seal", None)
    next(iter(described["patches"].values()))["method"] = OWNED
    path.write_text(json.dumps(described))
    with pytest.raises(LibraryError, match="can not be kept"):
        library.publish(tmp_path / "sound", "dog")


def test_a_hostile_record_of_a_remote_is_not_pulled(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, remote = Library.make(tmp_path / "other"), Remote(f"file://{tmp_path}/far", Cache(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(places, "CONTROL", places.re.compile("(?!)"))
        other.publish(tmp_path / "sound", "dog", who=OWNED)
    remote.push(other, "dog")
    with pytest.raises(LibraryError, match="can not be kept"):
        remote.pull(library, "dog")


def test_what_was_published_before_is_shown_as_codes(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(places, "CONTROL", places.re.compile("(?!)"))
        library.publish(hostile(tmp_path / "bad"), "cat", new_base=True, who=OWNED, note=OWNED)
    for words in (("list",), ("show", "cat"), ("diff", "cat@1", "cat@2"), ("diff", "cat@1", "cat@2", "--json")):
        assert main(["library", *words]) == 0
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "\x07" not in out + err
        assert not [line for line in out.splitlines() if line.startswith("fake")] and "x1b]0;owned" in out.replace(
            "\\u00", "\\x"
        )


def test_names_beside_an_adapter_and_paths_are_shown_as_codes(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sound" / f"x{OWNED}").touch()
    assert main(["library", "add", str(tmp_path / "sound"), "dog"]) == 0
    assert main(["library", "add", str(tmp_path / f"none{OWNED}"), "dog"]) == 2
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\\x1b]0;owned" in out and "\\x1b]0;owned" in err
    shelf.columns(("a",), [(OWNED,)])
    assert capsys.readouterr().out.count("\n") == 2
