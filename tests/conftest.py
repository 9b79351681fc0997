"""The kernel for 4-bit weights is that of the sources here, compiled anew where it is not; a cache of our own."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

from tarsia.quant import build


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    # what runs keep for their user is not the suite's to write
    os.environ["TARSIA_CACHE"] = config.stash[CACHE] = tempfile.mkdtemp(prefix="tarsia-cache-")
    library = build.KERNELS / build.LIBRARY
    try:
        if not library.exists() or not build.fresh(library):
            build.build()
    except build.BuildError as error:
        # the tests of the kernel fail or are skipped, each for its reason; the others run on the reference
        config.stash[REASON] = str(error)


def pytest_unconfigure(config: pytest.Config) -> None:
    if CACHE in config.stash:
        shutil.rmtree(config.stash[CACHE], ignore_errors=True)


CACHE = pytest.StashKey[str]()
REASON = pytest.StashKey[str]()


def pytest_report_header(config: pytest.Config) -> str | None:
    reason = config.stash.get(REASON, None)
    return None if reason is None else f"4-bit kernel: not built: {reason}"
