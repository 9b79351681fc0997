"""Whose turn it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from tarsia.serve.schedule import Queue


@dataclass(eq=False)
class One:
    tenant: str
    weight: float = 1.0
    cost: int = field(default=10)


def served(queue: Queue[One], steps: int) -> list[One]:
    out = []
    for _ in range(steps):
        one = next(queue.turns(), None)
        if one is None:
            break
        queue.begin(one)
        queue.charge(one.tenant, one.cost)
        queue.end(one)
        out.append(one)
    return out


def test_who_asks_much_does_not_keep_others_waiting() -> None:
    queue: Queue[One] = Queue()
    for _ in range(50):
        queue.add(One("loud"))
    queue.add(One("quiet"))
    assert "quiet" in [one.tenant for one in served(queue, 2)]


def test_shares_follow_weights() -> None:
    queue: Queue[One] = Queue()
    for _ in range(300):
        queue.add(One("three", 3.0))
        queue.add(One("one", 1.0))
    found = [one.tenant for one in served(queue, 200)]
    assert 145 <= found.count("three") <= 155


def test_nobody_saves_up_while_away() -> None:
    queue: Queue[One] = Queue()
    for _ in range(100):
        queue.add(One("here"))
    served(queue, 50)
    for _ in range(100):
        queue.add(One("late"))
    found = [one.tenant for one in served(queue, 40)]
    assert found.count("late") <= 21


def test_within_a_tenant_the_oldest_comes_first_and_who_can_not_begin_is_passed() -> None:
    queue: Queue[One] = Queue()
    ones = [One("a") for _ in range(4)]
    for one in ones:
        queue.add(one)
    begun = []
    for one in queue.turns():
        if one is ones[1]:
            continue
        queue.begin(one)
        begun.append(one)
    assert begun == [ones[0], ones[2], ones[3]]
    assert list(queue) == [ones[1]]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), max_size=40))
def test_every_request_has_its_turn_once(asked: list[tuple[str, int]]) -> None:
    queue: Queue[One] = Queue()
    ones = [One(tenant, 1.0, cost) for tenant, cost in asked]
    for one in ones:
        queue.add(one)
    found = served(queue, 100)
    assert sorted(map(id, found)) == sorted(map(id, ones))
    assert not len(queue)


def test_who_must_begin_again_comes_before_its_tenant_s_others() -> None:
    queue: Queue[One] = Queue()
    ones = [One("a") for _ in range(3)]
    for one in ones:
        queue.add(one)
    queue.begin(ones[0])
    queue.begin(ones[1])
    queue.again(ones[1])
    queue.again(ones[0])
    assert list(queue) == ones
    assert served(queue, 5) == ones


def test_what_is_dropped_does_not_come() -> None:
    queue: Queue[One] = Queue()
    ones = [One("a"), One("b"), One("a")]
    for one in ones:
        queue.add(one)
    assert queue.drop(lambda one: one is ones[0]) == [ones[0]]
    assert {id(one) for one in served(queue, 10)} == {id(ones[1]), id(ones[2])}
