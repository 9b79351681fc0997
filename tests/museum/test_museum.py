"""Every fault of the museum is refused, reported or harmless here, its sound twin is not, and the page says so."""

from __future__ import annotations

import pytest
from museum import page
from museum.fault import Harmless, Reported, Seen, fault
from museum.stages import FAULTS

from tarsia.core.errors import ConfigError, DataError

TEXT = page.PAGE.read_text(encoding="utf-8")
SAME = f"Seen with {page.versions()}," in TEXT
"""Whether the peers are of the versions that the page speaks of: others may do otherwise."""


LONG = {"damaged_checkpoint", "other_rows", "other_recipe"}


@pytest.mark.parametrize("key", [pytest.param(key, marks=pytest.mark.slow if key in LONG else ()) for key in FAULTS])
def test_fault(key, tmp_path):
    found, written = page.see(FAULTS[key], tmp_path), page.kept(TEXT, FAULTS[key])
    again = "run `PYTHONPATH=src:tests:. python -m museum.page` and look at what has changed"
    assert written is not None, f"docs/museum.md has no such row: {again}"
    if not SAME:  # then only what Tarsia does is held
        found = Seen(written.peer, found.tarsia)
    assert page.row(FAULTS[key], found) in TEXT.splitlines(), f"docs/museum.md is of another day: {again}\n{found}"


def test_the_page_is_these_rows_and_nothing_else():
    held = {key: page.kept(TEXT, fault) for key, fault in FAULTS.items()}
    assert None not in held.values(), [key for key, seen in held.items() if seen is None]
    counted = page.page({key: seen for key, seen in held.items() if seen is not None})
    seen_with = [line for line in TEXT.splitlines() if line.startswith("Seen with")]
    ours = [line if not line.startswith("Seen with") else seen_with[0] for line in counted.splitlines()]
    assert ours == TEXT.splitlines()


def test_there_are_enough():
    """The bar: 40, of 40, refused or reported."""
    kinds = [page.kind(fault) for fault in FAULTS.values()]
    assert len([kind for kind in kinds if kind != "harmless"]) >= 40
    assert all(fault.compare is not None and fault.stage in page.STAGES for fault in FAULTS.values())


def trial_of(monkeypatch, run, verdict, says="wrong"):
    """A fault that is no part of the museum."""
    monkeypatch.setattr("museum.fault.FAULTS", {})
    return fault("a trial", "owner/repo#1", stage="attach", verdict=verdict, says=says)(run)


def test_the_judge_sees_a_fault_that_nobody_refuses(monkeypatch, tmp_path):
    trial = trial_of(monkeypatch, lambda folder, planted: (), ConfigError)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        trial.faulty(tmp_path, trial.sound(tmp_path))


def test_the_judge_sees_a_refusal_for_another_reason(monkeypatch, tmp_path):
    def run(folder, planted):
        if planted:
            raise DataError("Something is wrong.")
        return ()

    with pytest.raises(AssertionError, match="DataError and not ConfigError"):
        trial_of(monkeypatch, run, ConfigError).faulty(tmp_path, ())
    with pytest.raises(AssertionError, match="is not in"):
        trial_of(monkeypatch, run, DataError, says="no such word").faulty(tmp_path, ())


def test_the_judge_sees_a_sound_run_that_is_refused(monkeypatch, tmp_path):
    def run(folder, planted):
        raise DataError("Something is wrong.")

    with pytest.raises(DataError):
        trial_of(monkeypatch, run, DataError).sound(tmp_path)


def test_the_judge_sees_a_report_that_is_always_made_and_one_that_never_is(monkeypatch, tmp_path):
    with pytest.raises(AssertionError, match="the sound run says so too"):
        trial_of(monkeypatch, lambda folder, planted: ["wrong"], Reported).sound(tmp_path)
    with pytest.raises(AssertionError, match="not reported"):
        trial_of(monkeypatch, lambda folder, planted: ["all is well"], Reported).faulty(tmp_path, ())


def test_the_judge_sees_harm_that_is_said_to_be_none(monkeypatch, tmp_path):
    trial = trial_of(monkeypatch, lambda folder, planted: [str(planted)], Harmless)
    with pytest.raises(AssertionError, match="not harmless"):
        trial.faulty(tmp_path, trial.sound(tmp_path))
