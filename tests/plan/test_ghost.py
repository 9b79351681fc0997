"""What an operation gives without numbers has the shape, strides and dtype of what it gives with them."""

import resource
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tarsia.core.errors import PlanError
from tarsia.plan import ghost as under_test
from tarsia.plan.ghost import Ghost, Op
from tarsia.plan.ledger import Category, Ledger, live

NUMBERS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default}


def _specs(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return tuple(map(_specs, value)) if isinstance(value, list | tuple) else None


class Beside(TorchDispatchMode):
    """Every operation is run, and asked of a ghost too; ``wrong`` are those that it got wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.ghost = Ghost(Ledger())
        self.asked: set[str] = set()
        self.wrong: list[tuple[str, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        told = None
        if not (func.is_view or func._schema.is_mutable or func in under_test._PLUMBING or func in NUMBERS):
            try:
                told = self.ghost._unreal(func, args, kwargs, list(under_test._tensors(args, kwargs.values())))
                self.asked.add(func.name())
            except PlanError:
                told = None
        out = func(*args, **kwargs)
        if told is not None and _sized(_specs(told)) != _sized(_specs(out)):
            self.wrong.append((func.name(), _specs(told), _specs(out)))
        return out


def _sized(specs: Any) -> Any:
    """Strides of dimensions of one entry mean nothing."""
    if isinstance(specs, tuple) and len(specs) == 3 and isinstance(specs[2], torch.dtype):
        size, stride, dtype = specs
        return size, tuple(step for n, step in zip(size, stride, strict=True) if n > 1) if 0 not in size else (), dtype
    return tuple(map(_sized, specs)) if isinstance(specs, tuple) else specs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_is_given_is_of_the_real_shape(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    model = family.build()[0].to(dtype).train()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # experts so narrow can not be multiplied in groups
    given = family.batch([max(family.min_pictures, 1)] * 2)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
    with Beside() as beside:
        loss = model(**inputs, use_cache=False).logits.float().log_softmax(-1).square().mean()
        loss.backward()
        torch.optim.AdamW([p for p in model.parameters() if p.grad is not None], foreach=False).step()
    assert len(beside.asked) > 15
    assert not beside.wrong, beside.wrong[:3]


def test_a_wrong_stride_is_seen() -> None:
    x = torch.randn(3, 4, 5).transpose(1, 2)
    with Beside() as beside:
        torch.ops.aten.sin.default(x)
    assert "aten::sin" in beside.asked
    assert not beside.wrong
    assert _sized(_specs(x)) != _sized(_specs(x.contiguous()))


def test_shapes_that_torch_tells_otherwise_are_mended() -> None:
    x = torch.randn(2, 6, 8, dtype=torch.bfloat16)
    weight = torch.ones(8, dtype=torch.bfloat16)
    mends, under_test._MENDED = dict(under_test._MENDED), {}  # type: ignore[misc]
    try:
        with Beside() as beside:
            torch.native_layer_norm(x, (8,), weight, weight, 1e-6)
    finally:
        under_test._MENDED = mends  # type: ignore[misc]
    assert [name for name, *_ in beside.wrong] == ["aten::native_layer_norm"]


def test_no_memory_is_touched_and_every_block_is_noted() -> None:
    ledger = Ledger()
    with Ghost(ledger) as ghost:
        x = torch.empty(1 << 14, 1 << 14)  # 1 GiB
        y = x.relu()
        del x
        z = y[:10].clone()
    assert [b.size for b in ledger.blocks] == [1 << 30, 1 << 30, 10 << 16]
    assert max(live(ledger.blocks, ledger.now)) == 2 << 30
    assert z.shape == (10, 1 << 14)
    assert sum(ghost.ops.values()) == 2


def test_a_block_that_the_system_refuses_is_said() -> None:
    with Ghost(Ledger()), pytest.raises(PlanError, match="be reserved"):
        torch.empty(1 << 30, 1 << 20)


def test_the_default_dtype_is_part_of_what_is_asked() -> None:
    def made() -> Tensor:
        return torch.empty(64, 512)

    with Ghost(Ledger()):
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.bfloat16)
            first = made()
        finally:
            torch.set_default_dtype(before)
        assert (first.dtype, made().dtype) == (torch.bfloat16, torch.float32)


def test_experts_get_equal_shares() -> None:
    with Ghost(Ledger()) as ghost:
        scores = torch.empty(1024, 32)
        ghost.haunt(scores)
        _, places = scores.topk(2, dim=-1)
        counts = torch.bincount(places.flatten(), minlength=32)
    assert set(counts.tolist()) == {64}


def test_a_mask_of_unknown_numbers_is_refused() -> None:
    with Ghost(Ledger()) as ghost:
        x = torch.empty(40, 1000)
        ghost.haunt(x)
        with pytest.raises(PlanError, match="not known before the run"):
            x[x > 0]


def test_memory_of_numpys_is_told_apart() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is what transformers makes pictures with")
    ledger = Ledger()
    with Ghost(ledger):
        outside = ledger.see(torch.from_numpy(numpy.zeros(10)), "given")
        inside = ledger.see(torch.zeros(10), "given")
    assert (outside.outside, inside.outside) == (True, False)


class TestAgain:
    """A ledger that begins again notes what is there as it arrives."""

    def test_what_arrives_is_noted_once_and_in_its_order(self) -> None:
        ledger = Ledger(phase="load")
        first, second = nn.Parameter(torch.empty(10)), torch.empty(20)
        ledger.see(second, "empty")
        ledger.see(first, "empty")
        gone = torch.empty(1000)
        ledger.see(gone, "empty")
        del gone
        ledger.restart()
        assert ledger.arrive(first, Category.WEIGHTS) is not None
        assert ledger.arrive(first.detach(), Category.QUANTISED) is None
        ledger.rest()
        ledger.rest()
        assert [(b.size, b.category, b.born) for b in ledger.blocks] == [(40, Category.WEIGHTS, 0), (80, None, 1)]
        del second
        assert ledger.blocks[1].died == 2

    def test_marks_begin_again_too(self) -> None:
        ledger = Ledger()
        with ledger.during("load"):
            torch.empty(1)
            ledger.restart()
        assert [(m.moment, m.phase) for m in ledger.marks] == [(0, "load"), (0, "")]


def test_an_operation_takes_no_more_room_than_it_says() -> None:
    seen: list[Op] = []

    def workspace(op: Op) -> int:
        seen.append(op)
        return 12345

    ledger = Ledger()
    with Ghost(ledger, workspace) as ghost:
        x = torch.empty(1000, 100)
        ghost.haunt(x)
        x.sin()
    assert [op.name for op in seen] == ["aten::sin"]
    assert [b.size for b in ledger.blocks if b.op == "aten::sin"] == [400_000, 12345]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize(
    "phase, limit, words, smaller",
    [
        ("load", 64 << 40, ["load", "ulimit -v", "70368.7 GB", "ulimit -v unlimited"], False),
        ("load", resource.RLIM_INFINITY, ["vm.overcommit_memory is", "sysctl vm.overcommit_memory=1"], False),
        ("forward", resource.RLIM_INFINITY, ["forward", "vm.overcommit_memory"], True),
    ],
)
def test_memory_that_can_not_be_reserved(
    phase: str, limit: int, words: list[str], smaller: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    ledger = Ledger()
    with pytest.raises(PlanError) as caught, Ghost(ledger), ledger.during(phase):
        torch.empty(1 << 48, dtype=dtype)  # beyond what addresses there are
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert ("make batch" in said) == smaller
