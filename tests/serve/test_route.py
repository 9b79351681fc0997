"""The router: who is chosen, how surely, and what is refused. Each check is seen to fail where it is planted to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tarsia.adapter.prototypes import Look
from tarsia.core.errors import AdapterError, BaseMismatch, ServeError
from tarsia.serve.route import CARD, Router
from tarsia.serve.space import AXES, Space, _leading, _rarity

VIEW = {"version": "1", "weights": "files:0", "resolution": "none"}
WIDTH = 32


def middle(job, width=WIDTH):
    return 2.0 * torch.randn(width, generator=torch.Generator().manual_seed(100 + job))


def pictures(job, count, seed=0, width=WIDTH):
    """Signatures of a job: its middle, noise, and a light that moves all of them alike and far."""
    generator = torch.Generator().manual_seed(1000 * seed + job)
    light = 12 * torch.randn(count, 1, generator=generator) * torch.linspace(-1, 1, width)
    return middle(job, width) + light + torch.randn(count, width, generator=generator)


def card(job, count=64, view=VIEW, width=WIDTH):
    return {CARD: Look.of(view, pictures(job, count, width=width)).plain()}


def made(jobs, **options):
    router = Router(VIEW, **options)
    for job in jobs:
        router.add(f"job-{job}", card(job))
    return router


@pytest.fixture(scope="module")
def ten():
    return made(range(10))


def test_it_chooses_what_a_centroid_does_not(ten):
    centres = torch.stack([pictures(job, 64).mean(0) for job in range(10)])
    right = nearest = 0
    for job in range(10):
        for one in pictures(job, 20, seed=7):
            right += ten.choose([one]).name == f"job-{job}"
            nearest += int(torch.cdist(one[None], centres).argmin()) == job
    assert right >= 190
    assert nearest < 150  # the light hides it


def test_what_none_has_seen_is_nobodys(ten):
    strangers = [ten.choose([one]) for job in range(50, 60) for one in pictures(job, 10, seed=3)]
    assert sum(choice.name is None for choice in strangers) >= 90
    assert {choice.why for choice in strangers} >= {"strange"}
    planted = made(range(10), strange=0.0, unsure=0.0)
    assert all(planted.choose([one]).name for one in pictures(50, 10, seed=3))  # without abstention all are taken


def test_few_of_its_own_are_given_away(ten):
    own = [ten.choose([one]) for job in range(10) for one in pictures(job, 40, seed=5)]
    assert sum(choice.typical < 0.05 for choice in own) <= 0.1 * len(own)
    assert sum(choice.typical < 0.5 for choice in own) >= 0.3 * len(own)  # a p-value, not a word


def test_confidence_is_how_often_it_is_right():
    near = Router(VIEW)
    close = {job: 0.2 * middle(job) for job in range(10)}
    shown = {
        (job, seed): pictures(job, 64, seed=seed) - middle(job) + close[job] for job in range(10) for seed in (0, 1)
    }
    for job in range(10):
        near.add(str(job), {CARD: Look.of(VIEW, shown[job, 0]).plain()})
    found = [(near.choose([one]), job) for job in range(10) for one in shown[job, 1]]
    right = sum(choice.nearest == str(job) for choice, job in found) / len(found)
    said = sum(choice.confidence for choice, _ in found) / len(found)
    assert 0.2 < right < 0.9  # hard enough to be unsure of
    assert abs(said - right) < 0.1
    assert any(choice.why == "unsure" for choice, _ in found)


def test_pictures_of_one_request_count_together(ten):
    ours = list(pictures(4, 3, seed=9))
    assert ten.choose(ours).name == "job-4"
    mixed = ten.choose([*ours, pictures(55, 1, seed=9)[0]])
    assert mixed.name is None and mixed.why == "strange"


def test_no_picture_and_no_adapter_are_the_bases(ten):
    assert (ten.choose([]).name, ten.choose([]).why) == (None, "no picture")
    assert Router(VIEW).choose(list(pictures(0, 1))).why == "no adapter"


def test_only_those_that_may_be_are_chosen(ten):
    shown = [*pictures(3, 1, seed=5)]
    assert ten.choose(shown, {"job-3", "job-4"}).name == "job-3"
    other = ten.choose(shown, {"job-4", "job-5", "nobody"})
    assert other.name is None and {other.nearest, other.runner_up} == {"job-4", "job-5"}
    alone = ten.choose(shown, {"job-3"})
    assert (alone.name, alone.confidence, alone.runner_up) == ("job-3", 1.0, None)
    assert ten.choose(shown, set()).why == ten.choose(shown, {"nobody"}).why == "no adapter"


def test_what_is_no_number_is_told_and_not_compared():
    router = made(range(3))
    router._looks["job-1"].apart.fill_(torch.inf)
    with pytest.raises((ArithmeticError, RuntimeError)):
        router.settle()


def test_one_adapter_alone_still_knows_strangers():
    router = made([3])
    assert sum(router.choose([one]).name == "job-3" for one in pictures(3, 40, seed=2)) >= 34
    assert sum(router.choose([one]).name is None for one in pictures(8, 40, seed=2)) >= 36
    choice = router.choose([pictures(3, 1, seed=2)[0]])
    assert choice.confidence == 1.0 and choice.runner_up is None


def test_coming_and_going_leaves_the_others_as_they_are(ten):
    router = made(range(10))
    asked = [one for job in range(10) for one in pictures(job, 5, seed=6)]
    before = [router.choose([one]) for one in asked]
    router.add("job-20", card(20))
    assert router.choose([pictures(20, 1, seed=6)[0]]).name == "job-20"
    router.remove("job-20")
    for choice, one in zip(before, asked, strict=True):
        again = router.choose([one])
        assert (again.name, again.nearest) == (choice.name, choice.nearest)
        assert again.confidence == pytest.approx(choice.confidence, abs=1e-3)
    assert router.names == tuple(f"job-{job}" for job in range(10))
    router.remove("job-4")
    assert all(router.choose([one]).name != "job-4" for one in pictures(4, 10, seed=6))
    with pytest.raises(ServeError, match="does not know"):
        router.remove("job-4")


def test_an_adapter_in_place_of_another_counts_once():
    router = made(range(6))
    router.add("job-2", card(40))
    fresh = Router(VIEW)
    for job in (0, 1, 3, 4, 5):
        fresh.add(f"job-{job}", card(job))
    fresh.add("job-2", card(40))
    for job in (0, 2, 5, 40):
        one = [pictures(job, 1, seed=8)[0]]
        assert router.choose(one).nearest == fresh.choose(one).nearest
        assert router.choose(one).typical == pytest.approx(fresh.choose(one).typical, abs=1e-3)


def test_the_order_of_adapters_does_not_matter(ten):
    other = made(reversed(range(10)))
    for job in range(10):
        one = [pictures(job, 1, seed=8)[0]]
        assert other.choose(one).nearest == ten.choose(one).nearest


@pytest.mark.parametrize(
    "given,error,words",
    [
        ({}, AdapterError, "'routing' in its card"),
        ({CARD: {"none": "the recipe says routing: 0"}}, AdapterError, "the recipe says routing: 0"),
        ({CARD: {"width": 3}}, AdapterError, "can not be read"),
        (card(1, view={**VIEW, "weights": "files:1"}), BaseMismatch, "weights"),
        (card(1, view={**VIEW, "version": "0"}), BaseMismatch, "version"),
        (card(1, view={**VIEW, "resolution": "448"}), BaseMismatch, "resolution"),
        (card(1, view={"version": "1", "weights": "files:0"}), BaseMismatch, "resolution"),
        (card(1, width=16), AdapterError, "another width"),
    ],
)
def test_a_card_that_can_not_be_compared_is_refused_by_name(given, error, words):
    router = made([0])
    with pytest.raises(error, match="stranger@2") as told:
        router.add("stranger@2", given)
    assert words in str(told.value)
    assert router.names == ("job-0",)


def test_a_signature_of_another_width_is_refused(ten):
    with pytest.raises(ServeError, match="not one of this router"):
        ten.choose([torch.zeros(WIDTH + 1)])


def test_an_adapter_of_two_kinds_of_pictures_is_chosen_for_both():
    router = made(range(4))
    both = torch.stack([pictures(30, 40), pictures(31, 40)], 1).flatten(0, 1)
    router.add("both", {CARD: Look.of(VIEW, both).plain()})
    assert sum(router.choose([one]).name == "both" for job in (30, 31) for one in pictures(job, 20, seed=4)) >= 36


def test_what_is_said_is_json(ten):
    said = ten.choose([pictures(2, 1, seed=1)[0]]).plain()
    assert said["adapter"] == "job-2" and said["why"] == "nearest" and 0 <= said["confidence"] <= 1
    assert set(said) == {"adapter", "confidence", "typical", "why", "nearest", "runner_up"}


@settings(max_examples=15, deadline=None)
@given(jobs=st.integers(1, 9), count=st.integers(8, 40), width=st.integers(3, 70))
def test_any_number_of_adapters_pictures_and_numbers(jobs, count, width):
    looks = {str(job): Look.read(card(job, count, width=width)[CARD]) for job in range(jobs)}
    space = Space.of(looks)
    assert space.axes.shape[0] <= min(AXES, width) and space.axes.shape[1] == width
    found = space.nearest(pictures(0, 2, seed=1, width=width))
    assert 0 <= found.confidence <= 1 and 0 < found.typical <= 1


@pytest.mark.parametrize("count", [4, 16, 500])
def test_a_distance_is_the_rarer_the_farther_it_is(count):
    usual = torch.linspace(0.5, 2.0, count)
    found = [_rarity(usual, units) for units in (0.1, 1.0, 1.9, 2.0, 2.1, 4.0, 40.0)]
    assert found == sorted(found, reverse=True) and found[0] == 1.0
    assert found[4] <= 1 / (1 + count) and found[-1] < 1e-3


def test_the_axes_are_orthonormal():
    rows = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    axes = _leading(rows, 5)
    assert torch.allclose(axes @ axes.T, torch.eye(5), atol=1e-4)
    left = torch.linalg.svd(rows)[2][:5]
    assert torch.allclose((axes @ left.T).abs(), torch.eye(5), atol=1e-3)
