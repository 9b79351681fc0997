"""How far a plan is off over many runs: medians, 95th percentiles, the worst under-estimate; by family, by method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any, Final

from bench.grid.configurations import HELD_OUT

Line = Mapping[str, Any]
Row = dict[str, float | int | str]

MEASURES: Final[Mapping[str, str]] = {"live": "live bytes", "step": "live bytes in a step", "process": "process"}
"""What is planned and measured: bytes of tensors at most, over the whole run and as the run itself measures its steps;
bytes of the whole process at most."""
ALLOWED: Final[Mapping[str, float]] = {"live": 1.0, "step": 1.0, "process": 3.0}
"""Percent by which a plan may be under what was measured."""


def measured(line: Line, measure: str) -> int:
    """Bytes of a run. Raises KeyError where that was not measured."""
    if measure == "step":
        found: int = line["process"]["memory"]["peak"]
    else:
        found = line[measure]["peak"]
    return found


def error(line: Line, measure: str) -> float:
    """Percent by which the plan is above what was measured; below zero where it is under."""
    planned: int = line["planned"][measure]
    return 100 * (planned / measured(line, measure) - 1)


def spread(errors: Sequence[float], allowed: float) -> Row:
    """Errors in percent as the columns of a row; nothing but their number where there are none."""
    if not errors:
        return {"runs": 0}
    sizes = sorted(map(abs, errors))
    return {
        "runs": len(errors),
        "median %": round(median(sizes), 2),
        "95th percentile %": round(quantiles(sizes, n=20, method="inclusive")[-1] if len(sizes) > 1 else sizes[0], 2),
        "most under %": round(max(0.0, -min(errors)), 2),
        "most over %": round(max(0.0, max(errors)), 2),
        f"under by over {allowed:g} %": sum(e < -allowed for e in errors),
    }


def summary(lines: Sequence[Line]) -> dict[str, Row]:
    """Tables of all runs: the bars, each set, each family, each method; what failed; why draws could not be run."""
    whole = [line for line in lines if "error" not in line]
    table: dict[str, Row] = {}
    sets: Mapping[str, Callable[[Line], bool]] = {
        "all": lambda _: True,
        "seeds built by": lambda line: line["seed"] not in HELD_OUT,
        "seeds never looked at": lambda line: line["seed"] in HELD_OUT,
    }
    for measure, title in MEASURES.items():
        for name, holds in sets.items():
            table[f"bar: {title}, {name}"] = _row(filter(holds, whole), measure)
    for measure in MEASURES:
        for kind, names in (("family", _families), ("method", _methods), ("kind", _kinds)):
            for name in sorted({name for line in whole for name in names(line)}):
                chosen = [line for line in whole if name in names(line)]
                table[f"{kind}_{measure}: {name}"] = _row(chosen, measure)
    table |= {
        f"worst: {MEASURES[m]}, seed {line['seed']}": _told(line, m) for m in MEASURES for line in worst(whole, m)
    }
    table["instruments: run and record of all"] = _instruments(whole)
    table |= {f"failed: seed {line['seed']}": {"error": str(line["error"])} for line in lines if "error" in line}
    drawn = Counter(reason for line in lines for reason in line["configuration"]["redrawn"])
    table |= {f"redrawn: {reason}": {"times": count} for reason, count in drawn.most_common()}
    return table


def worst(lines: Sequence[Line], measure: str, count: int = 3) -> list[Line]:
    """The runs whose plan is furthest off."""
    planned = [line for line in lines if line["planned"][measure] is not None]
    return sorted(planned, key=lambda line: -abs(error(line, measure)))[:count]


def _row(lines: Iterable[Line], measure: str) -> Row:
    chosen = list(lines)
    planned = [line for line in chosen if line["planned"][measure] is not None]
    row = spread([error(line, measure) for line in planned], ALLOWED[measure])
    return row if len(planned) == len(chosen) else row | {"not planned": len(chosen) - len(planned)}


def _families(line: Line) -> list[str]:
    return [line["configuration"]["family"]]


def _methods(line: Line) -> list[str]:
    return list(line["configuration"]["methods"])


def _kinds(line: Line) -> list[str]:
    """What else a run is like."""
    found = line["configuration"]
    bits = "4 bits" if found["four_bits"] else "as the files hold it"
    names = [f"base {bits}", f"computed in {found['precision']}", f"{max(found['pictures'])} pictures"]
    names += [f"resolution {found['resolution']}", f"accumulate {found['accumulate']}", f"rows {found['batching']}"]
    names += [key for key in ("checkpointing", "features") if found[key]]
    return names


def _told(line: Line, measure: str) -> Row:
    found = line["configuration"]
    return {
        "family": found["family"],
        "methods": ", ".join(found["methods"]),
        "planned MB": round(line["planned"][measure] / 1e6, 2),
        "measured MB": round(measured(line, measure) / 1e6, 2),
        "error %": round(error(line, measure), 2),
    }


def _instruments(lines: Sequence[Line]) -> Row:
    """How far the run's own measure of a step is from a record of everything, which begins before loading."""
    apart = []
    for line in lines:
        peaks = line["live"]["peaks"]
        step = max(peaks.get(phase, 0) for phase in ("forward", "backward", "update"))
        apart.append(100 * (measured(line, "step") / step - 1))
    if not apart:
        return {"runs": 0}
    return {"runs": len(apart), "median %": round(median(map(abs, apart)), 3), "most %": round(max(map(abs, apart)), 3)}
