"""The kernels are those of the sources here, compiled anew where they are not; a cache of our own."""

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
    try:
        for library in build.LIBRARIES:
            if not library.path.exists() or not library.fresh():
                build.build(library)
    except build.BuildError as error:
        # the tests of the kernels fail or are skipped, each for its reason; the others run on the reference
        config.stash[REASON] = str(error)


def pytest_unconfigure(config: pytest.Config) -> None:
    if CACHE in config.stash:
        shutil.rmtree(config.stash[CACHE], ignore_errors=True)


CACHE = pytest.StashKey[str]()
REASON = pytest.StashKey[str]()


def pytest_report_header(config: pytest.Config) -> str | None:
    reason = config.stash.get(REASON, None)
    return None if reason is None else f"a kernel is not built: {reason}"
