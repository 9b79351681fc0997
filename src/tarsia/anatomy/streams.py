"""What sites see along their first dimension, and how many entries of it each row owns.

Counted from ids, pictures as they are given to the model, grids and sizes, never from activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from tarsia.anatomy.table import Config, Counts, Inputs, Packing
from tarsia.core.errors import RouteError

ROWS = "rows"  # one entry a row of the batch, [rows, length, width]
TOKENS = "tokens"  # the rows' tokens end to end, padding too, [rows * length, width]
PICTURES = "pictures"  # one entry a picture; in Mllama padding pictures too
TILES = "tiles"  # one entry a crop that the tower sees as a picture; in Mllama padding tiles too
PATCHES = "patches"  # the patches of all pictures end to end, [patches, width]
MERGED = "merged"  # the same after a merger has joined neighbours: one entry a placeholder


def rows(inputs: Inputs) -> Counts:
    """The streams of the text model. Raises RouteError where ids are missing or the batch has videos."""
    videos = [name for name in inputs if "video" in name and inputs[name] is not None]
    if videos:
        raise RouteError(
            "Rows of a batch with videos can not be told apart yet.",
            given=", ".join(videos),
            do="give all rows one adapter, or run them apart",
        )
    if inputs.get("input_ids") is None:
        raise RouteError(
            "Rows can not be told apart without ids.",
            given=", ".join(inputs),
            allowed="input_ids",
            do="pass input_ids, not embeddings",
        )
    batch, length = inputs["input_ids"].shape
    return {ROWS: (1,) * batch, TOKENS: (length,) * batch}


def along(model: nn.Module, inputs: Inputs) -> Tensor:
    """Positions of a causal decoder with one axis: 0, 1, ... along each row, [rows, length]."""
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


ALONG = Packing(along)
BOTH_WAYS = Packing(None, "its attention looks both ways inside of what is marked by token types, whatever row it is")


def placeholders(config: Config, inputs: Inputs) -> list[int]:
    """How many of each row's ids stand for pictures."""
    return [int(n) for n in (inputs["input_ids"] == config.image_token_id).sum(1)]


def deal(taken: Sequence[int], sizes: Iterable[int]) -> list[list[int]]:
    """The numbers of the pictures that each row owns, in order.

    ``taken``: placeholders of each row; ``sizes``: placeholders that each picture takes, in the order in
    which the model reads the pictures. Raises RouteError unless each row's pictures fill it exactly.
    """
    sizes = list(sizes)
    owned: list[list[int]] = []
    first = 0
    for row, want in enumerate(taken):
        last, have = first, 0
        while have < want and last < len(sizes):
            have += sizes[last]
            last += 1
        if have != want:
            raise RouteError(
                f"Row {row} has {want} picture placeholders, but the pictures that are left do not fill them.",
                given=f"placeholders by row: {list(taken)}; by picture: {sizes}",
                do="give each row as many placeholders as its pictures take, and pass pictures in the rows' order",
            )
        owned.append(list(range(first, last)))
        first = last
    if first != len(sizes):
        raise RouteError(
            f"The batch has {len(sizes)} pictures, but placeholders for {first}.",
            given=f"placeholders by row: {list(taken)}; by picture: {sizes}",
            do="give each picture its placeholders",
        )
    return owned


def sums(owned: Sequence[Sequence[int]], entries: Sequence[int]) -> tuple[int, ...]:
    """How many entries each row owns, where each picture has so many ``entries``."""
    return tuple(sum(entries[picture] for picture in row) for row in owned)


def flat(stream: str, size: Callable[[Config], int]) -> Callable[[Config, Inputs], Counts]:
    """Counts where the tower gets one flat batch of pictures, each of which takes ``size`` placeholders."""

    def counts(config: Config, inputs: Inputs) -> Counts:
        base = rows(inputs)
        pixels = inputs.get("pixel_values")
        total = 0 if pixels is None else len(pixels)
        owned = deal(placeholders(config, inputs), [size(config)] * total)
        return {**base, stream: sums(owned, [1] * total)}

    return counts
