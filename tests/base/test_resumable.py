"""What the base's two trainings stand on: Muon, its schedule, and a state that comes back bit by bit."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tarsia.base import resumable


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 24), st.integers(2, 24), st.integers(0, 999))
def test_an_update_is_nearly_orthogonal(rows, columns, seed):
    """Five steps bring the singular values near 1 (Keller Jordan, 2024: between 0.7 and 1.2) and keep the basis."""
    made = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, generator=made), full_matrices=False)
    values = torch.linspace(1.0, 0.3, min(rows, columns))
    update = resumable.orthogonal((u * values) @ v)
    assert update.shape == (rows, columns)
    found = torch.linalg.svdvals(update)
    assert found.min() > 0.6 and found.max() < 1.3
    assert ((u.T @ update @ v.T) - torch.diag(torch.diag(u.T @ update @ v.T))).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_muon_steps_as_that_of_pytorch(shape):
    """Two steps of both from the same gradients: PyTorch iterates in bfloat16, ours in float32."""
    torch.manual_seed(0)
    start, grads = torch.randn(shape), [torch.randn(shape) for _ in range(2)]
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.95}
    pair = (
        (ours, resumable.Muon([ours], **options)),
        (theirs, torch.optim.Muon([theirs], nesterov=True, ns_steps=5, adjust_lr_fn="original", **options)),
    )
    for grad in grads:
        for parameter, optimiser in pair:
            parameter.grad = grad.clone()
            optimiser.step()
    moved, expected = ((p.detach() - start).flatten() for p in (ours, theirs))
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.99
    assert float(moved.norm() / expected.norm()) == pytest.approx(1, abs=0.05)


def test_muon_leaves_what_has_no_gradient():
    frozen = nn.Parameter(torch.randn(3, 3))
    before = frozen.detach().clone()
    resumable.Muon([frozen], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(frozen, before)


def test_the_schedule_rises_then_falls_to_two_percent():
    parameter = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    optimiser.param_groups[0]["peak"] = 4.0
    shares = [resumable.schedule([optimiser], step, 300) for step in range(300)]
    assert shares[0] == 0.01 and shares[99] == shares[100] == 1.0
    assert shares[:100] == sorted(shares[:100])
    assert shares[100:] == sorted(shares[100:], reverse=True)
    assert shares[200] == pytest.approx(0.51)
    assert shares[-1] == pytest.approx(0.02, abs=1e-3)
    assert optimiser.param_groups[0]["lr"] == pytest.approx(4 * shares[-1])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
        self.head = nn.Linear(4, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x))


def made(seed):
    torch.manual_seed(seed)
    model = Small()
    return model, resumable.optimisers(model, [model.inner], 1e-2)


def steps(model, pair, numbers):
    for number in numbers:
        resumable.schedule(pair, number, 8, warmup=2)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
        model(x).square().mean().backward()
        for optimiser in pair:
            optimiser.step()
            optimiser.zero_grad()


def test_muon_takes_the_inner_matrices_and_nothing_else():
    model, (muon, adamw) = made(0)
    assert {id(p) for g in muon.param_groups for p in g["params"]} == {id(model.inner[i].weight) for i in (0, 1)}
    assert sum(len(g["params"]) for o in (muon, adamw) for g in o.param_groups) == len(list(model.parameters()))
    assert all(p.ndim < 2 for p in adamw.param_groups[1]["params"]) and adamw.param_groups[1]["weight_decay"] == 0


def test_a_resumed_training_is_the_uninterrupted_one_bitwise(tmp_path):
    whole = made(0)
    steps(*whole, range(8))
    part = made(0)
    steps(*part, range(3))
    resumable.save(tmp_path / "a.safetensors", 3, *part)
    other = made(99)
    first = resumable.load(tmp_path / "a.safetensors", *other)
    steps(*other, range(first, 8))
    assert first == 3
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), other[0].parameters(), strict=True))
    resumable.save(tmp_path / "whole.safetensors", 8, *whole)
    resumable.save(tmp_path / "other.safetensors", 8, *other)
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_optimiser_state_is_part_of_it(tmp_path):
    """Weights alone do not resume: without momentum the next steps differ."""
    whole, part, other = made(0), made(0), made(99)
    steps(*whole, range(4))
    steps(*part, range(3))
    other[0].load_state_dict(part[0].state_dict())
    steps(*other, range(3, 4))
    assert not torch.equal(whole[0].inner[0].weight, other[0].inner[0].weight)


def test_where_nothing_was_saved_it_begins(tmp_path):
    model, pair = made(0)
    before = [p.clone() for p in model.parameters()]
    assert resumable.load(tmp_path / "no.safetensors", model, pair) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_save_that_is_cut_off_leaves_the_last_one(tmp_path, monkeypatch):
    model, pair = made(0)
    path = tmp_path / "a.safetensors"
    resumable.save(path, 1, model, pair)
    whole = path.read_bytes()

    def torn(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(resumable, "save_file", torn)
    with pytest.raises(OSError, match="no space"):
        resumable.save(path, 2, model, pair)
    assert path.read_bytes() == whole


def test_the_log_forgets_what_will_be_done_again(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    resumable.cut(log, 3)
    assert not log.exists()
    for step in (1, 2, 3, 4):
        resumable.note(log, step=step, loss=0.5)
    resumable.cut(log, 2)
    assert [json.loads(line) for line in log.read_text().splitlines()] == [{"step": s, "loss": 0.5} for s in (1, 2)]
    assert capsys.readouterr().out.count("\n") == 4


def test_every_command_is_remembered(tmp_path):
    resumable.remember(tmp_path, "first", 0)
    resumable.remember(tmp_path, "then", 7)
    lines = (tmp_path / "commands.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"from_step": 0, "command": "first"},
        {"from_step": 7, "command": "then"},
    ]
