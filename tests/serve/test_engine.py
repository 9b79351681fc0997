"""The engine: whatever comes and goes beside it, a row says what it says alone."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from served import asked, engine, ids, served

from tarsia.core.errors import ServeError
from tarsia.serve.engine import Engine, run
from tarsia.serve.request import Event, Prompt, Request

LONGEST = 24
TOKEN = 3 * 2 * 2 * 8 * 4
"""Bytes of a token's keys and values in the tiny LLaVA: layers, both, heads, width, float32."""
NAMES = (None, "low", "dora", "neck", "projector", "prompt", "prefix")


def said_alone(serving: Engine, request: Request) -> list[int]:
    serving.blocks.clear()
    found = ids(run(serving, [request])[request.id])
    serving.blocks.clear()
    return found


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str | None, int], list[int]]:
    one = served("llava")
    serving = engine(one.pages(), rows=1, chunk=1000)
    rows = [(name, row) for name in NAMES for row in range(len(one.prompts))]
    return {(n, r): said_alone(serving, asked(one.prompts[r], n, LONGEST)) for n, r in rows}


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.integers(0, 2**32), st.integers(1, 7), st.integers(1, 60), st.integers(2, 9), st.integers(8, 60))
def test_rows_that_come_and_go_change_nothing(
    expected: dict[tuple[str | None, int], list[int]], seed: int, rows: int, chunk: int, block: int, more: int
) -> None:
    one, draw = served("llava"), random.Random(seed)
    # room for the longest row and little more, so that some wait for blocks of others, and give their own
    room = (max(len(prompt.ids) for prompt in one.prompts) + LONGEST + more) * TOKEN
    serving = engine(one.pages(), rows=rows, chunk=chunk, block=block, cache_bytes=room)
    wanted = {}
    for _ in range(14):
        name, row = draw.choice(NAMES), draw.randrange(len(one.prompts))
        tokens = draw.randint(1, LONGEST)
        request = replace(asked(one.prompts[row], name, tokens), tenant=draw.choice("ab"))
        wanted[request.id] = request, expected[name, row][:tokens]
    waiting, gone, told = list(wanted), set[str](), dict[str, list[Event]]()
    while waiting or not serving.idle:
        while waiting and draw.random() < 0.5:
            serving.submit(wanted[waiting.pop()][0])
        for event in serving.step():
            assert event.id not in gone, "something was said of a request that nobody waits for"
            told.setdefault(event.id, []).append(event)
        running = [id_ for id_, events in told.items() if events[-1].kind != "done" and id_ not in gone]
        if running and draw.random() < 0.05:
            gone.add(left := draw.choice(running))
            serving.cancel(left)
    for id_, (_, ids_) in wanted.items():
        if id_ not in gone:
            assert ids(told[id_]) == ids_
    assert serving.blocks.available == serving.blocks.count


def test_a_prompt_that_was_read_before_is_not_read_again_and_says_the_same() -> None:
    one = served("llava")
    serving = engine(one.pages())
    first, again, other = (asked(one.prompts[2], name, 6) for name in ("low", "low", "dora"))
    before = ids(run(serving, [first])[first.id])
    read = serving.stats()["prompt_tokens"]
    events = run(serving, [again])[again.id]
    assert ids(events) == before
    assert events[0].data["cached_tokens"] >= len(again.prompt.ids) - serving.blocks.size
    assert serving.stats()["picture_misses"] == len(first.prompt.pictures)
    assert run(serving, [other])[other.id][0].data["cached_tokens"] == 0, (
        "another adapter's keys were taken for its own"
    )
    assert serving.stats()["prompt_tokens"] == 3 * read


def test_a_picture_under_an_adapter_of_the_vision_side_is_not_another_s() -> None:
    one = served("llava")
    serving = engine(one.pages())
    asks = [asked(one.prompts[1], name, 4) for name in (None, "high", "low", None, "high")]
    for request in asks:
        run(serving, [request])
    assert serving.stats()["picture_misses"] == 3
    assert serving.stats()["picture_hits"] == 2


def test_a_conversation_goes_on_where_it_was() -> None:
    one = served("llava")
    serving = engine(one.pages())
    first = asked(one.prompts[1], "low", 9)
    answer = ids(run(serving, [first])[first.id])
    longer = Prompt((*first.prompt.ids, *answer, 8, 9, 10), first.prompt.pictures, first.prompt.marks)
    second = asked(longer, "low", 5)
    events = run(serving, [second])[second.id]
    assert events[0].data["cached_tokens"] > len(first.prompt.ids)
    assert ids(events) == said_alone(engine(one.pages()), second)


def test_several_answers_are_each_of_its_own_seed_and_share_the_prompt() -> None:
    one = served("llava")
    serving = engine(one.pages())
    request = asked(one.prompts[2], "low", 8, temperature=2.0, seed=7, choices=3)
    events = run(serving, [request])[request.id]
    found = [ids(events, choice) for choice in range(3)]
    assert len({tuple(answer) for answer in found}) > 1
    assert serving.stats()["prefix_hits"] >= 2
    again = run(engine(one.pages()), [replace(request, id="again")])["again"]
    assert [ids(again, choice) for choice in range(3)] == found


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_rows_that_outgrow_the_memory_give_way_and_say_the_same(family: str) -> None:
    """Answers of 24 tokens where prompts fit and answers do not: some read again what they have said."""
    one, block = served(family), 4
    alone = engine(one.pages(), rows=1, block=block)
    requests = [asked(one.prompts[row], name, 24) for row in (2, 0, 1) for name in (None, "low", "prompt", "prefix")]
    requests += [asked(one.prompts[1], "low", 24, temperature=1.5, seed=5, choices=3)]
    expected = {request.id: run(alone, [request])[request.id] for request in requests}
    longest = alone.blocks.needed(max(len(prompt.ids) for prompt in one.prompts) + 5 + 24)
    room = alone.line.bytes // alone.line.count * (longest + 3)
    serving = engine(one.pages(), cache_bytes=room, block=block, chunk=20)
    found = run(serving, requests)
    assert serving.stats()["preemptions"] > 3
    for request in requests:
        for choice in range(request.sampling.choices):
            assert ids(found[request.id], choice) == ids(expected[request.id], choice)
        assert [e.kind for e in found[request.id]].count("started") == 1
    assert serving.stats()["prompt_tokens"] == alone.stats()["prompt_tokens"]
    assert serving.blocks.available == serving.blocks.count


def test_an_answer_takes_blocks_as_it_grows_and_not_for_the_longest_that_it_may_be() -> None:
    one = served("llava")
    serving = engine(one.pages(), block=4, cache_bytes=1 << 17)
    most = serving.most - len(one.prompts[0].ids)
    for _ in range(3):
        serving.submit(asked(one.prompts[0], None, most))
    serving.step()
    assert serving.stats()["running"] == 3


@pytest.mark.parametrize("wanted", [10**6, None])
def test_what_is_too_long_is_refused_with_figures(wanted: int | None) -> None:
    one = served("llava")
    serving = engine(one.pages())
    prompt = one.prompts[0] if wanted else Prompt((9,) * (serving.most + 1))
    request = replace(asked(prompt, None), sampling=replace(asked(prompt, None).sampling, max_tokens=wanted))
    with pytest.raises(ServeError) as refused:
        serving.submit(request)
    assert refused.value.kind == "too_long"
    assert str(serving.most) in str(refused.value.allowed)


def test_an_unknown_adapter_is_an_error_and_never_the_base() -> None:
    serving = engine((one := served("llava")).pages())
    with pytest.raises(ServeError) as refused:
        serving.submit(asked(one.prompts[0], "nobody"))
    assert refused.value.kind == "unknown_adapter"
    assert serving.idle


def test_who_waits_no_longer_is_told_so() -> None:
    serving = engine((one := served("llava")).pages(), rows=1)
    late = replace(asked(one.prompts[0], None, 5), deadline=time.monotonic() - 1)
    (event,) = run(serving, [late])[late.id]
    assert event.data["error"].kind == "timeout"


def test_a_step_that_fails_ends_its_rows_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    one = served("llava")
    serving = engine(one.pages(), rows=1)
    first, second = (asked(one.prompts[0], name, 4) for name in ("low", "dora"))
    for request in (first, second):
        serving.submit(request)
    with monkeypatch.context() as patch:
        patch.setattr(serving.line, "run", lambda parts: torch.empty(0)[3])
        with pytest.raises(IndexError):
            serving.step()
    *_, lost = serving.abort(ServeError("internal", "A step failed."))
    assert lost.id == first.id
    events: list[Event] = []
    while not serving.idle:
        events += serving.step()
    assert ids(events) == said_alone(engine(one.pages()), second)
    assert serving.blocks.available == serving.blocks.count


def test_logits_that_are_no_numbers_end_their_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one = served("llava")
    serving = engine(one.pages())
    first, second = (asked(one.prompts[0], name, 4) for name in ("low", "dora"))
    alone, run_ = said_alone(engine(one.pages()), second), serving.line.run

    def spoilt(parts: object) -> torch.Tensor:
        logits = run_(parts).clone()  # type: ignore[arg-type]
        logits[: len(logits) - 1] = torch.nan
        return logits

    monkeypatch.setattr(serving.line, "run", spoilt)
    found = run(serving, [first, second])
    assert found[first.id][-1].data["error"].kind == "internal"
    assert ids(found[second.id]) == alone


def test_a_base_that_answers_otherwise_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    import tarsia.serve.line as module

    one = served("llava")
    attend = module.kernel.attend
    monkeypatch.setattr(module.kernel, "attend", lambda q, *rest: attend(q * 1.01, *rest))
    with pytest.raises(ServeError, match="otherwise here"):
        engine(one.pages())


def test_a_prompt_that_breaks_the_model_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one = served("llava")
    serving = engine(one.pages())
    bad, good = asked(one.prompts[1], "low", 4), asked(one.prompts[0], "dora", 4)
    alone, read = said_alone(engine(one.pages()), good), serving.front.read

    def broken(prompt: Prompt, page: object) -> object:
        if prompt is bad.prompt:
            raise IndexError("some shape")
        return read(prompt, page)  # type: ignore[arg-type]

    monkeypatch.setattr(serving.front, "read", broken)
    found = run(serving, [bad, good])
    assert found[bad.id][-1].data["error"].kind == "internal"
    assert ids(found[good.id]) == alone


def test_what_a_step_had_to_tell_is_told_though_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    one = served("llava")
    serving = engine(one.pages())
    late = replace(asked(one.prompts[0], None, 5), deadline=time.monotonic() - 1)
    serving.submit(late)
    serving.submit(running := asked(one.prompts[0], "low", 4))
    monkeypatch.setattr(serving.line, "run", lambda parts: torch.empty(0)[3])
    with pytest.raises(IndexError):
        serving.step()
    told = serving.abort(ServeError("internal", "A step failed."))
    assert {(event.id, event.kind) for event in told} >= {(late.id, "failed"), (running.id, "failed")}
    assert serving.idle


def test_a_request_that_makes_no_sense_keeps_no_adapter() -> None:
    one = served("llava")
    pages = one.pages()
    serving = engine(pages)
    odd = asked(one.prompts[0], "low")
    with pytest.raises(ServeError):
        serving.submit(replace(odd, sampling=replace(odd.sampling, bias={10**6: 1.0})))
    assert serving.idle
    assert not any(pages.used.values())


def test_answers_of_one_request_end_together_where_one_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    one = served("llava")
    serving = engine(one.pages())
    request = asked(one.prompts[0], "low", 6, temperature=1.0, seed=1, choices=3)
    run_ = serving.line.run

    def spoilt(parts: object) -> torch.Tensor:
        logits = run_(parts).clone()  # type: ignore[arg-type]
        if len(logits) > 1:
            logits[0] = torch.nan
        return logits

    monkeypatch.setattr(serving.line, "run", spoilt)
    events = run(serving, [request])[request.id]
    assert [event.kind for event in events].count("failed") == 1
    assert events[-1].kind == "failed"
    assert serving.blocks.available == serving.blocks.count


def test_adapters_are_asked_for_as_far_ahead_as_rows_can_run() -> None:
    one = served("llava")
    pages = one.pages()
    serving = engine(pages, rows=2)
    for name in ("low", "high", "dora", "neck", "scales", "turned"):
        serving.submit(asked(one.prompts[0], name, 3))
    serving.step()
    assert sum(pages.used.values()) <= 4
    while not serving.idle:
        serving.step()


def test_a_tenant_finds_nothing_that_another_has_read() -> None:
    one = served("llava")
    serving = engine(one.pages())
    cached = []
    for tenant in ("a", "b", "a"):
        request = replace(asked(one.prompts[2], "low", 3), tenant=tenant)
        cached.append(run(serving, [request])[request.id][0].data["cached_tokens"])
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_answers_share_a_prompt_behind_a_lead_that_fills_blocks(name: str) -> None:
    one = served("llava")
    serving = engine(one.pages(), block=2)
    request = asked(one.prompts[2], name, 4, temperature=1.0, seed=3, choices=2)
    run(serving, [request])
    assert serving.stats()["prefix_hits"] == 1


def test_a_lead_counts_towards_the_context() -> None:
    one = served("llava")
    serving = engine(one.pages())
    prompt = one.prompts[0]
    serving.context = len(prompt.ids) + 4
    found = run(serving, [fits := asked(prompt, "low", 4), tight := asked(prompt, "prefix", 4)])
    assert found[fits.id][-1].kind == "done"
    assert found[tight.id][-1].data["error"].kind == "too_long"


def test_a_text_that_comes_apart_ends_its_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one = served("llava")
    serving = engine(one.pages())
    bad, good = asked(one.prompts[0], "low", 4), asked(one.prompts[0], "dora", 4)
    alone = said_alone(engine(one.pages()), good)
    for request in (bad, good):
        serving.submit(request)

    def torn(drawn: object) -> list[Event]:
        raise ServeError("internal", "A text was told in parts that do not make it.")

    monkeypatch.setattr(serving._jobs[bad.id].rows[0], "say", torn)
    events: list[Event] = []
    while not serving.idle:
        events += serving.step()
    assert [e.kind for e in events if e.id == bad.id][-1] == "failed"
    assert ids([e for e in events if e.id == good.id]) == alone


def test_an_answer_without_a_length_takes_the_room_that_is_left() -> None:
    one = served("llava")
    serving = engine(one.pages(), answer=5)
    open_ = asked(one.prompts[0], None)
    for at_most, expected in ((3, 3), (None, 5), (10**6, serving.most - len(open_.prompt.ids))):
        serving.context = len(open_.prompt.ids) + 20
        expected = min(expected, 20)
        request = replace(open_, id=str(at_most), sampling=replace(open_.sampling, max_tokens=None, at_most=at_most))
        assert len(ids(run(serving, [request])[request.id])) == expected


def test_a_cache_too_small_to_try_is_said() -> None:
    one = served("llava")
    with pytest.raises(ServeError, match="too small"):
        engine(one.pages(), cache_bytes=1 << 12)
