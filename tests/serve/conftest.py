"""Processes that the tests start find the package where the tests do."""

import os
import sys

import pytest


@pytest.fixture(autouse=True)
def _same_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
