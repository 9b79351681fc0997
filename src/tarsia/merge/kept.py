"""What an exported adapter keeps of what its original does, on the rows of the original's probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tarsia.adapter.host import Host
from tarsia.adapter.proof import TOLERANCE
from tarsia.adapter.value import Adapter, put
from tarsia.core.attach import activate, adapters, detach
from tarsia.core.errors import MergeError
from tarsia.merge.proof import apart, hear

EXACT: Final = 1e-6
"""An error of weights up to here is rounding, and outputs must not differ by more than rounding either."""

_LIVE, _OTHER = "original", "exported"


@dataclass(frozen=True, slots=True)
class Kept:
    """Both adapters beside each other. Differences are of logits, as shares of the largest (``peak``).

    ``moved`` is how far the original leaves its base, ``difference`` how far the exported one leaves the original;
    ``agreement`` is the share of positions where both have the same likeliest token.
    """

    rows: int
    peak: float
    moved: float
    difference: float
    agreement: float


def kept(host: Host, original: Adapter, exported: Adapter, error: float) -> Kept:
    """Compare on the original's probe; ``host`` is left as it was given.

    Raises MergeError where the original has no probe, where the exported one does nothing, and where ``error`` (of the
    weights) is rounding and the outputs differ by more.
    """
    if original.probe is None:
        raise MergeError("The adapter has no probe, so nothing can be compared.", do="--no-proof, or probe it first")
    model: Any = host.model
    inputs = original.probe.inputs
    try:
        put(host, original, _LIVE)
        heard = hear(model, [inputs], model.config.get_text_config().vocab_size)
        activate(model)
        moved = apart(model, heard).largest
        put(host, exported, _OTHER)
        activate(model, _OTHER)
        other = apart(model, heard)
        base = hear(model, [inputs], model.config.get_text_config().vocab_size)
        activate(model)
        still = apart(model, base).largest
    finally:
        for name in (_OTHER, _LIVE):
            if name in adapters(model):
                detach(model, name)
    peak = max(float(one.logits.abs().max()) for one in heard)
    if still == 0 and moved > 0:
        raise MergeError("The exported adapter does nothing: its outputs are the base's.", do="report this")
    found = Kept(len(inputs["input_ids"]), peak, moved / peak, other.largest / peak, other.same / other.positions)
    allowed = TOLERANCE["float32"]
    if error <= EXACT and not found.difference <= allowed:
        raise MergeError(
            "The weights are the same, and the outputs are not.",
            given=f"a logit differs by {found.difference:.3g} of the largest",
            allowed=f"{allowed:g}",
            do="report this, with the versions of torch and transformers",
        )
    return found
