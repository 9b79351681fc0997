"""A checkpoint is whole or not there; a damaged one is told and passed over; a folder has one run."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarsia.core.errors import ConfigError, TrainingError
from tarsia.train.checkpoint import Checkpoint, found, locked, newest, read, write


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"patch/a": torch.full((64,), float(step)), "n": torch.tensor(step)}, {"recipe": "abc"})


def test_it_comes_back_to_the_bit_and_two_are_kept(tmp_path):
    for step in (1, 2, 10):
        path = write(tmp_path, checkpoint(step))
    assert [p.name for p in found(tmp_path)] == ["step-000010", "step-000002"]
    again = read(path)
    assert (again.step, again.values) == (10, {"recipe": "abc"})
    assert torch.equal(again.tensors["patch/a"], checkpoint(10).tensors["patch/a"])


def test_the_millionth_step_is_newer(tmp_path):
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        write(tmp_path, checkpoint(step))
    assert [p.name for p in found(tmp_path)] == ["step-1000001", "step-1000000"]


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest(tmp_path / "none") == (None, ())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.data())
def test_any_wrong_byte_of_the_tensors_falls_back_loudly(tmp_path, data):
    write(tmp_path, checkpoint(1))
    path = write(tmp_path, checkpoint(2)) / "tensors.safetensors"
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    path.write_bytes(whole[:at] if cut else whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    kept, notices = newest(tmp_path)
    assert kept is not None
    assert kept.step == 1
    assert len(notices) == 1
    assert "step-000002" in notices[0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(at=st.integers(0, 150), bit=st.integers(0, 7))
def test_any_wrong_bit_of_the_values_is_harmless_or_told(tmp_path, at, bit):
    write(tmp_path, checkpoint(1))
    path = write(tmp_path, checkpoint(2)) / "state.json"
    whole = bytearray(path.read_bytes())
    whole[at % len(whole)] ^= 1 << bit
    path.write_bytes(whole)
    kept, notices = newest(tmp_path)
    assert (kept.step, kept.values) == (2 if not notices else 1, {"recipe": "abc"})


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
def test_a_missing_file_falls_back_and_nothing_left_is_an_error(tmp_path, file):
    write(tmp_path, checkpoint(1))
    (write(tmp_path, checkpoint(2)) / file).unlink()
    assert newest(tmp_path)[0].step == 1
    (tmp_path / "step-000001" / file).unlink()
    with pytest.raises(TrainingError, match="No checkpoint can be read"):
        newest(tmp_path)


@pytest.mark.parametrize("call", [0, 1, 2, 3, 4])
def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch, call):
    write(tmp_path, checkpoint(1))
    calls = iter(range(100))

    def limited(function):
        def run(*args, **keywords):
            if next(calls) >= call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **keywords)

        return run

    monkeypatch.setattr(os, "fsync", limited(os.fsync))
    monkeypatch.setattr(os, "replace", limited(os.replace))
    with pytest.raises(TrainingError, match="disk is full") as caught:
        write(tmp_path, checkpoint(2))
    assert "step-000001" in str(caught.value)
    kept, notices = newest(tmp_path)
    assert kept.step == (1 if call < 4 else 2), "the last call only makes the new name durable"
    assert notices == ()
    assert not list(tmp_path.glob(".partial*"))


def test_one_run_for_each_folder(tmp_path):
    with locked(tmp_path), pytest.raises(ConfigError, match="Another run") as caught, locked(tmp_path):
        pass
    assert str(os.getpid()) in str(caught.value)
    with locked(tmp_path):
        pass


def test_a_folder_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can not be written"), locked(tmp_path / "file" / "out"):
        pass
