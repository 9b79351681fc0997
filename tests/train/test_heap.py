"""Memory that is kept: what the C library is told, and what it is told afterwards."""

from __future__ import annotations

import ctypes
import platform
from types import SimpleNamespace

import pytest

from tarsia.train.heap import LARGEST, MMAP, NEVER, TRIM, USUAL, kept_heap


@pytest.fixture
def told(monkeypatch):
    """What a C library is told that takes blocks of up to so many bytes."""

    def library(most):
        calls = []

        def mallopt(what, value):
            calls.append((what, value))
            return int(what != MMAP or value <= most)

        fake = SimpleNamespace(mallopt=mallopt, malloc_trim=lambda pad: calls.append("trim"))
        monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
        monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
        return calls

    return library


@pytest.mark.parametrize("most", [2**40, 2**25])
def test_memory_is_kept_inside_and_given_back(told, most):
    calls = told(most)
    memory = kept_heap()
    assert memory.__enter__()
    assert calls[-2:] == [(MMAP, next(size for size in LARGEST if size <= most)), (TRIM, NEVER)]
    assert not memory.__exit__(KeyError, KeyError(), None)
    assert calls[-3:] == [*USUAL.items(), "trim"]


def test_what_can_not_be_told_is_said(told, monkeypatch):
    told(0)
    with kept_heap() as kept:
        assert not kept
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with kept_heap() as kept:
        assert not kept
