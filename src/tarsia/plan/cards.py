"""Cards that are not here, as their makers describe them: memory, bandwidth, peak arithmetic.

Peaks are dense (without 2:4 sparsity) and, for bfloat16, with sums in float32, which GeForce cards do at half rate.
No training reaches a peak; what share of it is counted on is said in ``PRODUCTS`` and ``MEMORY``, and how far off
that may be in ``ERROR``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Final

from tarsia.core.errors import PlanError

PRODUCTS: Final = 0.55
"""Share of the peak that large products reach; whole trainings on A100 and H100 are reported at 0.3 to 0.6."""
MEMORY: Final = 0.75
"""Share of the bandwidth that element-wise kernels reach."""
KERNEL: Final = 4e-6
"""Seconds that the least kernel takes."""
LAUNCH: Final = 1.2e-5
"""Seconds in which Python and autograd issue one operation: what a step takes at least, however fast the card is."""
ERROR: Final = 0.5
"""How far off a step's time from this table may be, as a share of it, to either side."""


@dataclass(frozen=True, slots=True)
class Card:
    """One card. ``memory`` in bytes is what torch calls its total capacity; rates are per second."""

    name: str
    memory: int
    bandwidth: float
    bf16: float
    fp32: float
    source: str
    seen: bool
    """Whether ``memory`` is the least that was seen in messages of torch; else it is the datasheet's less 3 %, or
    less 8 % where a part keeps corrections of errors (ECC)."""

    @property
    def basis(self) -> str:
        """What a time rests on, in a few words."""
        return f"the table of cards ({self.name}: {self.source}), at {PRODUCTS:.0%} of its peak"


_AMPERE: Final = "NVIDIA Ampere GA102 whitepaper, tables 2 and 3"
_ADA: Final = "NVIDIA Ada whitepaper, appendix A"
_SHEET: Final = "NVIDIA's datasheet"
_GIB: Final = 2**30

# name, memory in GiB, GB/s, TFLOP/s in bfloat16 and float32, source, memory seen
# fmt: off
_TABLE: Final = (
    ("RTX 3060",         11.6,    360,    25.5,  12.7, f"{_SHEET}; bf16 as GA102 does per core", False),
    ("RTX 3090",         23.68,   936,    71.0,  35.6, _AMPERE,                                 True),
    ("RTX 4060 Ti",      15.5,    288,    44.1,  22.1, f"{_SHEET}; bf16 as Ada does per core",  False),
    ("RTX 4070",         11.6,    504,    58.3,  29.1, f"{_SHEET}; bf16 as Ada does per core",  False),
    ("RTX 4080",         15.5,    717,    97.5,  48.7, _ADA,                                    False),
    ("RTX 4090",         23.52,  1008,   165.2,  82.6, _ADA,                                    True),
    ("RTX 5090",         31.36,  1792,   209.5, 104.8, "NVIDIA RTX Blackwell whitepaper, appendix A", True),
    ("A10",              22.0,    600,   125.0,  31.2, _SHEET,                                  False),
    ("A100 40GB",        38.8,   1555,   312.0,  19.5, _SHEET,                                  False),
    ("A100 80GB",        77.6,   2039,   312.0,  19.5, _SHEET,                                  False),
    ("L4",               22.0,    300,   121.0,  30.3, _SHEET,                                  False),
    ("L40S",             44.40,   864,   362.0,  91.6, _SHEET,                                  True),
    ("T4",               14.7,    320,     8.1,   8.1, f"{_SHEET}; no bf16: as float32",         False),
    ("H100",             77.6,   3350,   989.0,  67.0, f"{_SHEET}, SXM",                        False),
    ("H200",            136.0,   4800,   989.0,  67.0, f"{_SHEET}, SXM",                        False),
    ("B200",            178.35,  7672,  2250.0,  75.0, f"{_SHEET}, HGX; bandwidth as its driver says", True),
    ("Jetson Orin 64GB", 61.4,    204.8,  42.5,   5.3, f"{_SHEET}, AGX; memory is the system's too", False),
)
# fmt: on
CARDS: Final = {
    name: Card(name, int(gib * _GIB), bandwidth * 1e9, bf16 * 1e12, fp32 * 1e12, source, seen)
    for name, gib, bandwidth, bf16, fp32, source, seen in _TABLE
}


def find(name: str) -> Card:
    """A card by its name, however it is spaced and cased ("rtx4090", "H100 80GB"). Raises PlanError."""
    wanted = _bare(name)
    found = [card for known, card in CARDS.items() if _bare(known) == wanted]
    found = found or [card for known, card in CARDS.items() if re.fullmatch(rf"{_bare(known)}\d+gb", wanted)]
    if not found:
        near = difflib.get_close_matches(wanted, {_bare(known): known for known in CARDS}, 1, 0.4)
        do = f"did you mean {next(known for known in CARDS if _bare(known) == near[0])}?" if near else None
        raise PlanError("The table of cards does not have this one.", given=name, allowed=", ".join(CARDS), do=do)
    return found[0]


def _bare(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
