"""docs/museum.md, written from what was seen: ``PYTHONPATH=src:tests:. python -m museum.page`` plants every fault,
and with names of tests behind it those alone.

A row of its table is also a test's golden line: ``test_museum.py`` plants the fault again and compares.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from museum.fault import FAULTS, Fault, Harmless, Reported, Seen

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "museum.md"
ESCAPED: Final = r"\|"
PEERS: Final = ("peft", "transformers", "torch")

STAGES: Final = {
    "attach": "Attaching: do the patches sit where they should?",
    "adapter": "Adapter files: is what was loaded what was trained?",
    "data": "Rows, pictures, templates: what does the loss see?",
    "training": "Training and resuming: is it the run that was asked for?",
    "use": "Using: answers, merging, routing",
}

INTRODUCTION: Final = """\
# The museum of silent failures

Faults that people reported in the field's issue threads, planted in runs of seconds: with PEFT and Transformers, and
with Tarsia. Each row was run by its test, with the fault and without; both columns are what was seen, not what was
read. This page is written by `PYTHONPATH=src:tests:. python -m museum.page`, and `pytest tests/museum` holds it.

- **an error class**: Tarsia refused. Shown is the first sentence; what was given, what is allowed and what to do follow
  it. Where such an error reaches the command line, it exits with 2.
- **reported**: the run went on and told its user, before the first step, in `tarsia lint` or in a report.
- **harmless**: the fault can be planted and has no effect; the test shows that the outcome is the same as without it.

"""

CLOSING: Final = """\
## Not yet

These were reported too, and can not be planted here before what they are about exists. None is counted above.

| what | threads | area |
|---|---|---|
| merging into four bits erases a small change; which base a merge is made on | {merging} | 4-bit bases |
| arithmetic on adapters of unequal ranks, of rsLoRA, of DoRA | {arithmetic} | merging |
| a server that answers with the base where an adapter is unknown or loads as zeros | {serving} | serving |
| vision features of an adapter that was reloaded under its name, from a cache | {stale} | serving |
| paged optimiser states that a resume loses | {paged} | 4-bit bases |
| ranks with rows of unequal modality that wait for each other | {ranks} | several devices |
| memory plans that leave the pictures out | {plans} | planning |
"""
THREADS: Final = {
    "merging": ("huggingface/peft#2321", "huggingface/peft#2586", "unslothai/unsloth#5410"),
    "arithmetic": ("huggingface/peft#3761", "huggingface/peft#3449", "huggingface/peft#1155"),
    "serving": ("vllm-project/vllm#34186", "sgl-project/sglang#28784", "predibase/lorax#58"),
    "stale": ("vllm-project/vllm#44939", "vllm-project/vllm#30931"),
    "paged": ("bitsandbytes-foundation/bitsandbytes#782",),
    "ranks": ("modelscope/ms-swift#6795", "2U1/Qwen-VL-Series-Finetune#57"),
    "plans": ("QwenLM/Qwen3-VL#564", "haotian-liu/LLaVA#1683"),
}


def see(fault: Fault, folder: Path) -> Seen:
    """Run a fault's sound twin, the fault here, and the fault in the peers."""
    folders = [folder / part for part in ("sound", "faulty", "peer")]
    for place in folders:
        place.mkdir()
    tarsia = fault.faulty(folders[1], fault.sound(folders[0]))
    return Seen(peer=fault.observe(folders[2]), tarsia=tarsia)


def row(fault: Fault, seen: Seen) -> str:
    """A fault's line of the table."""
    cells = (fault.name, links(fault.threads), seen.peer, seen.tarsia, f"`{fault.key}`")
    return f"| {' | '.join(cell.replace('|', ESCAPED) for cell in cells)} |"


def links(threads: tuple[str, ...]) -> str:
    """Threads as links; GitHub leads from an issue's number to a pull request where it is one."""
    named = [(thread.partition("/")[2], thread.replace("#", "/issues/")) for thread in threads]
    return ", ".join(f"[{name}](https://github.com/{path})" for name, path in named)


def kept(text: str, fault: Fault) -> Seen | None:
    """What the page says of a fault, if it does."""
    found = re.search(rf"^\| .* \| `{fault.key}` \|$", text, re.MULTILINE)
    if found is None:
        return None
    cells = [cell.replace(ESCAPED, "|") for cell in found[0][2:-2].split(" | ")]
    return Seen(peer=cells[2], tarsia=cells[3])


def versions() -> str:
    """The versions that the page's observations are of."""
    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in PEERS)


def page(seen: dict[str, Seen]) -> str:
    """The whole page."""
    kinds = Counter(kind(fault) for fault in FAULTS.values())
    silent = sum(found.peer.startswith("silent") for found in seen.values())
    counts = (
        f"{len(FAULTS)} faults. Tarsia refuses {kinds['refused']}, reports {kinds['reported']}, and "
        f"{kinds['harmless']} do no harm. PEFT and Transformers say nothing at {silent} of them, not always to "
        "anybody's harm: the column says what came of it.\n\n"
        f"Seen with {versions()}, on a CPU.\n"
    )
    parts = [INTRODUCTION + counts]
    for stage, title in STAGES.items():
        lines = [row(fault, seen[fault.key]) for fault in FAULTS.values() if fault.stage == stage]
        head = "| fault | threads | PEFT with Transformers | Tarsia | test |\n|---|---|---|---|---|"
        parts.append(f"## {title}\n\n{head}\n" + "\n".join(lines) + "\n")
    parts.append(CLOSING.format(**{name: links(threads) for name, threads in THREADS.items()}))
    return "\n".join(parts)


def kind(fault: Fault) -> str:
    """The verdict in a word."""
    return {Harmless: "harmless", Reported: "reported"}.get(fault.verdict, "refused")


def write(keys: Sequence[str] = ()) -> None:
    """Plant every fault, or those of ``keys`` and those that the page lacks, and write the page."""
    text = PAGE.read_text(encoding="utf-8") if keys else ""
    if f"Seen with {versions()}," not in text:
        text = ""  # rows that were seen with other versions do not stand beside new ones
    seen = {key: known for key, fault in FAULTS.items() if key not in keys and (known := kept(text, fault))}
    for key in [key for key in FAULTS if key not in seen]:
        with tempfile.TemporaryDirectory() as folder:
            seen[key] = see(FAULTS[key], Path(folder))
        print(f"{key}: {seen[key].tarsia}")
    PAGE.write_text(page(seen), encoding="utf-8")


if __name__ == "__main__":
    import museum.stages  # noqa: F401 (fills FAULTS)

    write(sys.argv[1:])
