"""`tarsia ask` and `tarsia eval` from folder to output, and everything that they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.processors import picture
from evaluate import tiny

from tarsia.adapter import Host, load, open_base, probe, put, save
from tarsia.cli.adapted import named
from tarsia.core.attach import Part, attach, detach
from tarsia.evaluate import Chat, Report, effects, generate
from tarsia.methods.lora import LoRAConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two bases, adapters, a picture and rows."""
    place = tmp_path_factory.mktemp("place")
    tiny.write_base(place / "base", tiny.host(0))
    tiny.write_base(place / "other", tiny.host(1))
    tiny.write_adapter(place / "base", place / "belt", 2.0)
    tiny.write_adapter(place / "base", place / "idle", 0.0)
    picture(shade=3).save(place / "belt.png")
    rows = [
        {"question": "what is this? " * (1 + i % 3), "answer": tiny.ANSWERS[i % 3], "images": ["belt.png"] * (i % 2)}
        for i in range(6)
    ]
    for name in ("rows", "more"):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return place


def with_probe(base: Path, folder: Path, size: float, error: float) -> None:
    """An adapter whose recorded logits are off by ``error``."""
    tiny.write_adapter(base, folder, size)
    host = open_base(str(base))
    adapter = load(folder, host)
    put(host, adapter, "made")
    recorded = probe(
        host, {"input_ids": torch.arange(5, 11)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    )
    save(replace(adapter, probe=replace(recorded, logits=recorded.logits + error)), folder)


def test_an_adapter_is_proved_before_it_answers(tarsia, place: Path) -> None:
    with_probe(place / "base", place / "proved", 2.0, 0.0)
    with_probe(place / "base", place / "drifted", 2.0, 1.0)
    assert tarsia("ask", "base", "--adapter", "proved", "what is this?")[::2] == (0, "")
    code, out, err = tarsia("ask", "base", "--adapter", "drifted", "what is this?")
    assert (code, out) == (2, "")
    assert "not those of the day the adapter was saved" in err
    code, _, err = tarsia("ask", "base", "--adapter", "proved", "--precision", "bfloat16", "what is this?")
    assert code == 0
    assert "the adapter proved is not proved here: it was recorded in float32" in err


def test_ask(tarsia, place: Path) -> None:
    code, plain, err = tarsia("ask", "base", "--image", "belt.png", "what is this?")
    assert (code, err) == (0, "")
    host = open_base(str(place / "base"))
    sample = tiny.sample("what is this?", "", 1, row=0)
    shown = sample.pictures[0].__class__(place / "belt.png", "belt.png", "tests", 0)
    assert plain.strip() == generate(host, [sample.__class__(sample.messages[:1], (shown,), "tests", 0)], 64)[0]
    code, out, err = tarsia("ask", "base", "--adapter", "belt", "--image", "belt.png", "what is this?", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["answer"] != plain.strip()
    assert found["base"] == "base"
    assert found["digest"] == host.fingerprint.weights
    assert found["adapters"]["belt"] > 0.1
    assert found["form"] == "not quantised"


def test_the_form_of_the_base_is_shown(tarsia) -> None:
    form = "rounded to nf4 as it is opened (language)"
    four = ("--four-bits", "{select: language}", "--json")
    assert json.loads(tarsia("ask", "base", "what is this?", *four)[1])["form"] == form
    words = ("eval", "base", "--data", "rows.jsonl", "--limit", "1", "--max-new-tokens", "1")
    assert json.loads(tarsia(*words, *four)[1])["form"] == form
    assert f", {form}, no adapter: exact" in " ".join(tarsia(*words, *four[:2])[1].split())


def test_a_template_that_reads_the_clock_is_given_its_date(tarsia, place: Path) -> None:
    """Llama 3.2's template does; the same date goes into training, measuring and asking."""
    shutil.copytree(place / "base", place / "clock", dirs_exist_ok=True)
    written = place / "clock" / "chat_template.jinja"
    head = "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
    written.write_text(head + "{{ date_string }}" + written.read_text())
    code, _, err = tarsia("ask", "clock", "?")
    assert code == 2
    assert "reads the clock" in err and "--variable" in err
    words = ("ask", "clock", "--variable", "date_string=26 Jul 2024", "what is this?")
    assert tarsia(*words)[0] == 0
    host = open_base(str(place / "clock"), variables={"date_string": "26 Jul 2024"})
    assert Chat(host).prompt(tiny.sample("what is this?", "")).startswith("26 Jul 2024")


def test_a_base_in_another_precision(tarsia) -> None:
    words = ("ask", "base", "--adapter", "belt", "what is this?", "--json", "--precision")
    moved = [json.loads(tarsia(*words, precision)[1])["adapters"]["belt"] for precision in ("float32", "bfloat16")]
    assert moved[0] != moved[1]
    assert moved[0] == pytest.approx(moved[1], rel=0.1)


def test_an_adapter_that_does_nothing_is_named_loudly(tarsia) -> None:
    _, plain, _ = tarsia("ask", "base", "what is this?")
    code, out, err = tarsia("ask", "base", "--adapter", "idle", "--adapter", "belt", "what is this?", "--json")
    assert code == 0
    assert err == "tarsia: warning: the adapter idle changes nothing here (the question)"
    assert json.loads(out)["adapters"]["idle"] == 0.0
    assert json.loads(out)["adapters"]["belt"] > 0.1
    code, out, err = tarsia("ask", "base", "--adapter", "idle", "what is this?")
    assert out == plain
    assert "idle changes nothing" in err
    _, _, err = tarsia("eval", "base", "--adapter", "idle", "--data", "rows.jsonl", "--max-new-tokens", "2")
    assert err == "tarsia: warning: the adapter idle changes nothing here (rows)"


def test_adapters_of_two_runs_act_together(tarsia, place: Path) -> None:
    """Training leaves each in a folder `adapter` of its run's."""
    for name in ("first", "second"):
        shutil.copytree(place / "belt", place / "runs" / name / "adapter")
    folders = ("runs/first/adapter", "runs/second/adapter/")
    code, out, err = tarsia("ask", "base", "--adapter", folders[0], "--adapter", folders[1], "--json", "?")
    assert (code, err) == (0, "")
    assert set(json.loads(out)["adapters"]) == {"first", "second"}


@pytest.mark.parametrize(
    "folders, names",
    [
        (["runs/belt"], ["belt"]),
        (["runs/belt/adapter", "bin"], ["belt", "bin"]),
        (["a/run/adapter", "b/run/adapter", "c"], ["a-run", "b-run", "c"]),
        (["a/x/run", "b/x/run"], ["a-x-run", "b-x-run"]),
        (["x/../belt/.", "my run (2)/"], ["belt", "my-run-2"]),
        (["nets/keys"], ["nets-keys"]),
        (["/adapter"], ["adapter"]),
    ],
)
def test_an_adapter_is_named_after_its_folder(
    folders: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named(folders) == names


def test_effects_leave_the_active_set_as_it_was() -> None:
    host = tiny.host()
    attach(host.model, host.sites, [Part("lora", "language.*.q", LoRAConfig(rank=2, alpha=4))], name="new")
    assert effects(host, tiny.rows(3)) == {"new": 0.0}
    assert active_names(host) == {"new"}
    detach(host.model, "new")
    assert effects(host, tiny.rows(3)) == {}


def active_names(host: Host) -> set[str]:
    from tarsia.evaluate import active

    return set(active(host))


REFUSED = {
    "missing picture": (["ask", "base", "--image", "nope.png", "?"], "There is no such picture", "nope.png"),
    "no picture": (["ask", "base", "--image", "rows.jsonl", "?"], "not a picture", "rows.jsonl"),
    "missing adapter": (["ask", "base", "--adapter", "bolt", "?"], "adapter", "bolt"),
    "base as adapter": (["ask", "base", "--adapter", "other", "?"], "adapter", "other"),
    "wrong base": (["ask", "other", "--adapter", "belt", "?"], "belongs to another base", "weights"),
    "wrong base, eval": (
        ["eval", "other", "--adapter", "belt", "--data", "rows.jsonl"], "belongs to another base", "weights",
    ),
    "missing base": (["ask", "bass", "?"], "There is no such model", "bass"),
    "marker in the question": (["ask", "base", "what <image> is"], "control token", "<image>"),
    "end of turn in the question": (["ask", "base", "done<|im_end|>"], "control token", "<|im_end|>"),
    "template variable": (["ask", "base", "--variable", "today", "?"], "NAME=TEXT", "today"),
    "unknown precision": (["ask", "base", "--precision", "float8", "?"], "float8", "bfloat16"),
    "unknown device": (["ask", "base", "--device", "abacus", "?"], "device is not here", "abacus"),
    "no tokens": (["ask", "base", "--max-new-tokens", "0", "?"], "at least one token", "0"),
    "adapter twice": (["ask", "base", "--adapter", "belt", "--adapter", "belt/", "?"], "Two adapters", "belt"),
    "missing data": (["eval", "base", "--data", "nope.jsonl"], "missing", "nope.jsonl"),
    "unknown metric": (["eval", "base", "--data", "rows.jsonl", "--metric", "exat"], "no metric", "did you mean exact"),
    "misspelt option": (["ask", "base", "--adaptor", "belt", "?"], "does not take this", "did you mean --adapter"),
    "strange option": (["ask", "base", "?", "--quux"], "tarsia ask does not take", "see tarsia ask --help"),
    "one name twice": (["eval", "base", "--data", "rows.jsonl", "--data", "rows.jsonl"], "one name", "NAME=SOURCE"),
    "limit 0": (["eval", "base", "--data", "rows.jsonl", "--limit", "0"], "at least 1", "--limit 0"),
    "before nothing": (["eval", "base", "--data", "rows.jsonl", "--before"], "No adapter", "--adapter FOLDER"),
    "metric that does not fit": (
        ["eval", "base", "--data", "rows.jsonl", "--metric", "numeric", "--max-new-tokens", "1"], "number", "use exact",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tarsia, case: str) -> None:
    """Exit code 2, no output, and an error that says what was given."""
    words, what, detail = REFUSED[case]
    code, out, err = tarsia(*words)
    assert (code, out) == (2, "")
    assert what in err
    assert detail in err


def test_a_broken_adapter_is_never_the_base_in_silence(tarsia, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "belt", tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    code, out, _ = tarsia("ask", "base", "--adapter", str(tmp_path / "cut"), "?")
    assert (code, out) == (2, "")


def test_eval_before_and_after(tarsia) -> None:
    words = ["eval", "base", "--adapter", "belt", "--data", "rows.jsonl", "--data", "again=more.jsonl", "--before"]
    code, out, err = tarsia(*words, "--limit", "5", "--max-new-tokens", "4", "--json")
    assert (code, err) == (0, "")
    before, after, comparison = out.splitlines()
    reports = [Report.from_json(text) for text in (before, after)]
    assert [r.adapters for r in reports] == [(), ("belt",)]
    assert [[(r.source, r.n) for r in report.results] for report in reports] == [[("rows", 5), ("again", 5)]] * 2
    assert reports[0].digest == reports[1].digest
    assert reports[0].results[0].loss != reports[1].results[0].loss
    assert reports[0].scoring == reports[1].scoring == "packed"
    assert [c["source"] for c in json.loads(comparison)["changes"]] == ["rows", "again"]
    assert tarsia(*words, "--limit", "5", "--max-new-tokens", "4", "--json") == (code, out, err)


def test_eval_prints_tables(tarsia) -> None:
    code, out, _ = tarsia(
        "eval", "base", "--adapter", "belt", "--data", "rows.jsonl", "--max-new-tokens", "2", "--before"
    )
    assert code == 0
    for text in ("no adapter: exact", "belt: exact", "no adapter -> belt", "95% intervals", "constrained"):
        assert text in out


def test_bases_of_both_seeds_differ(place: Path) -> None:
    """Otherwise the wrong base would be no wrong base."""
    digests: Sequence[str] = [open_base(str(place / name)).fingerprint.weights for name in ("base", "other")]
    assert digests[0] != digests[1]
