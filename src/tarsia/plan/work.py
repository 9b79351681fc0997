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
    """What limits an operation. After the name: the sizes that ``Work.size`` has."""

    PRODUCT = "product"  # rows, columns, depth
    BATCHED = "batched"  # products, rows, columns, depth
    CONVOLUTION = "convolution"  # places, channels out, numbers under the window
    ATTENTION = "attention"  # heads of all rows, queries, keys, width of a head
    ATTENTION_BACK = "attention back"
    FOUR_BITS = "four bits"  # rows, columns, depth
    FOUR_BITS_BACK = "four bits back"
    UNPACK = "unpack"  # numbers
    STREAM = "stream"  # bytes read and written
    STRIDED = "strided"
    CURVE = "curve"  # numbers: exp, sigmoid, silu and their like
    ERF = "erf"  # numbers: gelu, tanh, pow and their like
    RANDOM = "random"
    REDUCE = "reduce"  # bytes read
    NORMALISE = "normalise"  # numbers: softmax, layer norm
    GATHER = "gather"  # bytes
    SCATTER = "scatter"
    SORT = "sort"  # numbers
    UPDATE = "update"  # bytes of parameters, gradients and states
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


_NAMES: Final[Mapping[Kind, str]] = {
    Kind.PRODUCT: "mm addmm linear mv addmv _grouped_mm",
    Kind.BATCHED: "bmm baddbmm",
    Kind.CONVOLUTION: "convolution convolution_backward _convolution mkldnn_convolution",
    Kind.ATTENTION: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_attention_math_for_mps",
    Kind.ATTENTION_BACK: "_scaled_dot_product_flash_attention_for_cpu_backward "
    "_scaled_dot_product_flash_attention_backward _scaled_dot_product_efficient_attention_backward "
    "_scaled_dot_product_cudnn_attention_backward",
    Kind.FOUR_BITS: "linear4",
    Kind.FOUR_BITS_BACK: "product4",
    Kind.UNPACK: "dequantise4 unpack4",
    Kind.STREAM: "add sub rsub mul div neg abs copy fill zero clone _to_copy to where addcmul addcdiv lerp clamp "
    "clamp_min clamp_max maximum minimum masked_fill sign eq ne lt le gt ge logical_not logical_and logical_or "
    "bitwise_and bitwise_or bitwise_not relu threshold_backward square cat stack repeat constant_pad_nd zeros ones "
    "full zeros_like ones_like full_like new_zeros new_ones new_full arange tril triu isfinite isnan isinf expand_copy "
    "_reshape_copy reciprocal sqrt rsqrt slice_backward select_backward unfold_backward as_strided_scatter roll flip "
    "reflection_pad2d upsample_nearest2d upsample_nearest2d_backward im2col col2im avg_pool2d avg_pool2d_backward "
    "split_with_sizes_copy nan_to_num contiguous native_dropout_backward masked_scale addr outer "
    "_foreach_add _foreach_mul _foreach_div _foreach_sqrt _foreach_addcdiv _foreach_addcmul _foreach_lerp "
    "_foreach_copy floor round trunc remainder slice_scatter select_scatter block_diag",
    Kind.CURVE: "exp log silu silu_backward sigmoid sigmoid_backward sin cos exp2 expm1 log1p softplus "
    "softplus_backward log_sigmoid_forward log_sigmoid_backward upsample_bilinear2d upsample_bilinear2d_backward "
    "upsample_bicubic2d upsample_bicubic2d_backward _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    Kind.ERF: "gelu gelu_backward erf tanh tanh_backward pow atan2 elu elu_backward",
    Kind.RANDOM: "bernoulli normal uniform native_dropout rand randn randint randperm multinomial random",
    Kind.REDUCE: "sum mean linalg_vector_norm norm vecdot linalg_vecdot dot amax amin max min argmax argmin any all "
    "prod var std var_mean cumsum count_nonzero equal _foreach_norm _foreach_max logsumexp_backward nonzero",
    Kind.NORMALISE: "_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data _safe_softmax logsumexp "
    "native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward _fused_rms_norm "
    "_fused_rms_norm_backward native_batch_norm nll_loss_forward nll_loss_backward",
    Kind.GATHER: "index index_select gather embedding take masked_select",
    Kind.SCATTER: "index_put _index_put_impl index_add index_copy index_fill scatter scatter_add masked_scatter "
    "masked_scatter_backward embedding_dense_backward index_backward put index_reduce scatter_reduce _unsafe_index_put",
    Kind.SORT: "sort topk argsort unique_dim _unique2 unique_consecutive histc bincount linalg_qr linalg_inv_ex "
    "linalg_solve_ex linalg_lu_factor_ex _linalg_svd linalg_cholesky_ex",
    Kind.UPDATE: "_fused_adamw _fused_adam _fused_sgd",
    Kind.NOTHING: "empty empty_like empty_strided new_empty new_empty_strided detach alias lift_fresh _unsafe_view "
    "view set_ resize _local_scalar_dense is_nonzero unbind scalar_tensor resize_ set",
}
_KINDS: Final = {name: kind for kind, names in _NAMES.items() for name in names.split()}
"""The kind of each operation, by its name without overload and without the mark of one that works in place."""

_LARGEST: Final = 2**62


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
    shaper = _SHAPED.get(kind)
    if shaper is not None:
        found = tuple(_product(kind, size, dtype, moved) for size in shaper(op))
        return found or (Work(Kind.STREAM, dtype, (moved,), moved, known=False),)
    if kind is Kind.STREAM and _turned(op):
        kind = Kind.STRIDED
    count = max(math.prod(sizes) for sizes, _, _ in tensors)
    size = count if kind in _BY_NUMBERS else moved
    return (Work(kind, dtype, (size,), moved, known=known),)


_BY_NUMBERS: Final = frozenset({Kind.CURVE, Kind.ERF, Kind.RANDOM, Kind.NORMALISE, Kind.SORT, Kind.UNPACK})


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


def _turned(op: Op) -> bool:
    """Whether the largest tensors lie in memory in different orders: one is then read or written across its rows."""
    largest = max(math.prod(sizes) for sizes, _, _ in (*op.inputs, *op.outputs))
    orders = {
        tuple(sorted((d for d, n in enumerate(sizes) if n > 1), key=lambda d: -strides[d]))
        for sizes, strides, _ in (*op.inputs, *op.outputs)
        if math.prod(sizes) == largest and all(step for n, step in zip(sizes, strides, strict=True) if n > 1)
    }
    return len(orders) > 1


def _product(kind: Kind, size: tuple[int, ...], dtype: str, moved: int) -> Work:
    flops = 2 * math.prod(size)
    if kind is Kind.ATTENTION:
        flops *= 2  # queries by keys, and shares by values
    elif kind is Kind.ATTENTION_BACK:
        flops *= 5  # the shares again, and a product for each of values, shares, queries and keys
    return Work(kind, dtype, size, moved, min(flops, _LARGEST))


def _matrices(op: Op) -> Iterator[tuple[int, ...]]:
    name = _plain(op.name)
    given = [sizes for sizes, _, _ in op.inputs]
    if name in ("addmm", "baddbmm", "addmv"):
        given = given[1:]  # the first one is added
    a, b = given[0], given[1]
    if name in ("bmm", "baddbmm"):
        yield a[0], a[1], b[2], a[2]
    elif name == "linear":
        yield math.prod(a[:-1]), b[0], a[-1]
    else:  # a vector has one column; experts' weights [experts, depth, columns] serve each row once
        yield math.prod(a[:-1]), b[-1] if len(b) > 1 else 1, a[-1]


def _windows(op: Op) -> Iterator[tuple[int, ...]]:
    back = _plain(op.name) == "convolution_backward"
    if not back:
        weight, out = op.inputs[1][0], op.outputs[0][0]
        yield out[0] * math.prod(out[2:]), weight[0], math.prod(weight[1:])
        return
    grad, x, weight = (sizes for sizes, _, _ in op.inputs[:3])
    for sizes, _, _ in op.outputs:
        if sizes in (x, weight):
            yield grad[0] * math.prod(grad[2:]), weight[0], math.prod(weight[1:])


def _heads(op: Op) -> Iterator[tuple[int, ...]]:
    back = _KINDS[_plain(op.name)] is Kind.ATTENTION_BACK
    q, k = (sizes for sizes, _, _ in op.inputs[back : back + 2])
    yield math.prod(q[:-2]), q[-2], k[-2], q[-1]


def _packed(op: Op) -> Iterator[tuple[int, ...]]:
    x, y = op.inputs[0][0], op.outputs[0][0]
    columns, depth = (y[-1], x[-1]) if _plain(op.name) == "linear4" else (x[-1], y[-1])
    yield math.prod(x[:-1]), columns, depth


_SHAPED: Final[Mapping[Kind, Callable[[Op], Iterator[tuple[int, ...]]]]] = {
    Kind.PRODUCT: _matrices,
    Kind.BATCHED: _matrices,
    Kind.CONVOLUTION: _windows,
    Kind.ATTENTION: _heads,
    Kind.ATTENTION_BACK: _heads,
    Kind.FOUR_BITS: _packed,
    Kind.FOUR_BITS_BACK: _packed,
}
