"""The command line: quick help without torch, refusals in words, defects with their traceback."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

import tarsia.cli
from tarsia.core.errors import ConfigError

HEAVY = {"torch", "transformers", "numpy", "pyarrow", "datasets", "pydantic", "rich", "PIL", "yaml"}
LIMIT = 0.3  # seconds, of `tarsia --help`
LOOK = """
import json, sys
from tarsia.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def tarsia_(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tarsia", *arguments], capture_output=True, text=True, check=False)


def imported(*arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", LOOK, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def verb(monkeypatch: pytest.MonkeyPatch, action: Callable[[object], int]) -> None:
    """Let ``tarsia doctor`` do something else."""
    monkeypatch.setattr("tarsia.cli.doctor.run", action)


def raising(error: BaseException) -> Callable[[object], int]:
    def action(_: object) -> int:
        raise error

    return action


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["doctor", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    modules = imported(*arguments)
    assert modules & HEAVY == set()
    assert len(modules) < 250


def test_looking_at_imports_sees_torch() -> None:
    assert "torch" in imported("doctor", "--json")


def test_help_is_quick() -> None:
    """The least of several times: other processes may slow this one down, nothing speeds it up."""
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        assert tarsia_("--help").returncode == 0
        best = min(best, time.perf_counter() - began)
        if best < LIMIT:
            return
    pytest.fail(f"tarsia --help takes {best:.2f} s")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tarsia.cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"tarsia {tarsia.__version__}\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["doctr"], ["given:   doctr", "allowed:", "did you mean doctor?"]),
        ([], ["VERB", "tarsia --help"]),
        (["doctor", "--jsn"], ["given:   --jsn", "did you mean --json?"]),
        (["doctor", "--js"], ["given:   --js", "did you mean --json?"]),
        (["doctor", "--quux"], ["given:   --quux", "see tarsia doctor --help"]),
    ],
)
def test_a_misspelt_command_is_refused_in_words(arguments: list[str], words: list[str]) -> None:
    done = tarsia_(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_a_refusal_is_shown_without_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb(monkeypatch, raising(ConfigError("It can not be.", given="this", allowed="that", do="the other")))
    assert tarsia.cli.main(["doctor"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["tarsia: It can not be.", "  given:   this", "  allowed: that", "  to do:   the other"]


def test_a_warning_in_the_log_looks_like_any_notice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def action(_: object) -> int:
        logging.getLogger("tarsia.quant.native").warning("slower than %s", "it could be")
        return 0

    verb(monkeypatch, action)
    for _ in range(2):
        assert tarsia.cli.main(["doctor"]) == 0
        assert capsys.readouterr() == ("", "tarsia: warning: slower than it could be\n")


def test_a_gpu_that_is_too_small_is_told_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    verb(monkeypatch, raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")))
    assert tarsia.cli.main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert "CUDA out of memory" in err and "smaller batch" in err


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    verb(monkeypatch, raising(KeyError("lost")))
    with pytest.raises(KeyError, match="lost"):
        tarsia.cli.main(["doctor"])


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    verb(monkeypatch, raising(KeyboardInterrupt()))
    assert tarsia.cli.main(["doctor"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 10**6], ids=["while flushing", "while printing"])
def test_nobody_reading_is_no_error(size: int) -> None:
    program = (
        "import sys, tarsia.cli, tarsia.cli.doctor as doctor\n"
        f"doctor.run = lambda _: print('x' * {size}) or 0\n"
        "sys.exit(tarsia.cli.main(['doctor']))\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, check=False, env=buffered
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
