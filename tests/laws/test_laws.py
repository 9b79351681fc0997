"""Every law, for every registered method, on every world."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import laws
from laws.worlds import Case, World, logits, worlds

import tarsia.methods  # noqa: F401 (registers every method)
from tarsia.core.method import METHODS
from tarsia.core.site import Role

TEXT_ONLY = {"law_model_compiles"}  # a whole vision-language model has graph breaks of its own
COMPILED = {("text", "lora"), ("text", "dora"), ("text", "ia3"), ("packed", "loftq")}
"""Where compiling is tried in the quick suite: it takes longest of all laws."""


def _marks(law: str, world: str, method: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if law in TEXT_ONLY and (world, method) not in COMPILED else []


CASES = [
    pytest.param(
        law, world, method, id=f"{name.removeprefix('law_')}-{world}-{method}", marks=_marks(name, world, method)
    )
    for name, law in laws.LAWS.items()
    for world in ("text", "packed", "pictures", "experts")
    for method in sorted(METHODS)
    if (world in ("text", "packed") or name not in TEXT_ONLY) and (world == "packed" or not METHODS[method].corrects)
]


@pytest.mark.parametrize("law,world,method", CASES)
def test_law(law: Callable[[Case], None], world: str, method: str) -> None:
    case = Case(worlds()[world], method)
    if not case.parts():
        pytest.skip(f"{method} has no place in a model of {world}: {case.misfits()}")
    law(case)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_method_is_passed_over(method: str) -> None:
    """A law is skipped in a world where the method has no place: in some world it has one."""
    assert any(Case(world, method).parts() for world in worlds().values())


def _plainest(method: str) -> World:
    return worlds()["packed" if METHODS[method].corrects else "text"]


@pytest.mark.parametrize("method", sorted(METHODS))
@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 37),
    into=st.integers(1, 37),
    lead=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    role=st.sampled_from([Role.Q, Role.DOWN]),
)
def test_any_shape(
    method: str, out: int, into: int, lead: tuple[int, ...], bias: bool, dtype: torch.dtype, role: Role
) -> None:
    laws.law_any_shape(Case(_plainest(method), method), out, into, lead, bias, dtype, role)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_inductor(method: str) -> None:
    case = Case(_plainest(method), method)
    if not case.parts():
        pytest.skip(f"{method} has no place in a model of text: {case.misfits()}")
    compiled, wanted = laws.compiled_whole(case, "inductor")
    laws.check_close(logits(compiled, case.world.inputs), wanted, laws.CLOSE, "without gradients")
