"""Triton's kernels against the reference, on a GPU where there is one, else in Triton's interpreter.

Not collected as such: Triton decides when it is imported whether it interprets. ``test_triton.py`` runs this file in a
process of its own; on a GPU: ``pytest tests/quant/triton_cases.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# an earlier interpreter does not know NumPy 2.4
pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.7", reason="kernels are in Triton")

from bench import gpu_check, gpu_quant
from tarsia.core.errors import QuantError
from tarsia.quant import codec
from tarsia.quant.codec import KINDS, Scheme, encode
from tarsia.quant.cpu import Packed4
from tarsia.quant.gpu import batch, decode, linear, plan, tile
from tarsia.quant.gpu.plan import Tiles
from tarsia.quant.gpu.update import Update
from tarsia.quant.gpu.vector import vector
from tarsia.quant.levels import levels, scale_levels

# torch may add up parts of a long sum in 16 bits, which is more than one rounding
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
names = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(
    shape: tuple[int, int], kind: str = "nf4", nested: bool = True, block: int = 64
) -> tuple[Packed4, codec.Quantised]:
    """A weight as the operators take it, on the device, and as the reference does."""
    chance = torch.Generator().manual_seed(shape[0] * shape[1])
    value = encode(torch.randn(shape, generator=chance) * 0.02, Scheme(kind, nested, block))
    parts = (value.codes, value.scales, value.nested_scales, value.offset, levels(kind))
    there = [None if part is None else part.to(DEVICE) for part in parts]
    return Packed4(*there, block, *shape), value  # type: ignore[arg-type]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])).to(dtype).to(DEVICE)


def agree(found: Tensor, exact: Tensor, size: Tensor) -> None:
    """``found`` is ``exact`` rounded once, but for what sums of float32 lose of terms of ``size`` in all.

    A number that is rounded to 16 bits may land on the neighbour where the exact one is all but half way.
    """
    step = torch.finfo(found.dtype).eps / 2
    bound = step * 1.01 * exact.abs() + 2e-6 * size + torch.finfo(found.dtype).smallest_normal
    assert found.shape == exact.shape
    worst = ((found.cpu().double() - exact).abs() / bound).max()
    assert worst <= 1, f"{worst:.1f} times the bound"


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


@names
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_unpacked_bits_are_the_references(kind: str, nested: bool, dtype: torch.dtype) -> None:
    for shape in ((5, 64), (67, 320), (3, 50), (7, 33), (1, 1), (130, 257)):
        weight, value = made(shape, kind, nested)
        assert torch.equal(bits(decode.whole(weight, dtype)), bits(codec.decode(value, dtype))), shape


@pytest.mark.parametrize("dtype,step", [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
def test_halves_are_rounded_to_even(dtype: torch.dtype, step: float) -> None:
    table = torch.tensor([sign * (1 + (i + 0.5) * step) for sign in (1, -1) for i in range(8)])
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    parts = (codes, torch.ones(8), None, None, table)
    weight = Packed4(*(None if part is None else part.to(DEVICE) for part in parts), 64, 8, 64)
    right = table[torch.cat([codes >> 4, codes & 15], 1).flatten().long()].to(dtype).view(8, 64)
    assert torch.equal(decode.whole(weight, dtype).cpu(), right)
    x = torch.ones(1, 64, dtype=dtype, device=DEVICE)
    assert torch.equal(linear.linear4(x, weight, None).cpu(), right.double().sum(1).to(dtype)[None])


@pytest.mark.parametrize("block", [32, 128, 512, 4096])
def test_other_blocks_are_unpacked_too(block: int) -> None:
    for shape in ((9, 96), (3, 4096), (5, 1001)):
        weight, value = made(shape, block=block)
        assert torch.equal(bits(decode.whole(weight, torch.bfloat16)), bits(codec.decode(value, torch.bfloat16)))


def test_the_weights_can_tell_how_a_nested_scale_is_rounded() -> None:
    """An oracle's oracle: one rounding in place of two has other bits on these very weights."""
    _, value = made((67, 320))
    assert value.nested_scales is not None and value.offset is not None
    coarse = value.nested_scales.repeat_interleave(256)[: len(value.scales)]
    once = (scale_levels()[value.scales.long()].double() * coarse.double() + value.offset.double()).float()
    assert (once != codec.scales(value)).sum() > 10


@names
def test_slices_are_cut_from_the_whole(dtype: torch.dtype) -> None:
    weight, value = made((11, 448))
    whole = codec.decode(value, dtype)
    for first, last in ((0, 11), (3, 4), (2, 9)):
        assert torch.equal(bits(decode.rows(weight, first, last, dtype)), bits(whole[first:last]))
    for first, last in ((0, 448), (64, 128), (128, 448)):
        assert torch.equal(bits(decode.columns(weight, first, last, dtype)), bits(whole[:, first:last]))


def products(weight: codec.Quantised, x: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
    """The exact product with the weight as it is rounded to the dtype of x, and the size of its terms."""
    dense = codec.decode(weight, x.dtype).double()
    dense = dense if back else dense.T
    return x.cpu().double() @ dense, x.cpu().double().abs() @ dense.abs()


def with_update(exact: tuple[Tensor, Tensor], update: Update, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    low, up = update.low.cpu().double(), update.up.cpu().double()
    more = update.scale * (low @ up.T)
    size = abs(update.scale) * (low.abs() @ up.abs().T)
    if bias is not None:
        more, size = more + bias.cpu().double(), size + bias.cpu().double().abs()
    return exact[0] + more, exact[1] + size


def update_of(m: int, lines: int, dtype: torch.dtype, rank: int = 5) -> Update:
    """A low-rank update whose second factor is transposed in memory, as it is on LoRA's way back."""
    return Update(random(m, rank, dtype=dtype), random(rank, lines, dtype=dtype).t(), 0.37)


@names
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_one_row(nested: bool, dtype: torch.dtype) -> None:
    weight, value = made((21, 448), nested=nested)
    x, bias = random(1, 448, dtype=dtype), random(21, dtype=dtype)
    exact = products(value, x)
    for splits in (1, 3):
        tiles = Tiles(8, 2, 1, splits, warps=4, stages=1)
        agree(vector(x[0], weight, None, None, tiles)[None], *exact)
        update = update_of(1, 21, dtype)
        agree(vector(x[0], weight, bias, update, tiles)[None], *with_update(exact, update, bias))


@names
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("m", [2, 17])
def test_some_rows(m: int, nested: bool, dtype: torch.dtype) -> None:
    weight, value = made((35, 320), nested=nested)
    x, bias, update = random(m, 320, dtype=dtype), random(35, dtype=dtype), update_of(m, 35, dtype)
    exact = products(value, x)
    whole, parts = Tiles(64, 4, 32, 1, warps=4, stages=3), Tiles(32, 2, 16, 3, warps=4, stages=3)
    agree(batch.forward(x, weight, None, None, whole), *exact)
    agree(batch.forward(x, weight, bias, update, whole), *with_update(exact, update, bias))
    agree(batch.forward(x, weight, bias, update, parts), *with_update(exact, update, bias))


@names
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("m", [1, 17])
def test_some_rows_the_way_back(m: int, nested: bool, dtype: torch.dtype) -> None:
    weight, value = made((75, 192), nested=nested)
    y, update = random(m, 75, dtype=dtype), update_of(m, 192, dtype)
    exact = products(value, y, back=True)
    whole, parts = Tiles(64, 4, 32, 1, warps=4, stages=3), Tiles(16, 2, 16, 3, warps=4, stages=3)
    agree(batch.backward(y, weight, None, whole), *exact)
    agree(batch.backward(y, weight, update, whole), *with_update(exact, update))
    agree(batch.backward(y, weight, update, parts), *with_update(exact, update))


@pytest.mark.parametrize("kind", ["fp4", "int4"])
@pytest.mark.parametrize("block", [32, 128, 256])
def test_products_take_other_levels_and_blocks(kind: str, block: int) -> None:
    weight, value = made((18, 512), kind, block=block)
    for m in (1, 3):
        x, y = random(m, 512, dtype=torch.bfloat16), random(m, 18, dtype=torch.bfloat16)
        agree(linear.linear4(x, weight, None), *products(value, x))
        agree(linear.product4(y, weight), *products(value, y, back=True))


def test_the_bound_is_one_rounding() -> None:
    """An oracle's oracle: a weight that was not rounded to 16 bits, or a result cut in place of rounded, is refused."""
    _, value = made((64, 448))
    x = random(33, 448, dtype=torch.bfloat16)
    exact, size = products(value, x)
    with pytest.raises(AssertionError, match="times the bound"):
        agree((x.cpu().float() @ codec.decode(value, torch.float32).T).bfloat16(), exact, size)
    cut = (exact.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()
    with pytest.raises(AssertionError, match="times the bound"):
        agree(cut, exact, size)
    agree(exact.float().bfloat16(), exact, size)


def test_bits_are_the_same_each_time() -> None:
    weight, _ = made((69, 448))
    x = random(9, 448, dtype=torch.float16)
    tiles = Tiles(64, 2, 16, 3, warps=4, stages=3)
    first = batch.forward(x, weight, None, None, tiles)
    assert all(torch.equal(batch.forward(x, weight, None, None, tiles), first) for _ in range(2))


def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run from here on, by name."""
    seen: list[str] = []
    start = tile.start

    def spy(run: Any, *args: Any, **options: Any) -> None:
        seen.append(run.fn.__name__)
        start(run, *args, **options)

    monkeypatch.setattr(tile, "start", spy)
    return seen


def test_what_runs_follows_from_rows_and_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "few", lambda dtype, capability: 4)
    seen = called(monkeypatch)
    for shape, m, there, back in (
        ((9, 128), 1, "_vector", "_backward"),
        ((9, 128), 4, "_forward", "_backward"),
        ((9, 128), 5, "_dequantise", "_dequantise"),
        ((9, 96), 1, "_dequantise", "_dequantise"),
    ):
        weight, value = made(shape)
        x, y = random(m, shape[1], dtype=torch.float32), random(m, shape[0], dtype=torch.float32)
        seen.clear()
        agree(linear.linear4(x, weight, None), *products(value, x))
        agree(linear.product4(y, weight), *products(value, y, back=True))
        assert [name for name in seen if name != "_add_up"] == [there, back]


@names
def test_many_rows_by_slices(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ARENA", 9 * 64 * dtype.itemsize)
    weight, value = made((20, 192))
    m = 70
    x, y, bias = random(m, 192, dtype=dtype), random(m, 20, dtype=dtype), random(20, dtype=dtype)
    seen = called(monkeypatch)
    found = linear.linear4(x, weight, bias)
    assert len(seen) > 2
    seen.clear()
    agree(found, *with_update(products(value, x), Update(bias.new_zeros(m, 1), bias.new_zeros(20, 1), 1.0), bias))
    agree(linear.product4(y, weight), *products(value, y, back=True))
    assert len(seen) == 3
    # an update is added to what was rounded: one rounding more
    update = update_of(m, 20, dtype)
    exact, size = with_update(products(value, x), update, bias)
    slack = 2 * torch.finfo(dtype).eps
    assert ((linear.linear4(x, weight, bias, update).cpu().double() - exact).abs() <= slack * size + 1e-6).all()
    update = update_of(m, 192, dtype)
    exact, size = with_update(products(value, y, back=True), update)
    assert ((linear.product4(y, weight, update).cpu().double() - exact).abs() <= slack * size + 1e-6).all()


def test_x_of_any_form() -> None:
    weight, value = made((9, 128))
    wide = random(2, 3, 256, dtype=torch.float16)
    for x in (wide[..., ::2], wide[..., 1:129], wide[:1, :1, :128], wide[:, :0, :128]):
        y = linear.linear4(x, weight, None)
        assert y.shape == (*x.shape[:-1], 9)
        if x.numel():
            flat = x.reshape(-1, 128)
            agree(y.reshape(-1, 9), *products(value, flat))
    y = random(128, 9, 3, dtype=torch.float16)[:6].transpose(1, 2)
    agree(linear.product4(y, weight).reshape(-1, 128), *products(value, y.reshape(-1, 9), back=True))
    assert linear.product4(y[:0], weight).shape == (0, 3, 128)


def test_what_does_not_fit_is_refused() -> None:
    weight, _ = made((9, 128))
    x = random(2, 128, dtype=torch.bfloat16)
    low, up = random(2, 3, dtype=torch.bfloat16), random(9, 3, dtype=torch.bfloat16)
    with pytest.raises(QuantError, match="x does not fit"):
        linear.linear4(x[:, :64], weight, None)
    with pytest.raises(QuantError, match="dtype of x"):
        linear.linear4(x.double(), weight, None)
    with pytest.raises(QuantError, match="bias does not fit"):
        linear.linear4(x, weight, up[:, 0].float())
    with pytest.raises(QuantError, match="y does not fit"):
        linear.product4(x, weight)
    for wrong in (
        Update(low[:1], up, 1.0),
        Update(low, up[:8], 1.0),
        Update(low.float(), up, 1.0),
        Update(low.t(), up, 1.0),
    ):
        with pytest.raises(QuantError, match="update does not fit"):
            linear.linear4(x, weight, None, wrong)
    with pytest.raises(QuantError, match="power of two"):
        linear.dequantise4(weight._replace(block=6, scales=weight.scales.new_zeros(192)), torch.float32)
    with pytest.raises(QuantError, match="do not fit"):
        linear.dequantise4(weight._replace(codes=weight.codes[:-1]), torch.float32)
    with pytest.raises(QuantError, match="different devices"):
        linear.linear4(x.to("meta"), weight, None)
    with pytest.raises(QuantError, match="dtype of the weight"):
        linear.dequantise4(weight, torch.float64)


def test_the_check_before_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((5, 128),)
    found = gpu_check.check(DEVICE.type, shapes)
    assert found["numbers compared"] == 18 * 640 and found["worst product, of one rounding"] <= 1
    right = linear.dequantise4
    with monkeypatch.context() as planted:
        planted.setattr(
            linear,
            "dequantise4",
            lambda weight, dtype: torch.nextafter(right(weight, dtype), weight.levels.new_ones((), dtype=dtype)),
        )
        with pytest.raises(RuntimeError, match="are not the reference's"):
            gpu_check.check(DEVICE.type, shapes)
    with monkeypatch.context() as planted:
        planted.setattr(linear, "product4", lambda y, weight: 1.01 * (y @ right(weight, y.dtype)))
        with pytest.raises(RuntimeError, match="times one rounding"):
            gpu_check.check(DEVICE.type, shapes)


def test_every_call_of_the_measurement_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the clock: what is timed on a GPU is called once, for a small weight."""
    counted = 0

    def once(contestants: Mapping[str, Sequence[Callable[[], object]]], rounds: int = 1) -> dict[str, list[float]]:
        nonlocal counted
        results = {name: calls[0]() for name, calls in contestants.items()}
        shapes = {tuple(result.shape) for result in results.values() if isinstance(result, Tensor)}
        assert len(shapes) == 1, results.keys()  # contestants do the same
        counted += len(results)
        return {name: [1e-6] for name in results}

    few = gpu_quant.candidates
    for name, value in {
        "DEVICE": DEVICE.type,
        "SHAPES": ((64, 128),),
        "BATCHES": (1, 4),
        "ROTATED": 1,
        "race": once,
        "eager": lambda calls: calls[-1]() is None or 1e-6,
        "candidates": lambda *args: few(*args)[-2:],
        "_processors": lambda: 132,
    }.items():
        monkeypatch.setattr(gpu_quant, name, value)
    found = {"bandwidth": 1e12, "rate": 1e14}
    rows = {**gpu_quant.timed(found, peer=False), **gpu_quant.chosen(found)}
    assert len(rows) == 1 + 2 * 2 + 4 + 1 + 3 + 1 and counted > 30
    assert all(row["us"] == 1 for row in rows.values())
    json.dumps(rows, allow_nan=False)
