"""Numbers in the documents are those of bench/results, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from bench import render, run

LINE = {
    "case": "speed",
    "at": "2026-01-02T03:04:05+00:00",
    "commit": "abc1234",
    "processor": "Xeon",
    "cores": 2,
    "versions": {"torch": "2.13.0"},
    "values": {"ours": {"median s": 0.12345678, "runs": 3}, "theirs": {"median s": 2.0, "bound": "memory"}},
}


@pytest.mark.parametrize("page", render.pages(), ids=lambda page: page.name)
def test_documents_show_the_last_results(page: Path) -> None:
    text = page.read_text(encoding="utf8")
    assert text == render.render(text), "run `python -m bench.render`"


@pytest.mark.parametrize("name", ["blood-cells", "four-bits", "mini-1", "replay", "speed"])
def test_no_measured_number_stands_outside_of_a_result(name: str) -> None:
    text = (render.ROOT / "docs" / f"{name}.md").read_text(encoding="utf8")
    assert not re.findall(r".*\d\.\d.*", render.BLOCK.sub("", text))


def test_a_number_changed_by_hand_is_seen(tmp_path: Path) -> None:
    (tmp_path / "speed.jsonl").write_text("{}\n" + json.dumps(LINE) + "\n", encoding="utf8")
    page = render.render("a\n<!-- result: speed -->\nold\n<!-- end -->\nb\n", tmp_path)
    assert page.startswith("a\n") and page.endswith("<!-- end -->\nb\n") and "old" not in page
    assert "| | median s | runs | bound |\n|---|---:|---:|---:|\n" in page
    assert "| ours | 0.1235 | 3 |  |\n| theirs | 2 |  | memory |\n" in page
    assert render.render(page, tmp_path) == page
    assert render.render(page.replace("0.1235", "0.0235"), tmp_path) == page


def test_a_part_of_a_result_is_shown_alone(tmp_path: Path) -> None:
    values = {"slow: ours": {"s": 3.0}, "fast: ours": {"s": 1.0}, "fast: theirs": {"ms": 2.0}}
    (tmp_path / "speed.jsonl").write_text(json.dumps({**LINE, "values": values}) + "\n", encoding="utf8")
    page = render.render("<!-- result: speed fast -->\n<!-- end -->\n", tmp_path)
    assert "| | s | ms |\n|---|---:|---:|\n| ours | 1 |  |\n| theirs |  | 2 |\n" in page
    assert "slow" not in page and page.count("| ours |") == 1
    assert render.render(page, tmp_path) == page
    with pytest.raises(KeyError):
        render.render("<!-- result: speed none -->\n<!-- end -->\n", tmp_path)


def test_a_result_that_was_never_measured_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        render.render("<!-- result: dream -->\n<!-- end -->", tmp_path)


def test_results_are_appended(tmp_path: Path) -> None:
    run.record("speed", {"ours": run.spread([3.0, 1.0, 2.0])}, tmp_path)
    run.record("speed", {"ours": run.spread([1.0])}, tmp_path)
    first, last = (json.loads(line) for line in (tmp_path / "speed.jsonl").read_text(encoding="utf8").splitlines())
    assert first["values"] == {"ours": {"median s": 2.0, "least s": 1.0, "runs": 3}}
    assert last["values"]["ours"]["runs"] == 1
    assert first["versions"]["torch"] and first["commit"]


def test_a_result_carries_the_digest_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "base" / "mini-1" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    monkeypatch.setattr(run, "PACKAGE", tmp_path)
    run.record("speed", {"ours": run.spread([1.0])}, tmp_path)
    digest = hashlib.sha256(b"weights").hexdigest()
    assert json.loads((tmp_path / "speed.jsonl").read_text(encoding="utf8"))["base"] == {"mini-1": digest}
    assert f"mini-1 {digest[:12]}" in render.render("<!-- result: speed -->\n<!-- end -->", tmp_path)


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["no_such"]) == 2
    assert "cli_help" in capsys.readouterr().err
