"""Blocks of keys and values: shared beginnings alone have two owners, nothing is lost, nothing found that is not so."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsia.serve.blocks import Blocks, chain


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32))
def test_rows_that_come_and_go_keep_their_blocks_to_themselves(count: int, size: int, seed: int) -> None:
    draw, blocks = random.Random(seed), Blocks(count, size)
    contents: dict[int, bytes] = {}  # what a reader of the pool would find
    held: list[tuple[list[int], list[bytes]]] = []
    for _ in range(60):
        if held and draw.random() < 0.4:
            taken, keys = held.pop(draw.randrange(len(held)))
            blocks.give(taken)
            continue
        ids = [draw.randrange(2) for _ in range(draw.randrange(1, 3 * size + 2))]
        keys = chain(bytes([draw.randrange(2)]), ids, [-1] * len(ids), [], size, 0)
        found = blocks.find(keys)
        for block, key in zip(found, keys, strict=False):
            assert contents[block] == key, "a block was found by what it does not hold"
        rest = blocks.take(blocks.needed(len(ids)) - len(found))
        if rest is None:
            blocks.give(found)
            continue
        for other, _ in held:
            assert not set(rest) & set(other), "a block was given to two"
        for i, block in enumerate([*found, *rest]):
            if i >= len(found):
                contents[block] = keys[i] if i < len(keys) else b"not full"
                if i < len(keys):
                    blocks.know(block, keys[i])
        held.append(([*found, *rest], keys))
    for taken, _ in held:
        blocks.give(taken)
    assert blocks.available == count
    assert sorted(blocks.take(count) or []) == list(range(count))


def test_taking_too_many_takes_none() -> None:
    blocks = Blocks(3, 4)
    assert blocks.take(4) is None
    assert blocks.available == 3


def test_what_was_used_last_stays_longest() -> None:
    blocks = Blocks(2, 1)
    for key in (b"a", b"b"):
        (block,) = blocks.take(1) or []
        blocks.know(block, key)
        blocks.give([block])
    blocks.give(blocks.find([b"a"]))
    blocks.give(blocks.take(1) or [])
    assert blocks.find([b"a"])
    assert not blocks.find([b"b"])


SAME = (b"adapter", [1, 2, 3, 4], [-1, 0, 0, -1], [b"cat"])


@pytest.mark.parametrize(
    "other",
    [
        (b"another", [1, 2, 3, 4], [-1, 0, 0, -1], [b"cat"]),
        (b"adapter", [1, 2, 3, 5], [-1, 0, 0, -1], [b"cat"]),
        (b"adapter", [1, 2, 3, 4], [-1, 0, 0, -1], [b"dog"]),
        (b"adapter", [1, 2, 3, 4], [-1, 0, -1, -1], [b"cat"]),
    ],
    ids=["adapter", "token", "picture", "place of the picture"],
)
def test_a_key_holds_all_that_a_block_depends_on(other: tuple[bytes, list[int], list[int], list[bytes]]) -> None:
    assert chain(*SAME, size=4, skip=0) != chain(*other, size=4, skip=0)


def test_a_common_beginning_has_common_keys() -> None:
    long = chain(b"a", [1, 2, 3, 4, 5, 6], [-1, 0, 0, -1, 1, 1], [b"cat", b"dog"], 2, 0)
    short = chain(b"a", [1, 2, 3, 4], [-1, 0, 0, -1], [b"cat"], 2, 0)
    assert long[:2] == short


def test_a_lead_shifts_the_blocks() -> None:
    assert len(chain(b"a", [1, 2, 3], [-1] * 3, [], 4, 0)) == 0
    assert len(chain(b"a", [1, 2, 3], [-1] * 3, [], 4, 5)) == 2
