"""What the system says of this process."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from tarsia.train import process
from tarsia.train.process import Peak, Resident, resident

STATUS = """Name:\tpython
VmPeak:\t    9999 kB
VmHWM:\t     700 kB
VmRSS:\t     600 kB
RssAnon:\t     400 kB
RssFile:\t     150 kB
RssShmem:\t      50 kB
Threads:\t1
"""


@pytest.fixture
def status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A status of a process that may not set its peak back."""
    path = tmp_path / "status"
    path.write_text(STATUS)
    monkeypatch.setattr(process, "STATUS", path)
    monkeypatch.setattr(process, "CLEAR", tmp_path)
    return path


def test_its_parts(status: Path) -> None:
    found = resident()
    assert found == Resident(400 * 1024, 150 * 1024, 50 * 1024)
    assert found.total == 600 * 1024


def test_an_older_peak_hides_ours_until_it_is_passed(status: Path) -> None:
    peak = Peak()
    assert peak.read() is None
    status.write_text(STATUS.replace("     700 kB", "     701 kB"))
    assert peak.read() == 701 * 1024


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STATUS", tmp_path / "missing")
    monkeypatch.setattr(process, "CLEAR", tmp_path / "missing" / "too")
    assert resident() is None
    assert (Peak().before, Peak().read()) == (None, None)


@pytest.mark.skipif(not process.CLEAR.exists(), reason="the system keeps no such file")
def test_the_peak_is_from_now_on() -> None:
    size = 48 << 20

    def take() -> None:
        # the C library may have freed memory at hand, which would show nowhere
        with mmap.mmap(-1, size) as taken:
            for page in range(0, size, mmap.PAGESIZE):
                taken[page] = 1

    take()
    peak = Peak()
    found = peak.read()
    if found is None:
        pytest.skip("the peak can not be set back here")
    assert peak.before is not None
    slack = size // 4
    assert found < peak.before.total + slack
    take()
    after, now = peak.read(), resident()
    assert after is not None and now is not None
    assert peak.before.total + size - slack < after < peak.before.total + size + slack
    assert now.total < after - size + slack
