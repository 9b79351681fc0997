"""The most memory that a run's process holds on a processor: what stands beside its tensors, phase by phase.

Tensors are the rehearsal's. Beside them stand the program itself, which is measured in the process that plans; what a
run makes it load more; weights that are mapped from their files; and the room between blocks that the C library keeps.

That room follows from no rule. glibc lays a tensor on a boundary of 64 bytes and cuts off what lies before and behind;
pieces so small go to whatever asks next for a few bytes, and where one is still held, the room beside it is too small
for the next tensor of the same size. Which pieces are held differs from run to run: the same run took 1016 to 1106 MB,
another 1927 to 2208 MB. A simulation of the library on the rehearsal's blocks (best fit, coalescing, top of the heap)
finds 5 to 10 % of room where there really is 15 to 100 %; with one piece in 20 held at random it finds the mean, and no
more than that. So the share of room is a number of its own here, `ROOM`.
"""

from __future__ import annotations

import platform
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tarsia.plan.ledger import Category
from tarsia.plan.loading import told
from tarsia.train.memory import Phase
from tarsia.train.process import resident

if TYPE_CHECKING:
    from tarsia.plan.foretell import Plan

LIBRARIES: Final = 36_000_000
"""Pages of torch's libraries that kernels touch and imports do not (torch 2.13 for processors, x86-64: 33 to 38 MB)."""
CODE: Final = 12_000_000
"""What is imported and built for a base and its patches: Python's objects, beside their tensors (8 to 16 MB)."""
WORD: Final = 880
"""Bytes of a tokenizer for each entry of its vocabulary (740 to 1050 over 20 tokenizers)."""
PRODUCTS: Final = 22_000_000
"""What MKL and oneDNN keep for products of matrices, on one thread (12 to 24 MB in steps)."""
PROBED: Final = 30_000_000
"""What they keep more for the probe, whose products are with all rows of the head (20 to 45 MB)."""
DISTINCT: Final = 50
"""Different tokens of a row, for the rows of a mapped table of embeddings that are ever read."""
IN_STEP: Final = tuple(Phase)
PERSISTENT: Final = (Category.WEIGHTS, Category.QUANTISED)


@dataclass(frozen=True, slots=True)
class Room:
    """Shares of the bytes that come and go in steps: ``kept`` stands beside them in the heap, ``left`` after steps."""

    kept: float
    left: float


ROOM: Final[Mapping[str, Room]] = {"glibc": Room(0.33, 0.40), "": Room(0.10, 0.10)}
"""By the C library. glibc keeps what is freed (`tarsia.train.heap`); of others (musl, macOS) nothing was measured."""


@dataclass(frozen=True, slots=True)
class Process:
    """Bytes of the process: the most of each phase, and the parts of the highest one."""

    phases: Mapping[str, int]
    parts: Mapping[str, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: self.phases[name])


def standing() -> int:
    """Bytes that this process holds now; where the system does not tell, the most that it ever held."""
    found = resident()
    if found is not None:
        return found.total
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def process(plan: Plan, before: int) -> Process:
    """What the process will hold at most, of which ``before`` bytes are there before the run begins."""
    begin = next(stretch.begin for stretch in plan.stretches if stretch.phase in IN_STEP)
    there = plan.at(begin - 1)
    weights = sum(there.get(category, 0) for category in PERSISTENT)
    program = {
        "before the run": before,
        "libraries": LIBRARIES,
        "code": CODE,
        "tokenizer": WORD * plan.rehearsal.vocabulary,
        "kept by kernels": PRODUCTS,
        "weights": weights - _unread(plan, there.get(Category.WEIGHTS, 0)),
    }
    moving = {name: max(0, peak - weights) for name, peak in plan.phases.items()}
    room = ROOM.get(platform.libc_ver()[0], ROOM[""])
    program["left of preparing"] = round(room.left * max(0, moving.get("prepare", 0) - sum(there.values()) + weights))
    most = max(peak for name, peak in moving.items() if name in IN_STEP)
    phases: dict[str, dict[str, int]] = {"loading": _loading(plan, before, weights)}
    for name, peak in moving.items():
        if name in IN_STEP:
            phases[name] = {**program, "tensors": peak, "room between blocks": round(room.kept * peak)}
        elif name not in NOT_MODELLED:
            kernels = {"kept by kernels": PRODUCTS + (PROBED if name == "save" else 0)}
            phases[name] = {**program, **kernels, "tensors": peak, "room between blocks": round(room.left * most)}
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    return Process(totals, phases[max(totals, key=lambda name: totals[name])])


NOT_MODELLED: Final = ("load", "prepare")
"""Phases of the rehearsal that are not the run's own way: weights come from files, one after the other."""


def _loading(plan: Plan, before: int, weights: int) -> dict[str, int]:
    """Every byte of the files is read once, beside what is made of it; mapped weights only as they are used."""
    if mapped(plan) and Category.QUANTISED not in plan.categories:
        return {"before the run": before, "code": CODE}
    return {"before the run": before, "code": CODE, "weights": weights, "files": _files(plan)}


def mapped(plan: Plan) -> bool:
    """Whether weights that are not in 4 bits stay in their files, since these hold them as they are computed with."""
    return told(plan.outline.path) is plan.rehearsal.dtype


def _files(plan: Plan) -> int:
    """Bytes of the weights' files; of a base that is not here yet, as many as its numbers take in their dtype."""
    here = sum(path.stat().st_size for path in plan.outline.path.glob("*.safetensors"))
    return here or plan.rehearsal.parameters * told(plan.outline.path).itemsize


def _unread(plan: Plan, weights: int) -> int:
    """Bytes of a mapped table of embeddings whose rows no token asks for."""
    config = plan.outline.anatomy.config
    text = config.get_text_config()
    if not mapped(plan) or config.tie_word_embeddings or text.tie_word_embeddings:
        return 0
    table: int = text.vocab_size * text.hidden_size * plan.rehearsal.dtype.itemsize
    read = min(1.0, DISTINCT * plan.survey.all_draws / text.vocab_size)
    return min(weights, int(table * (1 - read)))
