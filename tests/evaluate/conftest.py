"""Commands, run in the folder that a file of tests has made: its fixture ``place``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tarsia.cli import main

SAID = ("tarsia", "interrupted", "  ")  # what else stands among the errors are other libraries' remarks


@pytest.fixture
def tarsia(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in ``place``; its exit code, output and errors. Numbers are those of float32 on the CPU."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("tarsia.adapter.host.native_bf16", lambda *_: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, "\n".join(line for line in err.splitlines() if line.startswith(SAID))

    return run
