"""Which row owns what: never guessed from a size."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tarsia.core.errors import RouteError
from tarsia.core.segments import Route, Segments
from tarsia.core.site import Component, Kind, Role, Site

SITE = Site("tower.q", Component.VISION, Role.Q, 0, Kind.WEIGHT, (4, 4), "tower.q.weight", stream="patches")


def test_owners_in_order() -> None:
    segments = Segments({"rows": (1, 1, 1), "patches": (0, 2, 3)})
    assert segments.owners(SITE, 5).tolist() == [1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "counts,length,says",
    [
        ({"patches": (0, 2, 3)}, 6, "sees 6 entries, but the batch has 5 patches"),
        ({"patches": (1, 1, 1)}, 0, "sees 0 entries"),
        ({"rows": (1, 1, 1)}, 3, "Rows can not be told apart at tower.q"),
        ({}, 3, "stream patches"),
    ],
)
def test_what_does_not_match_is_refused(counts: dict[str, tuple[int, ...]], length: int, says: str) -> None:
    with pytest.raises(RouteError, match=re.escape(says)):
        Segments(counts).owners(SITE, length)


@pytest.mark.parametrize("names", [(), ("a",), ("a", None, "b", None)])
def test_as_many_names_as_rows(names: tuple[str | None, ...]) -> None:
    with pytest.raises(RouteError, match="not of as many rows"):
        Route(names, Segments({"rows": (1, 1, 1), "patches": (0, 0, 3)}))


@given(st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(0, 4)), min_size=1, max_size=6))
def test_groups_share_out_every_entry_once(rows: list[tuple[str | None, int]]) -> None:
    names, counts = (tuple(part) for part in zip(*rows, strict=True))
    route = Route(names, Segments({"patches": counts}))
    groups = route.groups(SITE, sum(counts))
    entries = torch.cat([index for _, index in groups])
    assert sorted(entries.tolist()) == list(range(sum(counts)))
    assert tuple(name for name, _ in groups) == route.order
    owner = [name for name, count in rows for _ in range(count)]
    for name, index in groups:
        assert all(owner[i] == name for i in index.tolist())
