"""What the system says that this process holds in memory, pages of files apart from all else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

STATUS: Final = Path("/proc/self/status")
CLEAR: Final = Path("/proc/self/clear_refs")
PEAK: Final = "5"
"""What sets VmHWM back to what is held now (proc_pid_clear_refs(5))."""


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes of the process that are in memory at one moment, as far as the system has counted them (to some pages)."""

    anonymous: int
    """What was allocated."""
    files: int
    """Pages of files: programs, libraries, and weights that are mapped instead of read."""
    shared: int
    """Memory shared with other processes, that of files in memory too."""

    @property
    def total(self) -> int:
        return self.anonymous + self.files + self.shared


def _status() -> dict[str, int]:
    """The sizes in the process's status, in bytes; none where the system keeps no such file."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in fields}


def resident() -> Resident | None:
    """What the process holds now; None where the system does not tell."""
    held = _status()
    parts = [held.get(name) for name in ("RssAnon", "RssFile", "RssShmem")]
    anonymous, files, shared = parts
    return None if anonymous is None or files is None or shared is None else Resident(anonymous, files, shared)


class Peak:
    """The most that the process held from now on.

    What the system remembers is the peak since the process began. It is set back here, for all who ask; where that is
    not allowed, an older and higher peak hides ours, and nothing is known unless it is passed.
    """

    def __init__(self) -> None:
        self.before = resident()
        try:
            CLEAR.write_text(PEAK)
            self._older = 0
        except OSError:
            self._older = _status().get("VmHWM", 0)

    def read(self) -> int | None:
        """Bytes; None where the system does not tell."""
        peak = _status().get("VmHWM", 0)
        return peak if peak > self._older else None
