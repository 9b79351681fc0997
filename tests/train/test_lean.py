"""Lean modules: the model's own numbers on every family, checked before use, and no trace afterwards."""

from __future__ import annotations

import sys

import pytest
import torch
from families import FAMILIES, VARIANTS
from torch.autograd import gradcheck

import tarsia.methods  # noqa: F401 (registers every method)
from tarsia.adapter import Host
from tarsia.core.attach import Part, attach, patches
from tarsia.core.errors import TrainingError
from tarsia.core.method import find
from tarsia.train import lean as lean_module
from tarsia.train.lean import GELU_TANH, SILU, Gate, Norm, Rotate, lean

ALL = FAMILIES | VARIANTS
BARE = {"blip_2"}  # its decoder has layer norms and plain MLPs


def ready(name, dropout=0.0):
    model, config = ALL[name].build()
    host = Host.of(model)
    attach(model, host.sites, [Part("lora", "language", find("lora").configure({"rank": 2, "dropout": dropout}))])
    learnt = [p for patch in patches(model, "default").values() for p in patch.parameters()]
    with torch.no_grad():
        for index, p in enumerate(learnt):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(index)))
    inputs = ALL[name].batch((1, 1), config=config)

    def step():
        for p in learnt:
            p.grad = None
        loss = model(**inputs).logits.float().log_softmax(-1)[..., 3].mean()
        loss.backward()
        return loss.item(), [p.grad.clone() for p in learnt]

    return model, step


@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradients_are_the_models_own(name):
    model, step = ready(name)
    loss, wanted = step()
    with lean(model) as found:
        ours, given = step()
    assert bool(found.taken) is (name not in BARE)
    assert not found.refused
    assert ours == pytest.approx(loss, abs=1e-5)
    for a, b in zip(given, wanted, strict=True):
        assert b.any()
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-8


def test_nothing_stays_behind_and_no_random_number_is_drawn():
    model, step = ready("llava", dropout=0.5)
    model.train()
    step()  # a first call leaves traces of Transformers' own
    file = sys.modules[type(model.model.language_model.layers[0]).__module__]
    before = [sorted(m.__dict__) for m in model.modules()], file.apply_rotary_pos_emb
    state = torch.get_rng_state()
    with lean(model) as found:
        assert torch.equal(torch.get_rng_state(), state)
        assert found.taken["LlamaMLP"] == 3 and not found.refused, "dropout inside a module is no difference"
        step()
    assert before == ([sorted(m.__dict__) for m in model.modules()], file.apply_rotary_pos_emb)


def test_in_evaluation_every_bit_is_the_models_own():
    model, _ = ready("llava")
    inputs = FAMILIES["llava"].batch((0, 1))
    with torch.no_grad():
        wanted = model(**inputs).logits
        with lean(model):
            assert torch.equal(model(**inputs).logits, wanted)


def test_a_class_that_computes_something_else_is_refused(monkeypatch):
    model, step = ready("llava")
    wanted = step()
    monkeypatch.setitem(lean_module.NORMS, "LlamaRMSNorm", ("variance_epsilon", 1.0))
    monkeypatch.setattr(lean_module, "NORMS", dict(sorted(lean_module.NORMS.items())))
    wrong = lean_module.Act(torch.sigmoid, SILU.backward)
    monkeypatch.setattr(lean_module, "ACTIVATIONS", {"SiLUActivation": wrong, "SiLU": wrong})
    with lean(model) as found:
        assert step()[0] == pytest.approx(wanted[0], abs=1e-6)
    assert found.refused == ("LlamaMLP", "LlamaRMSNorm")


def test_trained_or_patched_norms_are_left_alone():
    model, _ = ALL["llava"].build()
    attach(model, Host.of(model).sites, [Part("full", "language.*.norm", find("full").configure({}))])
    with lean(model) as found:
        assert found.taken["LlamaRMSNorm"] == 1, "the last one, which belongs to no layer"
        assert found.taken["LlamaMLP"] == 3


def test_a_layer_that_differs_from_others_of_its_class_is_found():
    model, _ = ready("llava")
    last = model.model.language_model.layers[2].mlp
    own = type(last)

    class LlamaMLP(own):
        def forward(self, x):
            return own.forward(self, x) * (2 if self.doubled else 1)

    for layer in model.model.language_model.layers:
        layer.mlp.__class__, layer.mlp.doubled = LlamaMLP, layer.mlp is last
    with lean(model) as found:
        assert found.refused == ("LlamaMLP",)
        assert "forward" not in last.__dict__


def test_a_hook_on_an_activation_is_called():
    model, step = ready("llava")
    seen = []
    with lean(model):
        step()
        for layer in model.model.language_model.layers:
            layer.mlp.act_fn.register_forward_hook(lambda *args: seen.append(1))
        step()
    assert len(seen) == 3


def test_a_norm_that_is_trained_later_has_a_gradient():
    model, step = ready("llava")
    weight = model.model.language_model.layers[1].input_layernorm.weight
    with lean(model):
        weight.requires_grad_(True)
        step()
    assert weight.grad is not None and weight.grad.any()


def test_what_was_put_over_a_forward_meanwhile_is_told_and_works_on():
    model, step = ready("llava")
    wanted, _ = step()
    norm = model.model.language_model.layers[1].input_layernorm
    running = lean(model)
    running.__enter__()
    inner = norm.forward
    norm.forward = lambda x: inner(x)
    with pytest.raises(TrainingError, match="Something else wraps") as caught:
        running.__exit__(None, None, None)
    assert caught.value.given == "LlamaRMSNorm"
    assert sum("forward" in m.__dict__ for m in model.modules() if type(m).__name__ == "LlamaRMSNorm") == 1
    assert step()[0] == pytest.approx(wanted, abs=1e-5)


def test_two_runs_at_once_leave_no_rotation_behind():
    (a, _), (b, step) = ready("llava"), ready("llava")
    file = sys.modules[type(a.model.language_model.layers[0]).__module__]
    own = file.apply_rotary_pos_emb
    first, second = lean(a), lean(b)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert file.apply_rotary_pos_emb is not own, "the second run counts on it"
    step()
    second.__exit__(None, None, None)
    assert file.apply_rotary_pos_emb is own


def test_derivatives():
    g = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(2, 3, 6, dtype=torch.float64, generator=g).requires_grad_() for _ in range(3))
    assert gradcheck(lambda t: Norm.apply(t, w[0, 0].detach(), 1e-5)[0], (x,))
    for act in (SILU, GELU_TANH):
        assert gradcheck(lambda a, b, act=act: Gate.apply(a, b, act), (x, y))
    assert gradcheck(lambda t: Rotate.apply(t, y.detach(), w.detach()), (x,))
