"""What the embedded base knows, from its card: held-out rows answered exactly, in percent, and its size.

The rows and the measuring are ``tarsia.base.join``'s own, run once on the finished weights (rounded to bfloat16).
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.run import Values
from tarsia.base import resolve


def measure() -> Values:
    """By source, and the size."""
    folder = Path(resolve("mini-1"))
    card = json.loads((folder / "card.json").read_text(encoding="utf8"))
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    shares = {source: {"measured": round(100 * share, 1)} for source, share in card["held_out_exact"].items()}
    return {
        **shares,
        "millions of parameters": {"measured": round(card["parameters"] / 1e6, 2)},
        "megabytes": {"measured": round(size, 1)},
    }
