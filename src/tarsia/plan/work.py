"""What an operation of a step is as work: its kind, and the sizes that decide how long that takes.

Only shapes are looked at. An operation whose name is in no table here is taken for one that moves its bytes, and
``Work.known`` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch

from tarsia.plan.ghost import Op, Spec


class Kind(StrEnum):
    """What limits an operation. Beside the name: what ``Work.size`` has; numbers, where nothing is said."""

    PRODUCT = "product"  # rows, columns, depth
    BATCHED = "batched"  # products, rows, columns, depth
    WINDOW = "window"  # a convolution: places, channels out, numbers under the window
    FILM = "film"  # a convolution over time, too
    ATTENTION = "attention"  # heads of all rows, queries times keys, width of a head
    ATTENTION_BACK = "attention back"
    FOUR_BITS = "four bits"  # rows, columns, depth
    FOUR_BITS_BACK = "four bits back"
    UNPACK = "unpack"
    STREAM = "stream"  # element by element, in the order in which the numbers lie
    STRIDED = "strided"  # rows in another order, or repeated
    CROSSED = "crossed"  # numbers of a row that do not lie beside each other
    IN_PLACE = "in place"
    CONVERT = "convert"  # between dtypes
    CHOOSE = "choose"
    JOIN = "join"
    CURVE = "curve"  # exp, sigmoid, silu and their like
    GELU = "gelu"
    RANDOM = "random"
    REDUCE = "reduce"  # along rows; numbers read
    ACROSS = "across"  # across rows
    NORMALISE = "normalise"  # softmax, layer norm
    GATHER = "gather"  # numbers picked
    SCATTER = "scatter"  # numbers put
    SORT = "sort"
    UPDATE = "update"  # of parameters, gradients and states together
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Work:
    """One operation's work; ``known`` is whether its name is in a table."""

    kind: Kind
    dtype: str
    size: tuple[int, ...]
    bytes: int
    flops: int = 0
    known: bool = True


# fmt: off
_NAMES: Final[Mapping[Kind, str]] = {
    Kind.PRODUCT: "mm addmm linear mv addmv addr outer _grouped_mm",
    Kind.BATCHED: "bmm baddbmm",
    Kind.WINDOW: "convolution convolution_backward _convolution mkldnn_convolution",
    Kind.ATTENTION: """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention""",
    Kind.ATTENTION_BACK: """_scaled_dot_product_flash_attention_for_cpu_backward
        _scaled_dot_product_flash_attention_backward _scaled_dot_product_efficient_attention_backward
        _scaled_dot_product_cudnn_attention_backward""",
    Kind.FOUR_BITS: "linear4",
    Kind.FOUR_BITS_BACK: "product4",
    Kind.UNPACK: "dequantise4 unpack4",
    Kind.STREAM: """add sub rsub mul div neg abs sign copy fill zero zeros ones full zeros_like ones_like full_like
        new_zeros new_ones new_full eye arange clone to addcmul addcdiv lerp clamp clamp_min clamp_max maximum minimum
        relu threshold_backward square pow sqrt rsqrt reciprocal floor round trunc remainder nan_to_num
        native_dropout_backward expand_copy slice_backward select_backward slice_scatter select_scatter unfold_backward
        tril triu roll flip repeat constant_pad_nd isfinite isnan isinf upsample_nearest2d upsample_nearest2d_backward
        im2col col2im avg_pool2d avg_pool2d_backward block_diag _foreach_add _foreach_mul _foreach_div _foreach_sqrt
        _foreach_addcdiv _foreach_addcmul _foreach_lerp _foreach_copy""",
    Kind.CONVERT: "_to_copy",
    Kind.CHOOSE: """where masked_fill eq ne lt le gt ge logical_not logical_and logical_or bitwise_and bitwise_or
        bitwise_not __and__ __or__""",
    Kind.JOIN: "cat stack split_with_sizes_copy",
    Kind.CURVE: """exp exp2 expm1 log log1p silu silu_backward sigmoid sigmoid_backward sin cos softplus erf tanh
        tanh_backward softplus_backward log_sigmoid_forward log_sigmoid_backward elu elu_backward atan2
        upsample_bilinear2d upsample_bilinear2d_backward upsample_bicubic2d upsample_bicubic2d_backward
        _upsample_bilinear2d_aa _upsample_bicubic2d_aa""",
    Kind.GELU: "gelu gelu_backward",
    Kind.RANDOM: "bernoulli normal uniform native_dropout rand randn randint randperm multinomial random",
    Kind.REDUCE: """sum mean linalg_vector_norm norm vecdot linalg_vecdot dot amax amin max min argmax argmin any all
        prod var std var_mean cumsum count_nonzero equal nonzero _foreach_norm _foreach_max""",
    Kind.NORMALISE: """_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data _safe_softmax logsumexp
        native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward _fused_rms_norm
        _fused_rms_norm_backward native_batch_norm nll_loss_forward nll_loss_backward""",
    Kind.GATHER: "index index_select gather embedding take masked_select bucketize searchsorted",
    Kind.SCATTER: """index_put _index_put_impl _unsafe_index_put index_add index_copy index_fill scatter scatter_add
        scatter_reduce masked_scatter masked_scatter_backward embedding_dense_backward put index_reduce""",
    Kind.SORT: """sort topk argsort unique_dim _unique2 unique_consecutive histc bincount _linalg_solve_ex
        linalg_lu_solve linalg_lu_factor_ex linalg_inv_ex linalg_qr _linalg_svd linalg_cholesky_ex""",
    Kind.UPDATE: "_fused_adamw _fused_adam _fused_sgd",
    Kind.NOTHING: """empty empty_like empty_strided new_empty new_empty_strided detach alias lift_fresh _unsafe_view
        view unbind set resize scalar_tensor _local_scalar_dense is_nonzero""",
}
# fmt: on
_KINDS: Final = {name: kind for kind, names in _NAMES.items() for name in names.split()}
"""The kind of each operation, by its name without overload and without the mark of one that works in place."""


def work_of(op: Op) -> tuple[Work, ...]:
    """The work of one operation: several where it is several products at once."""
    name = _plain(op.name)
    kind = _KINDS.get(name, Kind.STREAM)
    known = name in _KINDS
    tensors = [*op.outputs, *op.inputs]
    dtype = str(_dtype(tensors)).removeprefix("torch.")
    moved = _moved(op)
    if not tensors or kind is Kind.NOTHING:
        return (Work(Kind.NOTHING, dtype, (), 0, known=known),)
    if kind in _SHAPED:
        return tuple(_product(kind, size, dtype, moved) for kind, size in _SHAPED[kind](op))
    if kind in (Kind.STREAM, Kind.CONVERT):
        kind = _order(op)
    elif kind is Kind.REDUCE and _across(op):
        kind = Kind.ACROSS
    count = _all if name.startswith("_foreach") else _NUMBERS.get(kind, _most)
    return (Work(kind, dtype, (count(op),), moved, known=known),)


def _most(op: Op) -> int:
    return max(math.prod(sizes) for sizes, _, _ in (*op.inputs, *op.outputs))


def _picked(op: Op) -> int:
    return math.prod(op.outputs[0][0]) if op.outputs else _most(op)


def _put(op: Op) -> int:
    """What is put into a tensor that is there, or the whole of a new one."""
    given = op.outputs or op.inputs[1:]
    return max((math.prod(sizes) for sizes, _, _ in given), default=0)


def _all(op: Op) -> int:
    return sum(math.prod(sizes) for sizes, _, _ in op.inputs)


_NUMBERS: Final[Mapping[Kind, Callable[[Op], int]]] = {Kind.GATHER: _picked, Kind.SCATTER: _put, Kind.UPDATE: _all}


def _plain(name: str) -> str:
    base = name.partition("::")[2].partition(".")[0] or name
    return base[:-1] if base.endswith("_") and not base.endswith("__") else base


def _dtype(tensors: list[Spec]) -> torch.dtype:
    """That of the first tensor of floating-point numbers, for it decides how fast the arithmetic is."""
    return next(
        (dtype for _, _, dtype in tensors if dtype.is_floating_point), tensors[0][2] if tensors else torch.uint8
    )


def _bytes(spec: Spec) -> int:
    """Bytes of the numbers that are really there: a dimension that is expanded counts once."""
    sizes, strides, dtype = spec
    return math.prod(n for n, step in zip(sizes, strides, strict=True) if step) * dtype.itemsize


def _moved(op: Op) -> int:
    read = sum(map(_bytes, op.inputs))
    # what gives no tensor writes into its first one
    return read + (sum(map(_bytes, op.outputs)) if op.outputs else sum(map(_bytes, op.inputs[:1])))


def _order(op: Op) -> Kind:
    """How the numbers of an element-wise operation lie to each other."""
    result = op.outputs[0] if op.outputs else op.inputs[0]
    sizes, strides, dtype = result
    axes = [d for d, n in enumerate(sizes) if n > 1]
    if not axes:
        return Kind.STREAM
    inner = min(axes, key=lambda d: strides[d])
    large = [(s, t) for s, t, _ in op.inputs if s == sizes]
    if any(d != dtype and d.is_floating_point and s == sizes for s, _, d in op.inputs):
        return Kind.CONVERT
    steps = [t[inner] for _, t in large]
    if any(step > 1 for step in steps) or (steps and not any(steps)):
        return Kind.CROSSED
    if not op.outputs:
        return Kind.IN_PLACE
    ordered = all(t == strides for _, t in large)
    if not ordered or any(1 < math.prod(s) < math.prod(sizes) for s, _, _ in op.inputs):
        return Kind.STRIDED
    return Kind.STREAM


def _across(op: Op) -> bool:
    """Whether the numbers that lie beside each other are kept apart: other axes are summed over."""
    if not op.inputs or not op.outputs:
        return False
    (sizes, strides, _), kept = op.inputs[0], op.outputs[0][0]
    axes = [d for d, n in enumerate(sizes) if n > 1]
    if not axes or not kept:
        return False
    return kept[-1] == sizes[-1] and min(axes, key=lambda d: strides[d]) == len(sizes) - 1


def _product(kind: Kind, size: tuple[int, ...], dtype: str, moved: int) -> Work:
    flops = 2 * math.prod(size)
    if kind is Kind.ATTENTION:
        flops *= 2  # queries by keys, and shares by values
    elif kind is Kind.ATTENTION_BACK:
        flops *= 5  # the shares again, and a product for each of values, shares, queries and keys
    return Work(kind, dtype, size, moved, flops)


_Sized = Iterator[tuple[Kind, tuple[int, ...]]]


def _matrices(op: Op) -> _Sized:
    name = _plain(op.name)
    given = [sizes for sizes, _, _ in op.inputs]
    if name in ("addmm", "baddbmm", "addmv", "addr"):
        given = given[1:]  # the first one is added
    a, b = given[0], given[1]
    if name in ("bmm", "baddbmm"):
        yield Kind.BATCHED, (a[0], a[1], b[2], a[2])
    elif name == "linear":
        yield Kind.PRODUCT, (math.prod(a[:-1]), b[0], a[-1])
    elif name in ("outer", "addr"):
        yield Kind.PRODUCT, (a[0], b[0], 1)
    else:  # a vector has one column; experts' weights [experts, depth, columns] serve each row once
        yield Kind.PRODUCT, (math.prod(a[:-1]), b[-1] if len(b) > 1 else 1, a[-1])


def _windows(op: Op) -> _Sized:
    kind = Kind.FILM if len(op.inputs[1][0]) > 4 else Kind.WINDOW
    if _plain(op.name) != "convolution_backward":
        weight, out = op.inputs[1][0], op.outputs[0][0]
        yield kind, (out[0] * math.prod(out[2:]), weight[0], math.prod(weight[1:]))
        return
    grad, x, weight = (sizes for sizes, _, _ in op.inputs[:3])
    for sizes, _, _ in op.outputs:
        if sizes in (x, weight):
            yield kind, (grad[0] * math.prod(grad[2:]), weight[0], math.prod(weight[1:]))


def _heads(op: Op) -> _Sized:
    kind = _KINDS[_plain(op.name)]
    back = kind is Kind.ATTENTION_BACK
    q, k = (sizes for sizes, _, _ in op.inputs[back : back + 2])
    yield kind, (math.prod(q[:-2]), q[-2] * k[-2], q[-1])


def _packed(op: Op) -> _Sized:
    kind = _KINDS[_plain(op.name)]
    x, y = op.inputs[0][0], op.outputs[0][0]
    columns, depth = (y[-1], x[-1]) if kind is Kind.FOUR_BITS else (x[-1], y[-1])
    yield kind, (math.prod(x[:-1]), columns, depth)


_SHAPED: Final[Mapping[Kind, Callable[[Op], _Sized]]] = {
    Kind.PRODUCT: _matrices,
    Kind.BATCHED: _matrices,
    Kind.WINDOW: _windows,
    Kind.ATTENTION: _heads,
    Kind.ATTENTION_BACK: _heads,
    Kind.FOUR_BITS: _packed,
    Kind.FOUR_BITS_BACK: _packed,
}
