"""Triton's kernels of serving against the reference, on a GPU where there is one, else in Triton's interpreter.

Not collected as such: Triton decides when it is imported whether it interprets. ``test_kernel_triton.py`` runs this
file in a process of its own; on a GPU: ``pytest tests/serve/triton_serving.py``.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.7", reason="kernels are in Triton")

from served_rows import ACTIVATIONS, FLOATS, Drawn, Line, cache, entries, near, neck, thin

from tarsia.serve import gpu, reference
from tarsia.serve.reference import Row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COUNTS = (1, 0, 1, 2, 1, 1)
names = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def there(form: Row) -> Row:
    """The same form with its tensors on the device."""
    if form is None:
        return None
    held = {f.name: getattr(form, f.name) for f in fields(form)}
    return replace(form, **{name: value.to(DEVICE) for name, value in held.items() if isinstance(value, Tensor)})


def check(line: Line) -> None:
    forms = [there(form) for form in line.forms]
    x, y, starts = line.x.to(DEVICE), line.y.to(DEVICE).clone(), line.starts.to(DEVICE)
    found = gpu.grouped(x, y, starts, forms, entries(forms).to(DEVICE))
    near(found.cpu(), reference.grouped(line.x, line.y.clone(), line.starts, line.forms))
    for i in range(len(forms)):
        first, last = line.starts[i : i + 2].tolist()
        alone = torch.tensor([0, last - first], dtype=torch.int32, device=DEVICE)
        own = line.y[first:last].to(DEVICE).clone()
        gpu.grouped(x[first:last], own, alone, forms[i : i + 1], entries(forms[i : i + 1]).to(DEVICE))
        assert torch.equal(own, found[first:last])


def line_of(forms: list[Row], draw: Drawn, within: int, out: int, dtype: torch.dtype) -> Line:
    total = sum(COUNTS)
    starts = torch.tensor([0, *COUNTS]).cumsum(0).int()
    return Line(draw(total, within, dtype=dtype), draw(total, out, dtype=dtype), starts, forms)


@names
@pytest.mark.parametrize("shape", [(300, 129), (7, 3)], ids=str)
def test_thin_rows(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    draw = Drawn(shape[0])
    made: list[Row] = [thin(draw, rank, *shape, FLOATS[i % 2]) for i, rank in enumerate((16, 4, 0, 37, 1))]
    check(line_of([*made, None], draw, *shape, dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_necks(activation: str) -> None:
    draw, dtype = Drawn(len(activation)), FLOATS[ACTIVATIONS.index(activation) % 2]
    made: list[Row] = [neck(draw, rank, 70, FLOATS[i % 2], activation, i % 2 == 0) for i, rank in enumerate((9, 4, 33))]
    made += [neck(draw, 5, 70, torch.float32, activation, True), None]
    check(line_of([*made, neck(draw, 5, 70, torch.float32, activation, False)], draw, 70, 70, dtype))


@names
def test_inner(dtype: torch.dtype) -> None:
    draw = Drawn(3)
    forms: list[Row] = [thin(draw, 2, 20, 8, torch.float32) for _ in COUNTS[1:]]
    line = line_of([*forms, None], draw, 20, 8, dtype)
    found = gpu.inner(line.x.to(DEVICE), line.starts.to(DEVICE), [there(form) for form in line.forms])
    assert torch.equal(found.cpu(), reference.inner(line.x, line.starts, line.forms))


@pytest.mark.parametrize("dtype, window, softcap", [(torch.float32, None, None), (torch.bfloat16, 5, 3.0)])
@pytest.mark.parametrize("heads", [(6, 2, 16), (3, 3, 24)], ids=str)
def test_attention(dtype: torch.dtype, window: int | None, softcap: float | None, heads: tuple[int, int, int]) -> None:
    it = cache(Drawn(5), [(40, 1), (0, 3), (3, 0), (31, 1)], *heads, 8, dtype)
    given = [part.to(DEVICE) for part in (it.q, *it.rest())]
    found = gpu.attend(*given, 0.25, window, softcap)
    near(found.cpu(), reference.attend(it.q, *it.rest(), 0.25, window, softcap))
    own = [part.to(DEVICE) for part in (it.q[:1], it.keys, it.values, it.tables[:1])]
    starts, before = torch.tensor([0, 1], dtype=torch.int32), it.before[:1]
    assert torch.equal(found[:1], gpu.attend(*own, starts.to(DEVICE), before.to(DEVICE), 0.25, window, softcap))
