"""Free and chosen answers: batches equal single rows, packed scores equal a naive loop, and loss is training's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from evaluate import tiny
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from tarsia.adapter import Host
from tarsia.core.errors import AnatomyError, ConfigError, DataError
from tarsia.data import Encoder, Message, Sample
from tarsia.evaluate import Chat, chances, choose, evaluate, generate, score
from tarsia.evaluate.chat import examined

TEMPLATES = ("chatml", "llama 3", "vicuna", "gemma")


@pytest.fixture(scope="module")
def host() -> Host:
    return tiny.host()


def naive(host: Host, sample: Sample, answer: str) -> float:
    """Sum of log-probabilities in a loop over the tokens, one row and one answer a pass."""
    chat = Chat(host)
    ids = chat.answer(sample, answer)
    inputs = chat.inputs([sample], [chat.prompt(sample)])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with examined(host.model):
        chance = host.model(**inputs).logits[0].double().log_softmax(-1)
    return sum(float(chance[-len(ids) - 1 + t, token]) for t, token in enumerate(ids))


# generation


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_batch_equals_each_row_alone(template: str) -> None:
    host = tiny.host(template=template)
    rows = tiny.rows(7)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    together = generate(host, rows, 8, batch=4)
    assert together == tuple(generate(host, [row], 8, batch=1)[0] for row in rows)
    assert torch.equal(torch.get_rng_state(), state)  # a run that is evaluated on the way stays the same run
    assert len(set(together)) > 4  # the rows differ, so that a mix-up would be seen


def test_padding_on_the_right_is_seen(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny.rows(9)
    before = generate(host, rows, 8, batch=4)
    plant(monkeypatch, host, padding_side="right")
    assert generate(host, rows, 8, batch=4) != before


def plant(monkeypatch: pytest.MonkeyPatch, host: Host, **options: object) -> None:
    """Let the processor be called with other options than asked for."""
    kind = type(host.processor)
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *args, **given: call(self, *args, **given | options))


def ending(host: Host, token: int, after: str) -> None:
    """Let the model give ``token`` wherever it has just read the last id of ``after``."""
    last = host.processor.tokenizer(after)["input_ids"][-1]
    head = host.model.lm_head.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        logits = head(x)
        logits[..., token] = torch.where(forward.ids[:, -logits.shape[1] :] == last, 1e4, logits[..., token])
        return logits

    def see(module: object, args: object, given: dict[str, torch.Tensor]) -> None:
        forward.ids = given["input_ids"]

    host.model.register_forward_pre_hook(see, with_kwargs=True)
    host.model.lm_head.forward = forward


def test_generation_stops_at_the_template_s_end_of_turn() -> None:
    """chatml ends with <|im_end|>, which neither the model's configuration nor the tokenizer names."""
    host = tiny.host()
    rows = tiny.rows(6)
    long = generate(host, rows, 12)
    end = host.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert host.model.generation_config.eos_token_id != end
    assert end in Chat(host).ends
    ending(host, end, long[0][-1])
    short = generate(host, rows, 12)
    assert short != long
    for a, b in zip(short, long, strict=True):
        assert b.startswith(a)


def test_the_model_s_own_generation_configuration_is_left_out_and_left_alone(host: Host) -> None:
    before = generate(host, tiny.rows(4), 8)
    kept = host.model.generation_config
    try:
        host.model.generation_config = type(kept)(
            do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=2
        )
        mine = host.model.generation_config
        assert generate(host, tiny.rows(4), 8) == before
        assert host.model.generation_config is mine
    finally:
        host.model.generation_config = kept


def test_modes_are_restored_also_after_an_error(host: Host) -> None:
    host.model.train()
    part = host.model.model.vision_tower.eval()
    modes = [module.training for module in host.model.modules()]
    try:
        seen: list[bool] = []
        with pytest.raises(RuntimeError, match="stop"):
            stopped(host.model, seen)
        assert seen == [False, False]
        assert [module.training for module in host.model.modules()] == modes
        assert not part.training
        assert torch.is_grad_enabled()
    finally:
        host.model.eval()


def stopped(model: torch.nn.Module, seen: list[bool]) -> None:
    with examined(model):
        seen += [any(module.training for module in model.modules()), torch.is_grad_enabled()]
        raise RuntimeError("stop")


# scoring


@pytest.mark.parametrize("template", TEMPLATES)
def test_packed_scores_equal_a_naive_loop(template: str) -> None:
    host = tiny.host(template=template)
    rows = tiny.rows(4)
    answers = tiny.ANSWERS[:-1] if template == "vicuna" else tiny.ANSWERS
    found = chances(host, rows, answers, batch=4)
    assert found.way == "packed"
    for row, scores, tokens in zip(rows, found.found, found.tokens, strict=True):
        wanted = [naive(host, row, a) for a in [*answers, row.messages[-1].text]]
        assert scores.tolist() == pytest.approx(wanted, abs=1e-4)
        assert tokens == len(Chat(host).answer(row, row.messages[-1].text))
    pictured = [scores for row, scores in zip(rows, found.found, strict=True) if row.pictures]
    assert float((pictured[0] - pictured[1])[:-1].abs().max()) > 0.1  # scores that all rows share would prove nothing


@settings(max_examples=6, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=5), st.integers(1, 4))
def test_scores_do_not_depend_on_the_batch(pictures: Sequence[int], batch: int) -> None:
    host = _SHARED
    rows = tiny.rows(len(pictures), pictures)
    alone = [chances(host, [row], tiny.ANSWERS).found[0] for row in rows]
    for a, b in zip(alone, chances(host, rows, tiny.ANSWERS, batch).found, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


_SHARED = tiny.host(seed=3)


ANSWER = st.lists(st.integers(9, 12), min_size=1, max_size=4).map(tuple)


@given(st.lists(ANSWER, min_size=1, max_size=8).map(tuple))
def test_a_tree_holds_every_answer_once(answers: tuple[tuple[int, ...], ...]) -> None:
    made = score.tree(answers)
    starts = {a[:end] for a in answers for end in range(1, len(a))}
    assert len(made.tokens) == len(starts)
    read: dict[int, list[int]] = {number: [] for number in range(len(answers))}
    for node, target, owner in zip(made.nodes.tolist(), made.targets.tolist(), made.owners.tolist(), strict=True):
        branch = sorted(made.above[node].nonzero()[:, 0].tolist(), key=lambda n: made.depths[n])
        assert [made.tokens[n] for n in branch] == list(answers[owner][: len(read[owner]) + 1])
        assert [made.depths[n] for n in branch] == list(range(len(branch)))
        read[owner].append(target)
    assert all(tuple(found) == answers[number][1:] for number, found in read.items())


def test_small_batches_of_logits_give_the_same(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny.rows(6)
    wanted = chances(host, rows, tiny.ANSWERS).found
    monkeypatch.setattr(score, "_LOGITS", 1)
    for a, b in zip(wanted, chances(host, rows, tiny.ANSWERS).found, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_the_end_of_turn_is_part_of_the_score(host: Host) -> None:
    """Without it, "red" could never lose against "red and green", whose beginning it is."""
    row = tiny.rows(1)[0]
    chat = Chat(host)
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for answer in tiny.ANSWERS:
        ids = chat.answer(row, answer)
        assert ids[-1] == end
        assert ids.count(end) == 1
        assert chat.decode(ids) == answer
    assert chat.answer(row, "red")[:-1] == chat.answer(row, "red and green")[: len(chat.answer(row, "red")) - 1]
    scores = chances(host, [row], ["red", "red and green"]).found[0]
    ended, open_ = float(scores[0]), naive_open(host, row, "red")
    assert ended < open_ - 0.1


def naive_open(host: Host, row: Sample, answer: str) -> float:
    chat = Chat(host)
    inputs = chat.inputs([row], [chat.prompt(row)])
    with examined(host.model):
        return float(score.packed(chat.model, inputs, [[chat.answer(row, answer)[:-1]]])[0][0])


def test_a_template_without_an_end_gets_the_tokenizer_s() -> None:
    host = tiny.host(template="vicuna")
    assert Chat(host).answer(tiny.rows(1)[0], "red")[-1] == host.processor.tokenizer.eos_token_id


def all_neighbours(seen: torch.Tensor, trees: Sequence[score.Tree]) -> torch.Tensor:
    return torch.ones_like(VISIBLE(seen, trees)).tril(seen.shape[1])


def itself_alone(seen: torch.Tensor, trees: Sequence[score.Tree]) -> torch.Tensor:
    flat = [replace(t, above=torch.eye(len(t.tokens)).bool()) for t in trees]
    return VISIBLE(seen, flat)


def one_further(answers: tuple[tuple[int, ...], ...]) -> score.Tree:
    true = TREE(answers)
    return replace(true, depths=tuple(d + 1 for d in true.depths))


def without_end(answers: tuple[tuple[int, ...], ...]) -> score.Tree:
    return TREE(tuple(a[:-1] for a in answers))


VISIBLE, TREE = score._visible, score.tree


@pytest.mark.parametrize("planted", [all_neighbours, itself_alone, one_further, without_end], ids=lambda f: f.__name__)
def test_wrong_packing_is_seen_and_not_used(host: Host, monkeypatch: pytest.MonkeyPatch, planted: object) -> None:
    """Faults planted into the packed computation: the plain one on the first row finds them."""
    rows = tiny.rows(4)
    wanted = chances(host, rows, tiny.ANSWERS)
    monkeypatch.setattr(score, "_visible" if planted in (all_neighbours, itself_alone) else "tree", planted)
    found = chances(host, rows, tiny.ANSWERS)
    assert found.way.startswith("plain (packed scores were")
    for a, b in zip(found.found, wanted.found, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


PACKED = ("internvl", "llava", "llava_onevision", "idefics3", "smolvlm")
WINDOW = {"llava_next": {"text_config": {"sliding_window": None}}}


@pytest.mark.parametrize("name", [*FAMILIES, "llava_next without window"])
def test_every_family_is_scored(name: str) -> None:
    """Plain where something stands against packing, otherwise both ways with the same result."""
    family = FAMILIES[name.split()[0]]
    model, _ = family.build(**WINDOW.get(name.split()[0], {}) if "window" in name else {})
    inputs = family.batch((1,))
    if name == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])  # as its processor marks a prompt
    answers = [(9, 10, 2), (9, 2), (2,), (11, 12, 13, 2)]
    same = {k: torch.cat([v] * len(answers)) for k, v in inputs.items()}
    with torch.no_grad():
        plain = score.plain(model, same, answers)
        assert plain.tolist() == pytest.approx([stepwise(model, inputs, answer) for answer in answers], abs=1e-3)
        reason = score.obstacle(model)
        assert (reason is None) == (name in PACKED or "window" in name), reason
        if reason is None:
            assert torch.allclose(score.packed(model, inputs, [answers])[0], plain, atol=1e-3)


def stepwise(model: torch.nn.Module, inputs: dict[str, torch.Tensor], answer: Sequence[int]) -> float:
    """As ``generate`` would get to this answer: token by token through the cache, by the model's own code."""
    total, limit = 0.0, len(answer)

    class Forced(LogitsProcessor):
        def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            nonlocal total
            token = answer[ids.shape[1] - inputs["input_ids"].shape[1]]
            total += float(logits[0].double().log_softmax(-1)[token])
            return torch.full_like(logits, -torch.inf).index_fill_(1, torch.tensor([token]), 0.0)

    config = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList([Forced()]))
    return total


def test_a_model_that_looks_ahead_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = host.model.forward

    def ahead(*args: object, **given: object) -> object:
        out = forward(*args, **given)
        out.logits[:, :-1] += out.logits[:, 1:]
        return out

    monkeypatch.setattr(host.model, "forward", ahead)
    monkeypatch.setattr(score, "obstacle", lambda model: "a test")
    with pytest.raises(AnatomyError, match="before it gives it"):
        chances(host, tiny.rows(1), tiny.ANSWERS)


# the whole


def test_loss_is_that_of_training(host: Host) -> None:
    rows = tiny.rows(5)
    batch = Encoder(host.processor).batch(rows)
    with torch.no_grad():
        logits = host.model(**batch.inputs).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=-100)
    (result,) = evaluate(host, {"tests": rows}, max_new_tokens=2).results
    assert result.loss == pytest.approx(float(wanted), abs=1e-5)
    assert sum(row.tokens for row in result.rows) == int((batch.labels != -100).sum())


def test_the_choice_is_the_likeliest_answer(host: Host) -> None:
    rows = tiny.rows(7)
    report = evaluate(host, {"tests": rows, "few": rows[:2]}, max_new_tokens=2)
    assert [r.n for r in report.results] == [7, 2]
    first = report.results[0]
    assert first.answers == tuple(sorted(set(tiny.ANSWERS[:-1])))
    assert first.answers_from == "the references of these rows"
    for row, sample in zip(first.rows, rows, strict=True):
        scores = {answer: naive(host, sample, answer) for answer in first.answers}
        assert row.chosen == max(scores, key=scores.__getitem__)
        assert row.chosen_score == float(row.chosen.removeprefix("a ") == row.reference.removeprefix("a "))
    assert report.digest == host.fingerprint.weights
    assert report.adapters == ()


def test_answers_may_be_given_and_must_suffice(host: Host) -> None:
    rows = tiny.rows(2)
    (result,) = evaluate(host, {"tests": rows}, answers={"tests": ("Cat.", "dog", "4")}, max_new_tokens=2).results
    assert result.answers == ("Cat.", "dog", "4")
    assert result.answers_from == "given"
    with pytest.raises(DataError, match="No answer of the set"):
        evaluate(host, {"tests": rows}, answers={"tests": ("cat", "4")}, max_new_tokens=2)
    with pytest.raises(ConfigError, match="not evaluated"):
        evaluate(host, {"tests": rows}, answers={"belt": ("cat",)})


def test_too_many_references_are_no_choice(host: Host) -> None:
    rows = [tiny.sample("?", f"{i}", row=i) for i in range(65)]
    (result,) = evaluate(host, {"many": rows}, max_new_tokens=1).results
    assert result.constrained is None
    assert result.answers == ()
    assert result.answers_from == "none: 65 different references, more than 64"
    assert {row.chosen for row in result.rows} == {None}


def test_what_can_not_be_evaluated_is_refused(host: Host) -> None:
    question = Sample((Message("user", ("?",)),), (), "tests", 3)
    with pytest.raises(DataError, match="Row 3 of tests has no answer"):
        evaluate(host, {"tests": [question]})
    with pytest.raises(DataError, match="no rows"):
        evaluate(host, {"tests": []})
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate(host, {})
    with pytest.raises(DataError, match="number"):
        evaluate(host, {"tests": tiny.rows(1)}, metric="numeric", max_new_tokens=1)


def test_several_turns_are_asked_up_to_the_last(host: Host) -> None:
    """Earlier answers belong to the question; only the last is scored."""
    first = tiny.sample("what is this?", "a cat", 1)
    more = replace(
        first, messages=(*first.messages, Message("user", ("which colour?",)), Message("assistant", ("red",)))
    )
    chat = Chat(host)
    assert "a cat" in chat.prompt(more)
    assert "red" not in chat.prompt(more)
    found = chances(host, [more], ["red", "4"]).found[0]
    assert float(found[0]) == pytest.approx(naive(host, more, "red"), abs=1e-4)


def test_a_template_that_writes_an_answer_in_two_ways_is_refused() -> None:
    """Here a question in capitals gets its answer with a mark; cached ids of another row would be wrong."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}:{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}MARK{% else %}"
        "{% if m['role'] == 'assistant' and messages[0]['content'][-1]['text'].isupper() %}{{ '- ' }}{% endif %}"
        "{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    host = tiny.host(template=template)
    rows = [tiny.sample("what?", "a cat"), tiny.sample("WHAT?", "a cat", row=1)]
    with pytest.raises(DataError, match="in two ways"):
        choose.chances(host, rows, ["a cat"])


def test_plain_scoring_lets_the_head_see_only_what_predicts(host: Host) -> None:
    """Prompts with pictures are thousands of tokens long, and a vocabulary has a hundred thousand words."""
    seen = []
    head = host.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    row, answers = tiny.sample("what is this?", "red", 1), [(5, 6, 7), (5, 8)]
    chat = Chat(host)
    inputs = chat.inputs([row] * 2, [chat.prompt(row)] * 2)
    with examined(host.model):
        score.plain(host.model, inputs, answers)
    handle.remove()
    assert seen == [4]
