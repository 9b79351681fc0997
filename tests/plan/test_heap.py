"""The process's memory: every part from a hand-made rehearsal, and a real process held to what is said to stand."""

from __future__ import annotations

import json
import platform
import resource
from types import SimpleNamespace

import pytest
import torch

from tarsia.plan import heap
from tarsia.plan.foretell import Plan
from tarsia.plan.heap import CODE, LIBRARIES, PROBED, PRODUCTS, ROOM, WORD, Room, process, standing
from tarsia.plan.ledger import FOREVER, Block, Category, Mark
from tarsia.plan.rehearse import Rehearsal
from tarsia.train.process import Resident

MB = 10**6
VOCABULARY, HIDDEN = 1000, 100


def planned(tmp_path, *, stored="bfloat16", dtype=torch.float32, tied=True, draws=4, codes=0, prepared=0, saving=8):
    """100 MB of weights, 20 MB at most in prepare, 50 MB in a step, and ``saving`` in the probe."""
    (tmp_path / "config.json").write_text(json.dumps({"dtype": stored}), encoding="utf8")
    blocks = [Block(100 * MB, 0, "load", "empty", category=Category.WEIGHTS)]
    if codes:
        blocks.append(Block(codes, 1, "load", "empty", category=Category.QUANTISED))
    blocks += [
        Block(prepared + 1, 2, "prepare", "svd", 3, Category.TEMPORARY),
        Block(30 * MB, 5, "forward", "mm", 9, Category.ACTIVATIONS),
        Block(20 * MB, 6, "forward", "mm", 7, Category.TEMPORARY),
        Block(saving * MB, 12, "save", "mm", 13, Category.TEMPORARY),
    ]
    places = ((0, "load"), (2, "prepare"), (4, "step"), (5, "forward"), (8, "backward"), (10, "update"), (12, "save"))
    marks = tuple(Mark(moment, phase) for moment, phase in (*places, (14, "")))
    rehearsed = Rehearsal(
        tuple(blocks),
        marks,
        15,
        {},
        (),
        (),
        dtype,
        VOCABULARY,
        sum(b.size for b in blocks if b.phase == "load") // dtype.itemsize,
    )
    text = SimpleNamespace(vocab_size=VOCABULARY, hidden_size=HIDDEN, tie_word_embeddings=tied)
    config = SimpleNamespace(tie_word_embeddings=tied, get_text_config=lambda: text)
    outline = SimpleNamespace(path=tmp_path, anatomy=SimpleNamespace(config=config))
    return Plan(None, outline, rehearsed, SimpleNamespace(all_draws=draws), None, 500 * MB)


@pytest.fixture(autouse=True)
def glibc(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setitem(ROOM, "glibc", Room(0.5, 0.25))


PROGRAM = 500 * MB + LIBRARIES + CODE + WORD * VOCABULARY + PRODUCTS


def test_a_step_is_the_program_the_weights_the_tensors_and_the_room_between_them(tmp_path):
    found = process(planned(tmp_path), 500 * MB)
    assert found.phases["forward"] == PROGRAM + 100 * MB + 50 * MB + 25 * MB
    assert found.phases["backward"] == PROGRAM + 100 * MB + 30 * MB + 15 * MB
    assert found.phase == "forward"
    assert found.peak == sum(found.parts.values()) == found.phases["forward"]
    assert found.parts["room between blocks"] == 25 * MB


def test_after_the_steps_a_part_of_their_room_is_left(tmp_path):
    found = process(planned(tmp_path, saving=400), 500 * MB)
    assert found.phases["save"] == PROGRAM + PROBED + 100 * MB + 400 * MB + round(0.25 * 50 * MB)
    assert found.phase == "save"


def test_what_prepare_has_freed_is_left_in_part(tmp_path):
    found = process(planned(tmp_path, prepared=40 * MB), 500 * MB)
    assert found.parts["left of preparing"] == 10 * MB
    assert found.phases["forward"] == PROGRAM + 185 * MB


def test_files_are_read_beside_what_is_made_of_them(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0" * 5000)
    found = process(planned(tmp_path), 500 * MB)
    assert found.phases["loading"] == 500 * MB + CODE + 100 * MB + 5000


def test_files_that_are_not_here_are_as_large_as_their_numbers(tmp_path):
    assert process(planned(tmp_path), 0).phases["loading"] == CODE + 100 * MB + 50 * MB
    assert process(planned(tmp_path, stored="float32"), 0).phases["loading"] == CODE  # mapped: read as it is used
    codes = process(planned(tmp_path, stored="float32", codes=MB), 0)
    assert codes.phases["loading"] == CODE + 101 * MB + 101 * MB


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_a_mapped_table_that_are_never_asked_for_are_not_read(tmp_path, tied):
    values = {"stored": "bfloat16", "dtype": torch.bfloat16, "tied": tied}
    table = VOCABULARY * HIDDEN * 2
    weights = [process(planned(tmp_path, **values, draws=n), 0).parts["weights"] for n in (4, 10**6)]
    assert weights == [100 * MB - (0 if tied else int(table * 0.8)), 100 * MB]
    copied = process(planned(tmp_path, **{**values, "dtype": torch.float32}), 0)
    assert copied.parts["weights"] == 100 * MB


def test_other_c_libraries_have_a_number_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    found = process(planned(tmp_path), 0)
    assert found.parts["room between blocks"] == round(ROOM[""].kept * 50 * MB)


def test_what_stands_is_what_the_system_says(monkeypatch):
    mine = standing()
    kept = bytearray(64 * MB)
    kept[::4096] = b"x" * len(kept[::4096])
    assert standing() - mine == pytest.approx(len(kept), rel=0.1)
    monkeypatch.setattr(heap, "resident", lambda: Resident(3, 5, 7))
    assert standing() == 15


def test_where_the_system_does_not_say_it_is_the_most_there_ever_was(monkeypatch):
    monkeypatch.setattr(heap, "resident", lambda: None)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2000))
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert standing() == 2_048_000
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert standing() == 2000
    assert FOREVER > 1
