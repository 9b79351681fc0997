"""The calibration of a machine: measured once, kept whole, and never believed where it is not this machine's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tarsia.core.errors import PlanError
from tarsia.plan import calibrate as module
from tarsia.plan.calibrate import Calibration, Key, calibrate, folder, here, kept, load
from tarsia.plan.overhead import Overhead
from tarsia.plan.probes import KINDS, QUICK, probes
from tarsia.plan.speeds import Kernels, Point
from tarsia.plan.time import Measured
from tarsia.plan.work import Kind, Work

Progress = Callable[[str, float], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TARSIA_CACHE", str(tmp_path))
    return tmp_path / "calibration"


def made(key: Key | None = None, **changes: Any) -> Calibration:
    points = tuple(
        Point(kind=probe.kind, dtype=probe.dtype, size=probe.size, seconds=1e-6, spread=0.1)
        for probe in probes(QUICK, "cpu", ("float32",))
    )
    values = {
        "format": module.FORMAT,
        "key": key or here(),
        "date": "2026-01-02T03:04:05+00:00",
        "took": 60.0,
        "rounds": 9,
        "points": points,
        "overhead": Overhead(forward=1e-5, backward=1e-6, update=1e-6, step=1e-4),
        "page": 1e-9,
    }
    return Calibration.model_validate(values | changes)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Instead of measuring: what was asked for, in order."""
    asked: list[str] = []

    def measure(scale: Any, seconds: float, device: str, progress: Progress, dtypes: Any = ()) -> Calibration:
        asked.append(device)
        return made(here(device))

    monkeypatch.setattr(module, "measure", measure)
    return asked


@pytest.fixture(scope="module")
def quick() -> Calibration:
    told: list[tuple[str, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TARSIA_CACHE", "/nowhere/at/all")
        found = calibrate(0.01, quick=True, progress=lambda what, share: told.append((what, share))).calibration
    assert told and all(0 <= share <= 1 for _, share in told)
    assert [share for _, share in told] == sorted(share for _, share in told)
    return found


def test_a_quick_one_has_everything_and_keeps_nothing(quick: Calibration) -> None:
    assert {point.kind for point in quick.points} == KINDS
    assert quick.rounds >= module.ROUNDS and quick.took > 0 and quick.key == here()
    assert quick.overhead.forward > 0
    assert quick.key.kernel and " " not in quick.key.kernel


def test_every_kind_of_work_has_seconds_in_every_dtype(quick: Calibration) -> None:
    speeds = Measured(quick)
    sizes = {point.kind: point.size for point in quick.points}
    for kind, size in sizes.items():
        for dtype in ("float32", "bfloat16", "float16", "int64"):
            assert speeds.seconds(Work(kind, dtype, size, 1)) > 0
    assert speeds.seconds(Work(Kind.NOTHING, "float32", (), 0)) == 0
    assert speeds.seconds(Work(Kind.PRODUCT, "float32", (0, 4, 4), 0)) == 0


def test_what_is_said_is_when_and_how_evenly(quick: Calibration) -> None:
    speeds = Measured(quick)
    assert quick.date[:10] in speeds.basis and "measured on this machine" in speeds.basis
    assert speeds.error > quick.spread and speeds.waits


def test_measured_once_and_kept(measured: list[str], cache: Path) -> None:
    first = calibrate()
    assert measured == ["cpu"] and not first.notice
    assert calibrate() == first and measured == ["cpu"]
    assert kept() == first.calibration
    assert [path.suffix for path in cache.iterdir()] == [".json"]
    assert calibrate(anew=True).calibration == first.calibration and measured == ["cpu", "cpu"]


def test_another_number_of_threads_is_another_machine(measured: list[str], cache: Path) -> None:
    calibrate()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert kept() is None
        calibrate()
    finally:
        torch.set_num_threads(before)
    assert len(measured) == 2 and len(list(cache.iterdir())) == 2


def _broken(text: str) -> str:
    return text[: len(text) // 2]


def _no_object(text: str) -> str:
    return "[1, 2]"


def _older(text: str) -> str:
    return json.dumps({**json.loads(text), "format": 0})


def _no_number(text: str) -> str:
    return text.replace('"page": 1e-9', '"page": NaN')


def _too_little(text: str) -> str:
    values = json.loads(text)
    values["points"] = [point for point in values["points"] if point["kind"] != "attention"]
    return json.dumps(values)


def _negative(text: str) -> str:
    values = json.loads(text)
    values["points"][3]["seconds"] = -1.0
    return json.dumps(values)


def _more(text: str) -> str:
    return json.dumps({**json.loads(text), "colour": "red"})


def _elsewhere(text: str) -> str:
    values = json.loads(text)
    values["key"]["torch"] = "1.0"
    return json.dumps(values)


DAMAGE = {
    "can not be read": (_broken, _no_object),
    "another version": (_older,),
    "is damaged": (_no_number, _too_little, _negative, _more),
    "of something else": (_elsewhere,),
}


@pytest.mark.parametrize("said, spoil", [(said, spoil) for said, every in DAMAGE.items() for spoil in every])
def test_a_file_that_can_not_be_believed_is_made_anew_and_that_is_said(
    measured: list[str], said: str, spoil: Callable[[str], str]
) -> None:
    first = calibrate()
    path = folder() / f"{here().name}.json"
    whole = path.read_text()
    path.write_text(spoil(whole))
    assert path.read_text() != whole
    with pytest.raises(PlanError, match=said):
        load(path, here())
    again = calibrate()
    assert len(measured) == 2 and said in again.notice and "Measured anew" in again.notice
    assert again.calibration == first.calibration and kept() == first.calibration


def test_a_file_that_is_not_text_is_made_anew(measured: list[str]) -> None:
    calibrate()
    (folder() / f"{here().name}.json").write_bytes(b"\xff\xfe\x00")
    assert "can not be read" in calibrate().notice


def test_what_is_cut_off_while_it_is_written_leaves_what_was_there(
    measured: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = calibrate()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    again = calibrate(anew=True)
    assert again.calibration == first.calibration and "No space left" in again.notice
    monkeypatch.undo()
    monkeypatch.setenv("TARSIA_CACHE", str(cache.parent))
    assert kept() == first.calibration
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_where_nothing_can_be_written_says_where(measured: list[str], cache: Path) -> None:
    cache.write_text("in the way")
    found = calibrate()
    assert found.calibration == made() and "can not be kept" in found.notice and str(cache) in found.notice


def test_the_spread_is_kept_and_counts() -> None:
    quiet, noisy = (
        Measured(made(points=tuple(p.model_copy(update={"spread": s}) for p in made().points))) for s in (0.01, 0.3)
    )
    assert noisy.error > quiet.error and "30%" in noisy.basis


def test_a_point_is_the_median_and_half_the_middle_half() -> None:
    probe = next(iter(probes(QUICK, "cpu", ("float32",))))
    point = module._point(probe, [1.0, 1.0, 1.0, 1.0, 9.0])
    assert point.seconds == 1.0
    assert module._point(probe, [0.8, 0.9, 1.0, 1.1, 1.2]).spread == pytest.approx(0.15)


def test_kernels_take_the_time_of_the_dtype() -> None:
    points = [
        Point(kind=Kind.STREAM, dtype=dtype, size=(64,), seconds=seconds, spread=0.0)
        for dtype, seconds in (("float32", 1.0), ("bfloat16", 3.0))
    ]
    kernels = Kernels.of(points)
    found = {dtype: kernels.seconds(Work(Kind.STREAM, dtype, (64,), 1)) for dtype in ("float32", "float16", "bool")}
    assert found == {"float32": 1.0, "float16": pytest.approx(3.0), "bool": 1.0}
