"""The load generator against a feigned server: what it asks, that it ends, what it counts, and whom it never asks."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections import Counter
from itertools import pairwise

import pytest
from serve.feigned import PIECES, Feigned, serving

from tarsia import cli
from tarsia.core.errors import ConfigError, ServeError
from tarsia.serve.load import asked, client, drive, figures, report
from tarsia.serve.load.asked import Mix, Question

NAMES = [f"task-{i}" for i in range(20)]


@pytest.fixture
def feigned():
    made = Feigned([*NAMES])
    with serving(made) as url:
        yield made, url


def load(url, models, check=False, **limits):
    bounds = drive.Limits(**{"requests": 40, "seconds": 20.0, "concurrency": 4, "grace": 0.2} | limits)

    async def do():
        one = client.Client(url, max_tokens=8, seconds=20, connections=bounds.at_once)
        try:
            answered = await drive.Drive(one, Mix(tuple(models), pictures=3).questions(), bounds).run()
            found = await drive.check(one, answered, bounds) if check else (None, [])
            return answered, figures.figures(answered, *found)
        finally:
            await one.close()

    return asyncio.run(do())


def test_every_question_is_answered_and_timed(feigned) -> None:
    made, url = feigned
    answered, found = load(url, NAMES)
    assert (found.asked, found.answered, found.lost, found.passed) == (40, 40, 0, True)
    assert len(made.asked) == 40 and made.most == 4
    assert (found.tokens, found.prompt) == (40 * PIECES, 40 * 11)
    for one in answered:
        assert 0 <= one.began < one.first <= one.last <= one.ended
        assert one.reason == "stop" and one.text.endswith(" 1 2 3 ")
    assert [one.question.number for one in answered] == list(range(40))
    assert sum(adapter.asked for adapter in found.adapters) == 40
    assert sum(adapter.tokens for adapter in found.adapters) == found.tokens


def test_what_is_asked_follows_from_the_seed_and_from_zipfs_law() -> None:
    mix = Mix(tuple(NAMES), zipf=1.0, pictures=5, pictured=0.5, words=30)
    drawn = mix.questions()
    first = [next(drawn) for _ in range(4000)]
    again = mix.questions()
    assert first == [next(again) for _ in range(4000)]
    by = Counter(question.model for question in first)
    assert [name for name, _ in by.most_common(2)] == NAMES[:2]
    whole = sum(1 / n for n in range(1, 21))
    for i in (0, 1, 4, 19):
        expected = 4000 / whole / (i + 1)
        assert abs(by[NAMES[i]] - expected) < 5 * expected**0.5
    assert 0.45 < sum(question.picture is not None for question in first) / 4000 < 0.55
    assert all(25 <= len(question.prompt.split()) <= 35 for question in first)
    alike = Counter(q.model for q, _ in zip(Mix(tuple(NAMES), zipf=0.0).questions(), range(4000), strict=False))
    assert max(alike.values()) < 2 * min(alike.values())


def test_a_picture_is_a_whole_png_of_its_own_in_a_data_url() -> None:
    shown = asked.body(Question(0, "m", 3, "what?"), 5)["messages"][0]["content"][0]["image_url"]["url"]
    head, _, data = shown.partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(data) == asked.picture(3)
    assert len({asked.picture(i) for i in range(20)}) == 20


@pytest.mark.parametrize(
    "model, kind, lost",
    [
        ("cut", "cut off", True),
        ("mid", "lost", True),
        ("busy", "429 overloaded", False),
        ("broken", "500", True),
        ("away", "307", True),
    ],
)
def test_what_fails_is_counted_by_its_kind(feigned, model, kind, lost) -> None:
    made, url = feigned
    with serving(Feigned([])) as elsewhere:
        made.elsewhere = f"{elsewhere}/v1/chat/completions"
        _, found = load(url, [*NAMES[:1], model], requests=12)
    assert set(found.errors) == {kind} and 0 < found.errors[kind] < 12
    assert found.lost == (found.errors[kind] if lost else 0)
    assert found.passed is not lost
    assert found.answered + found.errors[kind] == 12


def test_no_redirect_is_followed(feigned) -> None:
    made, url = feigned
    other = Feigned([])
    with serving(other) as elsewhere:
        made.elsewhere = f"{elsewhere}/v1/chat/completions"
        load(url, ["away"], requests=3)
    assert len(made.asked) == 3 and other.asked == []


def test_a_proxy_of_the_environment_is_not_asked(feigned, monkeypatch) -> None:
    _, url = feigned
    other = Feigned([])
    with serving(other) as elsewhere:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, elsewhere)
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("NO_PROXY", "")
        assert load(url, NAMES, requests=3)[1].passed
    assert other.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com:8000",
        "http://127.0.0.1.example.com",
        "http://127.0.0.1@example.com",
        "http://example.com#@127.0.0.1",
        "https://127.0.0.1:8000",
        "http://localhost:8000",
        "http://127.0.0.2",
        "http://0.0.0.0",
        "http://[::1]:8000",
        "http://127.0.0.1:99999",
        "127.0.0.1:8000",
        "",
    ],
)
def test_nobody_but_this_machine_is_loaded(url) -> None:
    with pytest.raises(ConfigError, match="on this machine alone"):
        client.local(url)
    with pytest.raises(ConfigError, match="on this machine alone"):
        client.Client(url, max_tokens=1, seconds=1, connections=1)


def test_an_address_is_taken() -> None:
    assert client.local("http://127.0.0.1:8123/") == "http://127.0.0.1:8123"
    assert client.local("http://127.0.0.1") == "http://127.0.0.1:80"
    for given in ("http://127.0.0.1:8123/v1", "http://127.0.0.1:8123/v1/"):  # as OpenAI's client takes it
        assert client.local(given) == "http://127.0.0.1:8123"
    with pytest.raises(ConfigError, match="address has a path") as caught:
        client.local("http://127.0.0.1/elsewhere")
    assert "this machine" not in str(caught.value)


@pytest.mark.parametrize("rate", [None, 100.0])
def test_a_load_ends_though_answers_do_not(feigned, rate) -> None:
    made, url = feigned
    began = time.perf_counter()
    answered, found = load(url, ["slow"], requests=1000, seconds=0.2, rate=rate)
    assert time.perf_counter() - began < 5
    assert found.errors == {"unanswered": len(answered)} and not found.passed
    assert len(answered) == len(made.asked) >= 4


def test_at_a_rate_questions_come_whether_or_not_earlier_ones_are_answered(feigned) -> None:
    made, url = feigned
    answered, found = load(url, NAMES, requests=30, rate=500.0)
    assert found.answered == 30
    gaps = [b.began - a.began for a, b in pairwise(answered)]
    assert len({round(gap, 4) for gap in gaps}) > 5
    assert made.most > 1


@pytest.mark.parametrize(
    "limit",
    [
        {"requests": 0},
        {"requests": 10**6},
        {"seconds": 1e9},
        {"seconds": float("nan")},
        {"concurrency": 0},
        {"rate": -1},
    ],
)
def test_no_load_is_without_bounds(limit) -> None:
    with pytest.raises(ConfigError, match="bounded"):
        drive.Limits(**limit)


def test_a_fault_of_our_own_is_not_an_answer(feigned, monkeypatch) -> None:
    async def broken(self, question):
        raise KeyError("ours")

    monkeypatch.setattr(client.Client, "ask", broken)
    for rate in (None, 100.0):
        with pytest.raises(KeyError, match="ours"):
            load(feigned[1], NAMES, rate=rate)


def test_an_answer_that_is_another_when_asked_alone_is_found(feigned) -> None:
    _, found = load(feigned[1], [*NAMES[:2], "mixed"], check=True, requests=60, concurrency=8)
    assert found.wrong and {one.under_load.question.model for one in found.wrong} == {"mixed"}
    assert "else's" in found.wrong[0].under_load.text and "else's" not in found.wrong[0].alone.text
    assert found.lost == 0 and not found.passed


def test_answers_that_are_the_same_alone_pass_the_check(feigned) -> None:
    answered, found = load(feigned[1], NAMES, check=True)
    assert found.checked == len({one.question.same for one in answered}) and found.wrong == () and found.passed


def test_quantiles_are_values_that_were_seen() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [figures.quantile(values, q) for q in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert [figures.quantile([7.0], q) for q in (0.5, 0.99)] == [7, 7]
    assert figures.Spread.of([None, 3.0, None]) == figures.Spread(1, 3.0, None, None, 3.0)  # too few for a tenth
    assert figures.Spread.of(values) == figures.Spread(100, 50, 90, 99, 100)
    assert figures.Spread.of([]).middle is None


def test_what_flows_over_time_is_all_that_was_told() -> None:
    one = client.Answered(Question(0, "m", None, ""), 0.0, 4.0, first=1.0, last=3.5, tokens=50)
    other = client.Answered(Question(1, "m", None, ""), 2.0, 10.0, first=9.0, last=10.0, tokens=30)
    middles, tokens, running = figures.flow([one, other], bins=20)
    width = middles[1] - middles[0]
    assert sum(tokens) * width == pytest.approx(80)
    assert sum(running) * width == pytest.approx(4.0 + 8.0)
    assert tokens[0] == 0 and running[5] == pytest.approx(2.0)


def counted(page: str) -> str:
    return page.partition("What the server counted")[2]


def bench(capsys, *options):
    code = cli.main(["bench", "serve", *map(str, options)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_reports(feigned, capsys, tmp_path) -> None:
    made, url = feigned
    page = tmp_path / "report.html"
    code, out, _ = bench(
        capsys, "--url", url, "--requests", 30, "--adapters", 10, "--check", "--max-tokens", 9, "--out", page
    )
    assert code == 0 and "30 of 30 answered" in out and "0 answers differ" in out
    assert {body["model"] for body in made.asked} <= set(NAMES[:10])
    assert {body["max_tokens"] for body in made.asked} == {9} and {body["temperature"] for body in made.asked} == {0}
    held = page.read_text(encoding="utf8")
    assert '<td class="text">by_total kind=x</td><td>60</td>' in held.replace("\n", "")
    assert "hits_total" in held and "now" not in counted(held) and "old_total" not in held
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)[a-z]+:""", held)
    assert "<script" not in held and list(tmp_path.iterdir()) == [page]
    picture = base64.b64decode(held.partition("data:image/svg+xml;base64,")[2].partition('"')[0])
    assert picture.startswith(b"<?xml") and b"<script" not in picture and len(picture) > 20_000


def test_the_command_fails_where_questions_are_lost(feigned, capsys, tmp_path) -> None:
    made, url = feigned
    page = tmp_path / "report.html"
    made.models.extend(["mid", "busy", "cut"])
    options = ["--url", url, "--requests", 20, "--model", "mid", "--model", "busy", "--model", "cut", "--out", page]
    code, out, _ = bench(capsys, *options, "--zipf", 0, "--json")
    said = json.loads(out)
    assert code == 1 and said["answered"] == 0 and sum(said["errors"].values()) == 20 and not said["passed"]
    assert set(said["errors"]) == {"lost", "429 overloaded", "cut off"}
    held = page.read_text(encoding="utf8")
    assert "too much &lt;b&gt;at once" in held and "the worker is gone" in held


def test_who_is_told_to_come_again_is_not_lost_and_that_is_said(feigned, capsys) -> None:
    made, url = feigned
    made.models.append("busy")
    options = ["--url", url, "--requests", 20, "--zipf", 0, "--model", "busy", "--model", NAMES[0]]
    code, out, _ = bench(capsys, *options)
    assert code == 0 and re.search(r"refused, which counts as no failure: \d+ x 429 overloaded", out)
    assert "failed:" not in out
    with pytest.raises(SystemExit):
        cli.main(["bench", "serve", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Exit code: 0" in said and "429" in said and "TARSIA_API_KEY" in said


def test_a_key_comes_from_the_environment(feigned, capsys, monkeypatch) -> None:
    made, url = feigned
    monkeypatch.setenv("TARSIA_API_KEY", "secret")
    code, out, err = bench(capsys, "--url", url, "--requests", 2)
    assert code == 0 and made.keys == {"Bearer secret"} and "secret" not in out + err


@pytest.mark.parametrize(
    "options, told",
    [
        (["--url", "http://example.com"], "on this machine alone"),
        (["--adapters", "21"], "has not so many adapters"),
        (["--model", "unknown"], "has no such model"),
        (["--requests", "0"], "bounded"),
        (["--pictured", "2"], "share"),
        (["--prompts", "0"], "too small"),
        (["--rate", "3", "--concurrency", "3"], "not allowed with"),
    ],
)
def test_what_makes_no_sense_is_refused(feigned, capsys, options, told) -> None:
    made, url = feigned
    code, _, err = bench(capsys, *(["--url", url] if "--url" not in options else []), *options)
    assert code == 2 and told in err and "Traceback" not in err
    assert made.asked == []


def test_where_no_server_is_it_is_said(capsys) -> None:
    code, _, err = bench(capsys, "--url", "http://127.0.0.1:9")
    assert code == 2 and "No server answers" in err and "tarsia serve" in err


def test_a_server_of_another_kind_is_told_from_ours(capsys) -> None:
    other = Feigned([])
    other.app.router.routes[:] = [r for r in other.app.router.routes if getattr(r, "path", "") != "/v1/models"]
    with serving(other) as url, pytest.raises(ServeError, match="lists no models"):
        asyncio.run(client.Client(url, max_tokens=1, seconds=5, connections=1).models())


@pytest.mark.parametrize("status, told", [(401, "wants a key"), (403, "wants another key")])
def test_a_server_that_wants_a_key_is_told_from_another_kind(capsys, status, told) -> None:
    other = Feigned([])
    other.app.router.routes[:] = [r for r in other.app.router.routes if getattr(r, "path", "") != "/v1/models"]
    other.app.get("/v1/models", status_code=status)(lambda: {"error": ""})
    with serving(other) as url:
        code, _, err = bench(capsys, "--url", url)
    assert code == 2 and told in err and "TARSIA_API_KEY" in err and "tarsia serve" not in err


@pytest.mark.parametrize("out", ["none/page.html", "folder", "folder/page.html/x"])
def test_where_a_report_can_not_be_is_looked_at_before_the_load(feigned, capsys, tmp_path, out) -> None:
    made, url = feigned
    (tmp_path / "folder").mkdir()
    code, _, err = bench(capsys, "--url", url, "--requests", 2, "--out", tmp_path / out)
    assert code == 2 and "report can not be written" in err and made.asked == []
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_report_that_is_there_stays_until_there_is_another(tmp_path) -> None:
    page = tmp_path / "page.html"
    page.write_text("before")
    report.writable(page)
    assert page.read_text() == "before" and list(tmp_path.iterdir()) == [page]


def test_numbers_are_told_whatever_becomes_of_the_report(feigned, capsys, tmp_path, monkeypatch) -> None:
    url = feigned[1]
    monkeypatch.setattr(report, "writable", lambda path: None)
    code, out, err = bench(capsys, "--url", url, "--requests", 2, "--out", tmp_path / "none" / "page.html")
    assert code == 2 and "2 of 2 answered" in out and "report can not be written" in err


def test_a_page_that_can_not_be_written_is_said(tmp_path) -> None:
    with pytest.raises(ConfigError, match="can not be written"):
        report.write("x", tmp_path / "none" / "page.html")
