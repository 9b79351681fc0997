"""What benches and chapters stand on: an engine in this process says what Transformers says; a wrong key is seen."""

from __future__ import annotations

import pytest

from tarsia.core.errors import TarsiaError
from tarsia.labs import tenants
from tarsia.labs.chapters import serving, stale
from tarsia.serve.load import inside

NAMES = ["vision-0", "vision-1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    plain = tenants.host()
    made = [(name, stale.MADE["vision"], i) for i, name in enumerate(NAMES)]
    held = tenants.library(tmp_path_factory.mktemp("labs") / "library", plain, made)
    texts = [inside.Text(tenants.QUESTION, i) for i in range(2)]
    right = [tenants.alone(plain, held, name, texts, 4) for name in NAMES]
    return plain, held, texts, right


def test_an_engine_in_this_process_says_what_each_adapter_says_alone(world) -> None:
    plain, held, texts, right = world
    engine = tenants.engine(held, 2)
    ran = inside.run(engine, [inside.encoded(plain, one) for one in texts * 2], [NAMES[0]] * 2 + [NAMES[1]] * 2, 4)
    assert list(ran.ids) == [*right[0], *right[1]] and right[0] != right[1]
    assert ran.tokens == 16 and ran.rate == 16 / ran.seconds
    base = inside.run(engine, [inside.encoded(plain, one) for one in texts], [None, None], 4)
    assert list(base.ids) == list(inside.plainly(plain, texts, 4).ids)
    with pytest.raises(TarsiaError):
        inside.run(engine, [inside.encoded(plain, texts[0])], ["nobody"], 4)
    engine.pages.close()


@pytest.mark.parametrize("how", list(stale.KEYS))
def test_a_key_that_forgets_the_adapter_is_seen(world, how) -> None:
    plain, held, texts, right = world
    engine = tenants.engine(held, 2)
    stale.keyed(engine, stale.KEYS[how])
    found = stale.asked(engine, [inside.encoded(plain, one) for one in texts], NAMES, right, 4).row()
    engine.pages.close()
    assert found["answers"] == 4
    if how == "the picture":
        assert found["pictures encoded"] == 2 and found["right, %"] < 100 and found["another adapter's, %"] > 0
    else:
        assert found["pictures encoded"] == 4 and found["right, %"] == 100


def test_one_after_the_other_says_the_same(world) -> None:
    plain, held, texts, right = world
    ids, seconds = serving.apart(plain, held, [NAMES[1], NAMES[0]], texts, 4)
    assert ids == [right[1][0], right[0][1]] and seconds > 0


def test_what_serving_found_is_judged() -> None:
    rates = serving.Rates()
    for many in serving.NUMBERS:
        rates.mixed[many], rates.apart[many] = [100.0, 100.0], [20.0, 25.0]
        rates.different[many], rates.loads[many] = [min(many, 20)] * 2, 50
    chapter = serving.CHAPTER
    assert chapter.judge(serving.found(rates, "x")) == "PASS"
    rates.mixed[serving.MOST] = [79.0, 79.0]
    assert chapter.judge(serving.found(rates, "x")) == "FAIL"
    rates.mixed[serving.MOST], rates.apart[serving.MOST] = [100.0, 100.0], [60.0, 60.0]
    assert chapter.judge(serving.found(rates, "x")) == "FAIL"


def test_rounds_ask_what_was_never_asked() -> None:
    rounds = [inside.texts(number, 8, 5, pictured=True) for number in range(4)]
    assert len({text for texts in rounds for text in texts}) == 32
    assert len({text.picture for texts in rounds for text in texts}) == 32
    assert serving.drawn(1, 5) == serving.drawn(1, 5) != serving.drawn(2, 5)
