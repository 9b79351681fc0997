"""The caching allocator on sizes: sequences by hand, and laws that any sequence keeps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tarsia.plan.allocator import GRAIN, LARGE_SEGMENT, MIB, SMALL_SEGMENT, Allocator, replay, rounded, segment_of
from tarsia.plan.ledger import Block


@pytest.mark.parametrize(
    "size, takes, segment",
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 1, 10 * MIB, 10 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
    ],
)
def test_requests_are_rounded_and_segments_made_for_them(size, takes, segment):
    device = Allocator()
    device.allocate(size)
    assert rounded(size) == takes
    assert segment_of(takes) == segment == device.reserved
    # what is over in the large pool is cut off above 1 MiB alone
    over = segment - takes
    assert device.allocated == (takes if takes <= MIB or over > MIB else segment)


def test_small_requests_share_a_segment_and_large_ones_another():
    device = Allocator()
    for _ in range(4):
        device.allocate(512 * 1024)
    assert device.reserved == 2 * MIB
    device.allocate(1)
    assert device.reserved == 4 * MIB
    device.allocate(3 * MIB)
    assert (device.allocated, device.reserved) == (5 * MIB + 512, 24 * MIB)


def test_the_smallest_that_holds_it_is_taken_and_the_lowest_of_equals():
    device = Allocator()
    held = [device.allocate(size * MIB) for size in (4, 2, 6, 2, 4, 2)]  # 20 MiB, full
    assert device.reserved == LARGE_SEGMENT
    for n in (0, 2, 4):
        device.free(held[n])
    assert device.allocate(4 * MIB) == held[0]
    assert device.allocate(4 * MIB - 512) == held[4]
    assert device.allocate(5 * MIB) == held[2]
    assert device.reserved == LARGE_SEGMENT


def test_a_rest_of_a_mebibyte_is_not_cut_off():
    device = Allocator()
    held = [device.allocate(4 * MIB) for _ in range(5)]
    device.free(held[1])
    device.allocate(3 * MIB)
    assert device.allocated == 20 * MIB
    device.free(held[1])
    device.allocate(3 * MIB - GRAIN)
    assert device.allocated == 19 * MIB - GRAIN


def test_neighbours_merge_and_segments_do_not():
    device = Allocator()
    first = [device.allocate(10 * MIB) for _ in range(2)]
    assert device.reserved == 20 * MIB
    for address in first:
        device.free(address)
    device.allocate(20 * MIB)  # two segments of 10 MiB never are one of 20
    assert device.reserved == 40 * MIB
    inside = [device.allocate(5 * MIB) for _ in range(4)]
    assert device.reserved == 40 * MIB
    for order in ((0, 1), (3, 2)):  # after the one before it, and after the one behind it
        for n in order:
            device.free(inside[n])
        device.allocate(10 * MIB)
        assert device.reserved == 40 * MIB


def test_expandable_segments_grow_at_their_end():
    device = Allocator(expandable=True)
    first, second = device.allocate(12 * MIB), device.allocate(20 * MIB)
    assert device.reserved == 40 * MIB
    device.free(first)
    device.allocate(13 * MIB)  # the hole is too small; 8 MiB are over behind the second, and 20 more are mapped
    assert (device.allocated, device.reserved) == (33 * MIB, 60 * MIB)
    device.free(second)
    device.allocate(32 * MIB)
    assert device.reserved == 60 * MIB
    plain = Allocator()
    for size in (12, 20):
        plain.allocate(size * MIB)
    assert plain.reserved == 32 * MIB
    assert device.allocate(1)
    assert device.reserved == 62 * MIB


def test_what_can_grow_is_taken_last():
    device = Allocator(expandable=True)
    held = [device.allocate(size * MIB) for size in (6, 2, 8)]  # 4 MiB are over at the end
    device.free(held[0])
    assert device.allocate(3 * MIB) == held[0]
    assert device.allocate(4 * MIB) == held[2] + 8 * MIB
    assert device.reserved == LARGE_SEGMENT


def test_nothing_is_handed_out_of_no_size_nor_taken_back_twice():
    device = Allocator()
    with pytest.raises(ValueError, match="0 bytes"):
        device.allocate(0)
    address = device.allocate(1)
    device.free(address)
    with pytest.raises(KeyError):
        device.free(address)


steps = st.lists(st.tuples(st.integers(1, 30 * MIB), st.integers(0, 8)), max_size=60)


@given(steps, st.booleans())
def test_what_is_live_is_allocated_and_what_is_allocated_reserved(steps, expandable):
    device = Allocator(expandable)
    held: list[tuple[int, int]] = []
    for size, victim in steps:
        if victim < len(held):
            device.free(held.pop(victim)[0])
        address = device.allocate(size)
        assert all(address >= begin + length or address + size <= begin for begin, length in held)
        held.append((address, size))
        live, grains = sum(length for _, length in held), sum(rounded(length) for _, length in held)
        assert live <= grains <= device.allocated <= grains + MIB * len(held)
        assert device.allocated <= device.reserved
        if expandable:
            assert device.allocated == grains
    for address, _ in held:
        device.free(address)
    assert device.allocated == 0
    assert device.most_allocated <= device.most_reserved == device.reserved


@given(steps, st.booleans())
def test_the_same_again_and_again_takes_no_more_at_last(steps, expandable):
    device = Allocator(expandable)
    sizes = [size for size, _ in steps]
    for _ in range(6):  # blocks that were split another way may fit worse for a while
        reserved = device.reserved
        held = [device.allocate(size) for size in sizes]
        for address in held:
            device.free(address)
    assert reserved == device.reserved


def test_blocks_are_replayed_in_the_order_of_their_moments():
    lives = [(8, 0, 9), (4, 1, 2), (4, 3, 4), (0, 5, 9)]
    blocks = [Block(size * MIB, born, "", "", died) for size, born, died in lives]
    assert replay(blocks, 6) == replay(blocks[::-1], 6)
    assert (replay(blocks, 6).allocated, replay(blocks, 6).reserved) == (12 * MIB, LARGE_SEGMENT)
    assert replay(blocks, 0).allocated == 8 * MIB
    assert replay(blocks, 6, first=(100,)).reserved == LARGE_SEGMENT + SMALL_SEGMENT
