"""What was in memory: sizes known beforehand, found to the byte."""

from __future__ import annotations

import ctypes
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tarsia.train import memory
from tarsia.train.memory import ERROR, Live, Phase, can_watch, live, phase


def block(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def changes(watched: Live) -> list[int]:
    """What each entry of the line added."""
    held = [0, *(held for _, held in watched.line)]
    return [after - before for before, after in pairwise(held)]


class TestLine:
    def test_each_block_counts_by_its_size_from_birth_to_death(self) -> None:
        with live() as watched:
            a = block(1000)
            b = torch.empty(30, dtype=torch.float64)
            del a
            c = block(7)
            del b, c
        assert changes(watched) == [1000, 240, -1000, 7, -240, -7]
        assert watched.peak == 1240

    def test_views_and_what_is_done_in_place_are_no_blocks(self) -> None:
        a = torch.zeros(100)
        with live() as watched:
            b = a[10:20].view(2, 5).t()
            b.neg_()
            a.zero_()
            del b
        assert watched.line == []
        assert watched.peak == 0

    def test_a_view_keeps_its_block(self) -> None:
        with live() as watched:
            a = block(1000)
            view = a[3:4]
            del a
            block(10)
            del view
        assert changes(watched) == [1000, 10, -10, -1000]
        assert watched.peak == 1010

    def test_a_backward_pass(self) -> None:
        x, w = torch.randn(8, 16), torch.randn(16, 32, requires_grad=True)
        with live() as watched:
            watched.mark("forward")
            y = (x @ w).relu().sum()
            watched.mark("backward")
            y.backward()
            del y
        product, loss, weight = 8 * 32 * 4, 4, 16 * 32 * 4
        # relu's output is kept, what goes into it is not; then 1, dL/drelu's expansion of it, dL/dproduct, dL/dw
        assert changes(watched) == [product, product, -product, loss, 4, product, -product, weight, -product, -4, -4]
        assert watched.peak == product + loss + 4 + weight
        assert watched.peaks == {"": 0, "forward": 2 * product, "backward": watched.peak}
        assert watched.phase == "backward"

    def test_moments_rise(self) -> None:
        with live() as watched:
            for _ in range(100):
                block(100)
        moments = [moment for moment, _ in watched.line]
        assert len(moments) == 200
        assert moments == sorted(moments)
        assert moments[0] > 0

    def test_it_is_filled_in_after_an_error_and_the_next_one_works(self) -> None:
        with pytest.raises(RuntimeError, match="shape"), live() as watched:
            block(50).view(7)
        assert watched.peak == 50
        assert can_watch()


class TestBefore:
    """What was alive at the start."""

    def test_what_stands_is_subtracted_when_it_dies(self) -> None:
        old, other = block(400), block(90)
        view = old[1:]
        with live([old.untyped_storage(), other.untyped_storage()]) as watched:
            a = block(1000)
            del old
            del view
            b = block(100)
        assert changes(watched) == [1000, -400, 100]
        assert watched.peak == 1000
        del a, b, other

    def test_another_is_as_if_it_had_stayed(self) -> None:
        old = block(400)
        with live() as watched:
            del old
            block(10)
        assert changes(watched) == [10, -10]

    def test_a_block_of_an_earlier_record_is_not_of_this_one(self) -> None:
        with live():
            old = block(3000)
        with live() as watched:
            del old
            block(10)
        assert changes(watched) == [10, -10]

    def test_what_dies_after_the_end_is_no_error(self) -> None:
        old = block(400)
        with live([old.untyped_storage()]) as watched:
            a = block(5)
        del old
        assert changes(watched) == [5]
        del a


class TestMarks:
    def test_the_peak_is_in_the_phase_that_was_said_last(self) -> None:
        with live() as watched:
            phase(Phase.FORWARD)
            a = block(10)
            phase(Phase.BACKWARD)
            b = block(5)
            del b
            phase(Phase.UPDATE)
            del a
        assert watched.marks == [(0, "forward"), (1, "backward"), (3, "update")]
        assert watched.phase == "backward"
        assert watched.peaks == {"": 0, "forward": 10, "backward": 15, "update": 10}

    def test_a_phase_that_comes_again(self) -> None:
        with live() as watched:
            for size in (10, 30):
                phase("forward")
                block(size)
                phase("backward")
                block(size + 1)
        assert watched.peaks == {"": 0, "forward": 30, "backward": 31}

    def test_nobody_listens_outside(self) -> None:
        with live() as watched:
            pass
        phase("forward")
        assert watched.marks == []


class TestAlone:
    def test_a_profiler_is_not_disturbed(self) -> None:
        with torch.autograd.profiler.profile(use_kineto=True):
            assert not can_watch()
            with pytest.raises(RuntimeError, match="profiled already"), live():
                pass
        assert can_watch()

    def test_other_threads_are_not_seen(self) -> None:
        with live() as watched:
            thread = threading.Thread(target=block, args=(1000,))
            thread.start()
            thread.join()
        assert watched.line == []

    def test_a_mark_of_another_thread_has_no_place(self) -> None:
        with live() as watched:
            thread = threading.Thread(target=watched.mark, args=("elsewhere",))
            thread.start()
            thread.join()
            # an address that it used could be one of ours
            assert watched._signs == []

    def test_nothing_is_written(self, capfd: pytest.CaptureFixture[str]) -> None:
        library = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
        level = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
        before = level.value
        old = block(400)
        with live():
            # torch itself warns once a second at most
            assert level.value >= ERROR
            del old
        assert level.value == before
        assert capfd.readouterr().err == ""


def test_a_torch_with_another_log_is_watched_too(monkeypatch):
    library = ctypes.CDLL("libc.so.6")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    with memory._hushed():
        pass
