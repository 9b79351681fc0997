"""The forgetting report of a tiny model, its page, and the gate as three verbs apply it."""

from __future__ import annotations

import json
import os
import re
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from data.processors import picture
from evaluate import tiny
from evaluate.test_divergence import adapt

from tarsia.adapter import Host, load
from tarsia.cli import rows
from tarsia.cli.forgetting import _stages as stages_of
from tarsia.core.attach import Part, activate, attach, detach
from tarsia.core.errors import ConfigError
from tarsia.data import Sample
from tarsia.evaluate import Asking, ForgettingReport, Report, active, baseline, evaluate, forgetting, gate, generate
from tarsia.evaluate.page import page, write_page
from tarsia.evaluate.plot import picture as plot
from tarsia.methods.lora import LoRAConfig

ASKING = Asking(max_new_tokens=4)


def known(host: Host, count: int, source: str, longest: int = ASKING.max_new_tokens) -> tuple[Sample, ...]:
    """Questions whose references are what the bare base says, so that all of it can be forgotten."""
    asked = [tiny.sample(f"what is this? {'so ' * i}", "?", i % 3, i, source) for i in range(count)]
    said = generate(host, asked, longest)
    pairs = zip(asked, said, strict=True)
    return tuple(
        Sample((row.messages[0], row.messages[1].__class__("assistant", (text,))), row.pictures, source, row.row)
        for row, text in pairs
    )


@pytest.fixture(scope="module")
def host() -> Host:
    return tiny.host()


@pytest.fixture(scope="module")
def sources(host: Host) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"belt": tiny.rows(5, source="belt")}, {"pets": known(host, 6, "pets"), "cars": known(host, 4, "cars")}


@pytest.fixture(scope="module")
def report(host: Host, sources: tuple[dict[str, Any], dict[str, Any]]) -> ForgettingReport:
    adapt(host, 2.0)
    try:
        return forgetting(host, *sources, asking=ASKING)
    finally:
        detach(host.model, "new")


def alike(found: Report, wanted: Report) -> None:
    """Equal but for the last bits of losses, which depend on where in memory a batch lies."""

    def rounded(value: object) -> object:
        if isinstance(value, dict):
            return {k: rounded(v) for k, v in value.items()}
        return (
            [rounded(v) for v in value]
            if isinstance(value, list)
            else value
            if not isinstance(value, float)
            else round(value, 5)
        )

    assert rounded(json.loads(found.json_text())) == rounded(json.loads(wanted.json_text()))


def test_the_report_is_of_the_base_and_of_the_adapter(
    host: Host, sources: tuple[dict[str, Any], dict[str, Any]], report: ForgettingReport
) -> None:
    task, general = sources
    together = {**task, **general}
    alike(report.before, evaluate(host, together, max_new_tokens=4))
    adapt(host, 2.0)
    try:
        alike(report.after, evaluate(host, together, max_new_tokens=4))
        again = forgetting(host, *sources, before=baseline(host, together, ASKING))
        assert (again.lost, again.turned, again.tone) == (report.lost, report.turned, report.tone)
        assert active(host) == ("new",)
    finally:
        detach(host.model, "new")
    assert report.before.adapters == () and report.after.adapters == ("new",)
    assert (report.task, report.general) == (("belt",), ("pets", "cars"))
    assert [c.free[0] for c in report.comparison.changes[1:]] == [1.0, 1.0]
    assert report.lost.mean == pytest.approx(sum(100 * (1 - c.free[1]) for c in report.comparison.changes[1:]) / 2)
    assert report.lost.mean > 50
    assert report.moved


def test_rows_that_turned(report: ForgettingReport) -> None:
    assert report.turned
    for turned in report.turned:
        before, after = (next(r for r in x.results if r.source == turned.source) for x in (report.before, report.after))
        assert before.rows[turned.index].free_score == 1 > after.rows[turned.index].free_score
        assert (turned.before, turned.after) == (before.rows[turned.index].said, after.rows[turned.index].said)
        assert turned.question.startswith("what is this?")
    lost = sum(r.free_score == 1 for x in report.before.results for r in x.rows)
    kept = sum(r.free_score == 1 for x in report.after.results for r in x.rows)
    assert len(report.turned) == lost - kept


def test_to_json_and_back(report: ForgettingReport) -> None:
    assert ForgettingReport.from_json(report.json_text()) == report
    with pytest.raises(ConfigError, match="no forgetting report"):
        ForgettingReport.from_json('{"task": []}')


def test_an_adapter_that_does_nothing_is_seen(host: Host, sources: tuple[dict[str, Any], dict[str, Any]]) -> None:
    attach(host.model, host.sites, [Part("lora", "language.*.q", LoRAConfig(rank=2, alpha=4))], name="idle")
    try:
        found = forgetting(host, *sources, asking=ASKING)
    finally:
        detach(host.model, "idle")
    assert not found.moved
    assert found.lost.mean == 0 and found.turned == ()
    assert "changes nothing on the general rows" in page(found, None, {**sources[0], **sources[1]}, plot(found))


def test_without_a_task(host: Host, sources: tuple[dict[str, Any], dict[str, Any]]) -> None:
    adapt(host, 2.0)
    try:
        found = forgetting(host, {}, sources[1], asking=ASKING)
    finally:
        detach(host.model, "new")
    assert found.vocabulary is None
    assert plot(found).startswith(b"\x89PNG")
    assert "In the task" not in page(found, None, sources[1], plot(found))


def test_stages_are_measured_one_after_the_other(host: Host, sources: tuple[dict[str, Any], dict[str, Any]]) -> None:
    task = {"one": known(host, 3, "one"), "two": tiny.rows(4, source="two")}
    adapt(host, 0.5, "first")
    adapt(host, 2.0, "second")
    try:
        activate(host.model, "first", "second")
        found = forgetting(host, task, sources[1], asking=ASKING, stages=[("first",), ("first", "second")])
        assert active(host) == ("first", "second")
        assert found.transfer is not None and found.transfer.base is not None
        assert found.transfer.base[0] == 1.0
        activate(host.model, "first")
        alone = evaluate(host, task, max_new_tokens=4)
        assert found.transfer.matrix[0] == tuple(r.free.mean for r in alone.results)
        assert found.transfer.matrix[1] == tuple(r.free.mean for r in found.after.results[:2])
        assert "backward transfer" in page(found, None, {**task, **sources[1]}, plot(found))
        with pytest.raises(ConfigError, match="as many sources of tasks as stages"):
            forgetting(host, task, sources[1], asking=ASKING, stages=[("first",)])
    finally:
        detach(host.model, "first")
        detach(host.model, "second")


def test_what_makes_no_sense(host: Host, sources: tuple[dict[str, Any], dict[str, Any]]) -> None:
    task, general = sources
    with pytest.raises(ConfigError, match="No adapter acts"):
        forgetting(host, task, general)
    adapt(host, 2.0)
    try:
        with pytest.raises(ConfigError, match="no general source"):
            forgetting(host, task, {})
        with pytest.raises(ConfigError, match="both the task and general"):
            forgetting(host, task, {"belt": task["belt"]})
        before = baseline(host, {**task, **general}, ASKING)
        with pytest.raises(ConfigError, match="asked otherwise"):
            forgetting(host, task, general, before=before, asking=Asking(max_new_tokens=3))
        with pytest.raises(ConfigError, match="can not be compared"):
            forgetting(host, task, {"pets": general["pets"]}, before=before)
    finally:
        detach(host.model, "new")


# ---- the page


class Seen(HTMLParser):
    """Tags and what they fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]


EVIL = "<script>alert(1)</script>\"'&\N{RIGHT-TO-LEFT OVERRIDE}\x07{{ 7 * 7 }}"


def test_the_page_lets_nothing_act(report: ForgettingReport, sources: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Whatever a model or a row says, it is text."""
    dumped = json.loads(report.json_text())
    for turned in dumped["turned"]:
        turned |= {"question": EVIL, "before": EVIL, "after": EVIL}
    dumped["vocabulary"]["leaks"] = [
        {"source": "pets", "row": 0, "reference": EVIL, "before": EVIL, "after": EVIL, "found": EVIL, "right": True}
    ]
    dumped["vocabulary"]["answers"] = dumped["vocabulary"]["words"] = [EVIL]
    for common in dumped["vocabulary"]["commonest"]:
        common["after"] = [EVIL, 1.0]
    dumped["before"]["base"] = EVIL
    evil = ForgettingReport.model_validate(dumped)
    verdict = gate(report.before, report.after, report.general, 2.0)
    text = page(evil, verdict, {**sources[0], **sources[1]}, plot(evil))
    seen = Seen(text)
    assert "script" not in seen.tags
    assert seen.fetched and all(found.startswith("data:image/png;base64,") for found in seen.fetched)
    assert "&lt;script&gt;alert(1)" in text
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in text and "\x07" not in text
    assert "49" not in re.findall(r"\{\{ 7 \* 7 \}\}|\b49\b", text)


def test_a_page_that_does_not_escape_is_seen(
    report: ForgettingReport, sources: tuple[dict[str, Any], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    module = sys.modules["tarsia.evaluate.page"]
    environment = module._template().environment
    monkeypatch.setattr(environment, "autoescape", False)
    plain = environment.from_string((Path(module.__file__).parent / "page.html.jinja").read_text(encoding="utf8"))
    monkeypatch.setattr(module, "_template", lambda: plain)
    with pytest.raises(AssertionError):
        test_the_page_lets_nothing_act(report, sources)


def test_the_page_shows_pictures_and_numbers(
    report: ForgettingReport, sources: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    verdict = gate(report.before, report.after, report.general, 2.0)
    write_page(report, verdict, {**sources[0], **sources[1]}, tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text(encoding="utf8")
    assert (tmp_path / "out.png").read_bytes() == plot(report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.html", "out.png"]
    assert "The gate is not passed" in text
    general = [t for t in report.turned if t.source in report.general]
    shown = sum(len(sources[1][t.source][t.index].pictures) for t in general)
    assert text.count("data:image/png;base64,") == 1 + shown and shown > 0
    for change in report.comparison.changes:
        assert f"{100 * change.free[0]:.1f} % &rarr; {100 * change.free[1]:.1f} %" in text
    with pytest.raises(ConfigError, match="can not be written"):
        write_page(report, verdict, {**sources[0], **sources[1]}, tmp_path / "no" / "out.html")


# ---- the verbs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, host: Host) -> Path:
    """A base, an adapter that forgets and one that does not, and what the base knows as files."""
    place = tmp_path_factory.mktemp("place")
    tiny.write_base(place / "base", host)
    tiny.write_adapter(place / "base", place / "strong", 2.0)
    tiny.write_adapter(place / "base", place / "weak", 1e-4)
    tiny.write_adapter(place / "base", place / "idle", 0.0)
    picture(shade=3).save(place / "belt.png")
    lengths = {"pets": 32, "cars": 32, "pets-4": 4, "cars-4": 4}
    for name in (*lengths, "belt"):
        asked = known(host, 5, name, lengths[name]) if name in lengths else tiny.rows(4)
        lines = [{"question": r.messages[0].text, "answer": r.messages[1].text} for r in asked if not r.pictures]
        lines += [{"question": "hm?", "answer": "a cat", "images": ["belt.png"]}]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    return place


SOURCES = (
    "--task", "belt.jsonl", "--general", "pets=pets-4.jsonl", "--general", "vehicles=cars-4.jsonl",
    "--max-new-tokens", "4",
)  # fmt: skip


def test_the_gate_decides_the_exit_code(tarsia: Any) -> None:
    code, out, err = tarsia("forgetting", "base", "--adapter", "strong", *SOURCES, "--max-forgetting", "2")
    assert (code, err) == (1, "")
    assert "The gate is not passed: the mean of the general sources lost" in out
    code, out, err = tarsia("forgetting", "base", "--adapter", "weak", *SOURCES, "--max-forgetting", "2")
    assert (code, err) == (0, "")
    assert "The gate is passed" in out
    assert "add --judged-by upper" in out
    code, out, _ = tarsia("forgetting", "base", "--adapter", "strong", *SOURCES)
    assert code == 0 and "gate" not in out
    for text in ("no adapter -> strong", "KL on references", "in the task's words", "lost on the mean"):
        assert text in out
    words = ("--max-forgetting", "2", "--judged-by", "upper")
    assert tarsia("forgetting", "base", "--adapter", "weak", *SOURCES, *words)[0] == 1


def test_a_limit_that_training_could_not_exceed_is_told_before_it(tarsia: Any, place: Path, tmp_path: Path) -> None:
    words = ("--general", "pets.jsonl", "--max-forgetting", "90")
    code, _, err = tarsia("train", recipe(place, tmp_path / "out", 1e-2), *words)
    assert code == 2
    assert "This limit can not be exceeded" in err and "66.7 right of 100" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["recipe.yaml"]


def test_a_source_that_the_base_never_answers_right_can_not_be_a_gate(tarsia: Any) -> None:
    words = ("--task", "belt.jsonl", "--general", "pets.jsonl", "--max-new-tokens", "4", "--max-forgetting", "2")
    code, _, err = tarsia("forgetting", "base", "--adapter", "strong", *words)
    assert code == 2
    assert "right in no row of pets" in err and "answers cut at 4 tokens" in err and "allow longer answers" in err


def test_lines_for_machines_and_a_page(tarsia: Any, tmp_path: Path) -> None:
    file = tmp_path / "out.html"
    code, out, err = tarsia(
        "forgetting",
        "base",
        "--adapter",
        "strong",
        *SOURCES,
        "--max-forgetting-each",
        "2",
        "--json",
        "--page",
        str(file),
    )
    first, second = out.splitlines()
    report = ForgettingReport.from_json(first)
    assert report.general == ("pets", "vehicles")
    verdict = json.loads(second)
    assert (code, verdict["event"], verdict["passed"]) == (1, "gate", False)
    assert "tarsia: The gate is not passed" in err
    assert "strong" in file.read_text(encoding="utf8") and file.with_suffix(".png").is_file()


def test_an_idle_adapter_is_named(tarsia: Any) -> None:
    code, _, err = tarsia("forgetting", "base", "--adapter", "idle", *SOURCES, "--max-forgetting", "2")
    assert code == 0
    assert err == "tarsia: warning: the adapter changes nothing on the general rows"


@pytest.mark.slow
def test_stages_of_adapters(tarsia: Any) -> None:
    words = ("--task", "two=pets.jsonl", "--general", "vehicles=cars.jsonl", "--json")
    two = ("forgetting", "base", "--adapter", "weak", "--adapter", "strong", "--task", "belt.jsonl", *words)
    found = {}
    for kind in ("stacked", "alone"):
        code, out, _ = tarsia(*two, "--stages", kind)
        assert code == 0
        found[kind] = ForgettingReport.from_json(out)
    assert found["stacked"].after.adapters == ("weak", "strong")
    assert found["alone"].after.adapters == ("strong",)
    for report in found.values():
        assert report.transfer is not None and report.transfer.tasks == ("belt", "two")
        assert report.transfer.matrix[0] == report.transfer.base
        assert report.transfer.matrix[1] == tuple(r.free.mean for r in report.after.results[:2])
    assert "BWT" in tarsia(*(w for w in two if w != "--json"), "--stages", "alone")[1]


def test_eval_with_a_limit(tarsia: Any) -> None:
    words = ("--data", "pets.jsonl", "--before", "--max-forgetting", "2")
    assert tarsia("eval", "base", "--adapter", "weak", *words)[0] == 0
    code, out, _ = tarsia("eval", "base", "--adapter", "strong", *words)
    assert code == 1 and "The gate is not passed" in out
    code, out, err = tarsia("eval", "base", "--adapter", "strong", *words, "--json")
    assert code == 1 and "not passed" in err
    assert [("event" in json.loads(line)) for line in out.splitlines()] == [False, False, False, True]


REFUSED = {
    "no adapter": (["forgetting", "base", *SOURCES], "No adapter is given", "--adapter FOLDER"),
    "no general": (["forgetting", "base", "--adapter", "weak"], "What must not be forgotten?", "--general"),
    "no limit of points": (
        ["forgetting", "base", "--adapter", "weak", *SOURCES, "--max-forgetting", "-1"], "no limit of points", "-1",
    ),
    "more than all": (
        ["forgetting", "base", "--adapter", "weak", *SOURCES, "--max-forgetting-each", "101"], "no limit", "101",
    ),
    "one name twice": (
        ["forgetting", "base", "--adapter", "weak", "--general", "pets.jsonl", "--general", "pets.jsonl"],
        "one name", "--general NAME=SOURCE",
    ),
    "task is general": (
        ["forgetting", "base", "--adapter", "weak", "--general", "pets.jsonl", "--task", "pets.jsonl"],
        "both the task and general", "pets",
    ),
    "no rows": (["forgetting", "base", "--adapter", "weak", *SOURCES, "--limit", "0"], "at least 1", "--limit 0"),
    "a stage without a task": (
        ["forgetting", "base", "--adapter", "weak", "--adapter", "strong", *SOURCES, "--stages", "alone"],
        "as many sources of tasks as stages", "2 stages, 1 sources",
    ),
    "eval without before": (
        ["eval", "base", "--adapter", "weak", "--data", "pets.jsonl", "--max-forgetting", "2"], "comparing", "--before",
    ),
    "missing": (["forgetting", "base", "--adapter", "weak", "--general", "nope.jsonl"], "missing", "nope.jsonl"),
    "judged by no limit": (
        ["forgetting", "base", "--adapter", "weak", *SOURCES, "--judged-by", "upper"], "no limit", "--max-forgetting",
    ),
    "train without a limit": (["train", "recipe.yaml", "--general", "pets.jsonl"], "none is given", "--max-forgetting"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tarsia: Any, case: str) -> None:
    words, what, detail = REFUSED[case]
    code, out, err = tarsia(*words)
    assert (code, out) == (2, "")
    assert what in err and detail in err


# ---- training


def recipe(place: Path, out: Path, rate: float, model: str = "base") -> str:
    values = {
        "model": str(place / model),
        "parts": [{"method": "lora", "select": "language.*.{q,v,o}", "rank": 2, "lr": rate}],
        "data": {
            "train": [{"path": str(place / "belt.jsonl")}],
            "eval": [{"path": str(place / "belt.jsonl"), "name": "held-out"}],
        },
        "steps": 6, "warmup": 1, "batch": 4, "out": str(out),
    }  # fmt: skip
    out.mkdir()
    (out / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf8")
    return str(out / "recipe.yaml")


def test_training_that_forgets_exits_with_one_and_marks_the_adapter(tarsia: Any, place: Path, tmp_path: Path) -> None:
    words = ("--general", "pets.jsonl", "--max-forgetting", "2", "--quiet", "--page", str(tmp_path / "out.html"))
    code, out, err = tarsia("train", recipe(place, tmp_path / "out", 0.5), *words)
    folder = tmp_path / "out" / "adapter"
    assert (code, out.strip()) == (1, str(folder))
    assert "tarsia: The gate is not passed" in err
    card = load(folder).card["gate"]
    assert (card["passed"], card["max_forgetting"], card["judged"]) == (False, 2.0, "estimate")
    assert card["mean"]["points"]["mean"] > 2
    assert "held-out" in (tmp_path / "out.html").read_text(encoding="utf8")
    code, _, err = tarsia("ask", "base", "--adapter", str(folder), "what is this?")
    assert (code, err) == (0, "tarsia: warning: the adapter out exceeds its limit on forgetting (the gate in its card)")


def test_training_that_keeps_exits_with_none(tarsia: Any, place: Path, tmp_path: Path) -> None:
    words = ("--general", "pets.jsonl", "--max-forgetting", "66")
    code, out, _ = tarsia("train", recipe(place, tmp_path / "out", 1e-2), *words)
    assert code == 0 and "The gate is passed" in out
    table, verdict = out.index("->"), out.index("The gate is passed")
    assert table < verdict and "pets" in out[table:verdict] and "held-out" in out[table:verdict]
    assert "no adapter -> out" in out
    folder = tmp_path / "out" / "adapter"
    assert load(folder).card["gate"]["passed"] is True
    assert load(folder).card["steps"] == 6
    assert tarsia("ask", "base", "--adapter", str(folder), "what is this?")[::2] == (0, "")


def test_a_run_that_dies_before_its_gate_leaves_an_adapter_that_says_so(
    tarsia: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tarsia.cli.gated.forgetting", dies)
    words = ("--general", "pets.jsonl", "--max-forgetting", "66", "--quiet")
    folder = tmp_path / "out" / "adapter"
    code, _, err = tarsia("train", recipe(place, tmp_path / "out", 1e-2), *words)
    assert code == 130 and "run the same command to measure it" in err and f"(it is saved in {folder})" in err
    assert load(folder).card["gate"]["passed"] is None
    assert "was never held to its limit" in tarsia("ask", "base", "--adapter", str(folder), "?")[2]
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert tarsia("train", str(tmp_path / "out" / "recipe.yaml"), *words)[0] == 0  # goes on: the gate alone is left
    assert load(folder).card["gate"]["passed"] is True


def test_a_base_whose_measuring_is_interrupted_says_that_nothing_is_trained(
    tarsia: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("tarsia.cli.gated.baseline", dies)
    words = ("--general", "pets.jsonl", "--max-forgetting", "66", "--quiet")
    code, out, err = tarsia("train", recipe(place, tmp_path / "out", 1e-2), *words)
    assert (code, out) == (143, "") and "nothing is trained yet" in err


def test_a_source_that_is_task_and_general_is_refused(tarsia: Any, place: Path, tmp_path: Path) -> None:
    words = ("--general", "held-out=pets.jsonl", "--max-forgetting", "66")
    code, _, err = tarsia("train", recipe(place, tmp_path / "out", 1e-2), *words)
    assert code == 2 and "have one name" in err and "held-out" in err


def test_bad_rows_are_told_before_anything_is_trained(tarsia: Any, place: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": "what?", "answer": "x", "images": ["nope.png"]}\n')
    words = ("--general", str(tmp_path / "bad.jsonl"), "--max-forgetting", "66")
    code, _, err = tarsia("train", recipe(place, tmp_path / "out", 1e-3), *words)
    assert code == 2 and "missing" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["recipe.yaml"]


# ---- the probes of the embedded base


def test_the_probes_are_held_out_and_different() -> None:
    from tarsia.base import texts

    found = rows.probes(30)
    assert set(found) == {"digits", "scenes", "words", "refusals", "talk"}
    assert len(found["digits"]) == len(found["scenes"]) == len(found["words"]) == 30
    for name in ("words", "refusals", "talk"):
        asked = [row.messages[0].text for row in found[name]]
        assert len(set(asked)) == len(asked) >= 10
        assert all(texts.held_out(question) for question in asked)
    shown = {row.pictures[0].load().tobytes() for row in found["digits"]}
    assert len(shown) == 30
    assert [row.row for row in found["talk"]] == list(range(len(found["talk"])))


def test_the_probes_are_the_default_of_the_embedded_base_alone() -> None:
    assert set(rows.general([], "mini-1", 5)) == set(rows.probes(5))
    with pytest.raises(ConfigError, match="Only embedded bases"):
        rows.general([], "some/other", None)


def test_reports_of_eval_make_a_report_of_transfer(report: ForgettingReport) -> None:
    """What is saved as JSON is enough."""
    from tarsia.evaluate import transfer

    again = [Report.from_json(x.json_text()) for x in (report.before, report.after)]
    assert transfer(again, ["pets", "cars"]).matrix[0] == (1.0, 1.0)


def test_stages_are_in_the_order_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots name an adapter of the picture's tower first, whichever was learnt first."""
    acting: list[tuple[str, ...]] = []
    monkeypatch.setattr("tarsia.core.attach.activate", lambda model, *names: acting.append(names))
    host: Any = type("Host", (), {"model": None})()
    assert stages_of(host, ["words", "eyes"], "stacked") == [("words",), ("words", "eyes")]
    assert stages_of(host, ["words", "eyes"], "alone") == [("words",), ("eyes",)]
    assert acting == [("eyes",)]
