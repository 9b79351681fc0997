"""What a picture looks like to a base: a few statistics of its own vision tower's states, whoever asks.

    signature(host, inputs) -> Tensor[width]     # one picture's inputs, one pass of the bare base's tower
    pooled(outputs) -> Tensor[width]             # the same, of such a pass that was made anyway

They are the mean and the standard deviation over a picture's patches of the tower's states at ``DEPTHS``: channel
statistics say what a picture looks like, wherever in it (arXiv:1703.06868, section 3). Nothing of it depends on an
adapter or on the pictures beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from tarsia.adapter.host import Host
from tarsia.core.attach import activate, slots
from tarsia.core.errors import AdapterError
from tarsia.data import Encoder
from tarsia.data.samples import PICTURE, Message, Picture, Sample

VERSION: Final = 1
"""Of what a signature is. Signatures of different versions are never compared."""
DEPTHS: Final = (1 / 3, 2 / 3, 1.0)
"""At which shares of the tower's layers its states are looked at."""
SAME: Final = ("weights", "architecture", "quantisation", "processor")
"""The parts of a base's fingerprint that its view of a picture depends on."""


def view(host: Host) -> dict[str, str]:
    """All that a signature depends on besides the picture, as texts by name: two of equal views can be compared."""
    held = {part: str(getattr(host.fingerprint, part)) for part in SAME}
    return {"version": str(VERSION), **held, "resolution": str(host.resolution or "none")}


def signature(host: Host, inputs: Mapping[str, Tensor]) -> Tensor:
    """[width] float32 on the CPU: the signature of the one picture that ``inputs`` hold, as the processor gives them.

    What of ``inputs`` is not the vision side's is not looked at. Adapters that are installed do not act. Raises
    AdapterError where the family's tower can not be called apart, or tells no states.
    """
    model: Any = host.model
    call = getattr(model, "get_image_features", None)
    if call is None:
        raise _blind(host, "it has no get_image_features")
    known = inspect.signature(call).parameters
    first = next(p for p in model.parameters() if p.is_floating_point())
    given = {
        name: value.to(first.device, first.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
        if name in known
    }
    before = [(slot, slot.active, slot.route) for slot in slots(model)]
    mode = model.training
    try:
        activate(model)
        model.eval()
        with torch.no_grad():
            outputs = call(**given, output_hidden_states=True)
    finally:
        model.train(mode)
        for slot, active, route in before:
            slot.active, slot.route = active, route
    if getattr(outputs, "hidden_states", None) is None:
        raise _blind(host, "its tower tells no hidden states")
    return pooled(outputs)


def pooled(outputs: Any) -> Tensor:
    """[width] float32 on the CPU, of a bare tower's ``outputs`` (with ``hidden_states``) for one picture and its tiles.

    ``width`` is 2 * len(DEPTHS) times the tower's. Raises AdapterError where a state is no number.
    """
    states = outputs.hidden_states
    parts = []
    for depth in DEPTHS:
        state = states[round(depth * (len(states) - 1))]
        patches = state.detach().float().reshape(-1, state.shape[-1])
        parts += [patches.mean(0), patches.std(0, unbiased=False)]
    found = torch.cat(parts).cpu()
    if not bool(found.isfinite().all()):
        raise AdapterError(
            "The vision tower's states for a picture are no numbers.",
            do="open the base in float32, or take the picture out",
        )
    return found


def picture_inputs(host: Host, picture: Picture) -> dict[str, Tensor]:
    """What the base's processor makes of one picture alone, for ``signature``. Raises DataError as ``Encoder`` does."""
    asked = Message("user", (PICTURE, "?"))
    sample = Sample((asked, Message("assistant", ("!",))), (picture,), picture.source, picture.row)
    encoder = Encoder(host.processor, variables=host.variables, resolution=host.resolution)
    return encoder.batch([sample]).inputs


def _blind(host: Host, why: str) -> AdapterError:
    return AdapterError(
        "This base's pictures have no signature.",
        given=f"{host.name} ({host.anatomy.name}): {why}",
        do="set routing: 0 in the recipe, and name the adapter in requests",
    )
