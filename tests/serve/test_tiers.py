"""Room for pages: never more than the budget, nothing that is pinned goes, the least recently used goes first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tarsia.serve.tiers import Tier

STEPS = st.lists(st.tuples(st.sampled_from("wprt"), st.integers(0, 5), st.integers(0, 60)), max_size=60)


@given(STEPS)
def test_the_budget_holds_and_pins_hold(steps: list[tuple[str, int, int]]) -> None:
    gone: list[int] = []
    tier: Tier[int, int] = Tier(100, gone.append)
    pins: dict[int, int] = {}
    for what, key, count in steps:
        before = tier.order()
        if what == "w" and key not in tier:
            had = [one for one in before if not pins.get(one)]
            if tier.reserve(key, count):
                pins[key] = 1
                tier.put(key, key, count - count // 3)
                lost = [one for one in before if one not in tier]
                assert lost == had[: len(lost)], "the least recently used first, and none that is pinned"
            else:
                assert tier.order() == before and count > tier.budget - tier.pinned
        elif what == "p" and key in tier:
            tier.pin(key)
            pins[key] += 1
        elif what == "r" and pins.get(key):
            tier.release(key)
            pins[key] -= 1
        elif what == "t" and key in tier:
            assert tier.get(key) == key and tier.order()[-1] == key
        assert 0 <= tier.pinned <= tier.bytes <= tier.budget
        assert tier.bytes == sum(tier._held[one].bytes for one in tier.order())
        assert tier.pinned == sum(held.bytes for held in tier._held.values() if held.pins)
        assert all(one in tier for one, held in pins.items() if held)
        pins = {one: held for one, held in pins.items() if one in tier}


def test_misuse_raises() -> None:
    tier: Tier[str, int] = Tier(10)
    assert tier.reserve("a", 4)
    with pytest.raises(ValueError, match="there already"):
        tier.reserve("a", 1)
    with pytest.raises(ValueError, match="more than the 4"):
        tier.put("a", 1, 5)
    tier.release("a")
    with pytest.raises(ValueError, match="not pinned"):
        tier.release("a")
    assert not tier.reserve("b", 11)
