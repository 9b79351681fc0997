"""What the rows of a run look like to its base: what a server chooses adapters by is written into the card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from tarsia.adapter.prototypes import FEWEST, Look
from tarsia.adapter.signature import picture_inputs, signature, view
from tarsia.core.errors import TarsiaError
from tarsia.data.samples import Picture
from tarsia.train.run import Run


def looked(run: Run) -> dict[str, Any]:
    """The card's ``routing``: the look of at most ``recipe.routing`` pictures, or {"none": why there is none}."""
    most = run.recipe.routing
    if not most:
        return {"none": "the recipe says routing: 0"}
    found = []
    # the cache of features does not keep what a signature is made of
    with nullcontext() if run.features is None else run.features.suspended():
        try:
            for picture in _pictures(run, most):
                found.append(signature(run.host, picture_inputs(run.host, picture)))
        except TarsiaError as error:  # a run is not lost for what its card can not say
            return {"none": f"{error.what} {error.given or ''}".strip()}
    if len(found) < FEWEST:
        return {"none": f"{len(found)} pictures in the rows that were trained on, of {FEWEST} that are needed"}
    return Look.of(view(run.host), torch.stack(found)).plain()


def _pictures(run: Run, most: int) -> Iterator[Picture]:
    """Pictures of the rows that were trained on, each row once, in the stream's order, which is a shuffled one."""
    seen: set[tuple[int, int]] = set()
    count = 0
    for number in range(run.step * run.recipe.batch * run.recipe.accumulate):
        row = run.mixture.row(number)
        if row in seen:
            continue
        seen.add(row)
        for picture in run.mixture[number].pictures:
            if count == most:
                return
            count += 1
            yield picture
