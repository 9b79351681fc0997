"""Computing without numbers: tensors of the right shape whose memory is never touched.

Inside `Ghost` a floating-point tensor that a model would hold or compute is a *ghost*: an ordinary tensor on the
processor, of the right shape, strides and dtype, whose pages nobody ever writes to and which therefore take no
memory. An operation that reads a ghost gives ghosts and computes nothing. An operation that reads none is run as it
is: ids, masks, grids and positions are real, so that code which looks at them goes the way it goes in earnest.

What a model of 70 billion parameters does in a step is seen in this way on a machine with little memory: which
tensors come and go, in which order, and how large they are. (Torch's own fake tensors are of a class of their own, with
which code that asks for plain parameters takes another way.)
"""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tarsia.core.errors import PlanError
from tarsia.plan.ledger import Ledger
from tarsia.train.heap import out_of_memory
from tarsia.train.memory import Phase

_aten = torch.ops.aten
SMALL: Final = 1 << 14
"""Numbers in a fresh tensor up to which it is made really: tables of frequencies and the like."""

Spec = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Sizes, strides and dtype of a tensor."""


def size_of(spec: Spec) -> int:
    """Bytes of its numbers."""
    return _count(spec[0]) * spec[2].itemsize


def gapless(spec: Spec) -> bool:
    """Whether numbers lie as they are counted, with no gap."""
    step = 1
    for size, stride in zip(reversed(spec[0]), reversed(spec[1]), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


@dataclass(frozen=True, slots=True)
class Op:
    """One kind of operation: its name and what it reads and gives; ``inputs`` and ``outputs`` are sizes and dtypes."""

    name: str
    phase: str
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # taken once: all that is counted is counted by it
        object.__setattr__(self, "_hash", hash((self.name, self.phase, self.inputs, self.outputs)))

    def __hash__(self) -> int:
        return self._hash


class Ghost(TorchDispatchMode):
    """Compute without numbers inside; every storage is noted in ``ledger``, every operation counted in ``ops``."""

    def __init__(self, ledger: Ledger, workspace: Callable[[Op], int] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger
        self.ops: Counter[Op] = Counter()
        self.chosen = 0
        """The place that is said to be the largest entry's: the token that a model says next, say."""
        self._shapes: dict[Any, Any] = {}
        self._noted: dict[Any, Op] = {}
        self._workspace = workspace

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled here, and what would keep a compiler out is called at every operation
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(t is not Tensor and t is not nn.Parameter for t in types):
            return NotImplemented
        given = _tensors(args, kwargs.values())
        for tensor in given:
            if self._is_ghost(tensor):
                return self._unreal(func, args, kwargs, given)
        return self._really(func, args, kwargs, given)

    def haunt(self, tensor: Tensor) -> None:
        """Take a tensor for a ghost from now on."""
        self.ledger.see(tensor, "given").ghost = True

    def _is_ghost(self, tensor: Tensor) -> bool:
        block = self.ledger.block(tensor)
        return block is not None and block.ghost

    def _really(self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor]) -> Any:
        """Run an operation that reads no ghost; a large fresh tensor of floating-point numbers is one."""
        if not given and func in _FRESH:
            spec = self._spec_of(func, args, kwargs)
            if isinstance(spec, tuple) and spec[2].is_floating_point and _count(spec[0]) > SMALL:
                return self._made(func, spec)
        try:
            out = func(*args, **kwargs)
        except RuntimeError as error:
            if func in _FRESH and out_of_memory(error):
                size, _, dtype = self._spec_of(func, args, kwargs)
                raise self._refused(func, size, dtype) from error
            raise
        for tensor in _tensors((out,)):
            self.ledger.see(tensor, func.name())
        return out

    def _unreal(self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor]) -> Any:
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, func, args, kwargs)
        if kwargs.get("device") == torch.device("meta"):  # it has no memory, in earnest neither
            return func(*args, **kwargs)
        if func.is_view or func in _PLUMBING:
            out = func(*args, **kwargs)
            for tensor in _tensors((out,)):
                self.ledger.see(tensor, func.name())
            return out
        if func._schema.is_mutable:
            return self._written(func, args, kwargs)
        return self._functional(func, args, kwargs)

    def _functional(self, func: Any, args: Any, kwargs: Any) -> Any:
        specs = self._spec_of(func, args, kwargs)
        return self._given(func, specs, args, kwargs)

    def _given(self, func: Any, specs: Any, args: Any, kwargs: Any) -> Any:
        if specs is _SHARED:
            return func(*args, **kwargs)
        made = self._build(func, specs)
        outputs = tuple(spec for spec in _flat(specs) if spec is not None)
        self._note(func, args, kwargs, outputs)
        if func is _aten.add.Tensor and _of_the_engine():
            a, b = args[0], args[1]
            if isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype == made.dtype:
                self.ledger.taken_over(made, a)
        return made

    def _note(self, func: Any, args: Any, kwargs: Any, outputs: tuple[Spec, ...]) -> None:
        inputs = tuple((tuple(t.shape), t.stride(), t.dtype) for t in _tensors(args, kwargs.values()))
        key = (func, self.ledger.phase, inputs, outputs)
        op = self._noted.get(key)
        if op is None:
            op = self._noted[key] = Op(func.name(), self.ledger.phase, inputs, outputs)
        self.ops[op] += 1
        if self._workspace is not None:
            self.ledger.scratch(self._workspace(op), op.name)

    def _build(self, func: Any, specs: Any) -> Any:
        if specs is None or isinstance(specs, _Value):
            return specs.value if isinstance(specs, _Value) else None
        if isinstance(specs, tuple) and len(specs) == 3 and isinstance(specs[2], torch.dtype):
            return self._made(func, specs)
        return type(specs)(self._build(func, spec) for spec in specs)

    def _made(self, func: Any, spec: Spec) -> Tensor:
        size, stride, dtype = spec
        try:
            made = torch.empty_strided(size, stride, dtype=dtype)
        except RuntimeError as error:
            raise self._refused(func, size, dtype) from error
        self.ledger.see(made, func.name()).ghost = True
        harmless(made)
        return made

    def _refused(self, func: Any, size: tuple[int, ...], dtype: torch.dtype) -> PlanError:
        """Untouched memory costs nothing, but a system may refuse to let it be reserved."""
        limit, do = _limit()
        if self.ledger.phase in tuple(Phase):  # nothing of the recipe makes a weight smaller
            do += "; or make batch, length or resolution smaller"
        return PlanError(
            "The system does not let so much memory be reserved, though none of it is used.",
            given=f"{self.ledger.phase}, {func.name()}: {dtype} {size}, {_count(size) * dtype.itemsize / 1e9:.1f} GB; "
            f"{limit}",
            do=do,
        )

    def _written(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation that writes into its arguments: they are ghosts afterwards."""
        names = [a.name for a in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for argument in written:
            for tensor in _tensors((given.get(argument.name),)):
                self.ledger.see(tensor, func.name()).ghost = True
                harmless(tensor)
        self._note(func, args, kwargs, ())
        fresh = [r for r in func._schema.returns if r.alias_info is None]
        if not func._schema.returns:
            return None
        if not fresh:
            out = tuple(given[a.name] for a in written[: len(func._schema.returns)])
            return out[0] if len(out) == 1 else out
        specs = self._spec_of(func, args, kwargs)
        return self._build(func, specs)

    def _spec_of(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Shapes that an operation gives, asked of torch's own shape functions, once for each kind of call."""
        # what is made anew is of the default dtype, which is another while a model is built
        key = (func, torch.get_default_dtype(), _frozen(args), _frozen(kwargs))
        try:
            return self._shapes[key]
        except KeyError:
            pass
        except TypeError:
            return self._ask(func, args, kwargs)
        found = self._shapes[key] = self._ask(func, args, kwargs)
        return found

    def _ask(self, func: Any, args: Any, kwargs: Any) -> Any:
        seen: dict[int, Tensor] = {}
        try:
            with _unbound():
                out = func(*_meta(args, seen), **_meta(kwargs, seen))
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise PlanError(
                "What this operation gives is not known without running it.",
                given=f"{func.name()}: {str(error).splitlines()[0][:200]}",
                do="plan without what calls it, or report it: this is a gap in Tarsia's plan",
            ) from error
        held = {t.untyped_storage()._cdata for t in seen.values()}
        if any(t.untyped_storage()._cdata in held for t in _tensors((out,))):
            return _SHARED
        mend = _MENDED.get(func)
        return mend(_specs(out), args) if mend is not None else _specs(out)


@contextmanager
def _unbound() -> Iterator[None]:
    """Shapes are asked for without determinism: some are told by a function that knows of none but CUDA's kernel."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _limit() -> tuple[str, str]:
    """What limits the memory that this process may reserve, and what to do about it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        return f"the process's limit (ulimit -v) is {limit / 1e9:.1f} GB", "raise it: ulimit -v unlimited"
    try:
        policy = Path("/proc/sys/vm/overcommit_memory").read_text(encoding="utf8").strip()
    except OSError:
        policy = "not known"
    return f"vm.overcommit_memory is {policy}", "let memory be reserved: sysctl vm.overcommit_memory=1"


class _Shared:
    """Instead of shapes: what an operation gives lies in what it is given."""


_SHARED: Final = _Shared()


@dataclass(frozen=True, slots=True)
class _Value:
    """Something that is no tensor."""

    value: Any


def _of_the_engine() -> bool:
    """Whether it is autograd itself that adds two gradients, and no Python of anybody's."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename == __file__ or frame.f_code.co_name in ("inner", "_fn"):
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


def harmless(tensor: Tensor) -> None:
    """Give what may be read as numbers some that no check refuses: finite ones, and places that exist."""
    if not tensor.is_floating_point():
        tensor.zero_()
    elif tensor.numel() <= SMALL:
        tensor.fill_(1.0)


def _tensors(*groups: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for group in groups:
        for value in group:
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, list | tuple):
                found += _tensors(value)
    return found


def _count(size: Sequence[int]) -> int:
    count = 1
    for n in size:
        count *= n
    return count


def _frozen(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return (kind, value)
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    return (type(value), value)


_PLAIN: Final = frozenset({int, float, bool, type(None), torch.dtype, torch.device, str})


def _meta(value: Any, seen: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return seen[id(value)]
    if isinstance(value, list | tuple):
        return type(value)(_meta(v, seen) for v in value)
    if isinstance(value, dict):
        return {k: torch.device("meta") if k == "device" else _meta(v, seen) for k, v in value.items()}
    return value


def _specs(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return type(value)(map(_specs, value))
    return None if value is None else _Value(value)


def _flat(specs: Any) -> Iterable[Any]:
    if isinstance(specs, tuple) and len(specs) == 3 and isinstance(specs[2], torch.dtype):
        yield specs
    elif isinstance(specs, list | tuple):
        for spec in specs:
            yield from _flat(spec)


def _scalar(mode: Ghost, func: Any, args: Any, kwargs: Any) -> Any:
    """A number that nobody knows: one that no check refuses."""
    dtype = args[0].dtype
    return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 0


def _ranked(mode: Ghost, func: Any, args: Any, kwargs: Any) -> Any:
    """The places of the largest entries: real ones, each as often as any other (so experts get equal shares)."""
    values, places = mode._functional(func, args, kwargs)
    if places.numel():
        given, dim = args[0], args[2] if len(args) > 2 else kwargs.get("dim", -1)
        places.copy_(torch.arange(places.numel()).view(places.shape) % given.shape[dim])
        mode.ledger.see(places, func.name()).ghost = False
    return values, places


def _largest(mode: Ghost, func: Any, args: Any, kwargs: Any) -> Any:
    """The place of the largest entry: the one that was chosen beforehand, a real number."""
    place = mode._functional(func, args, kwargs)
    place.fill_(mode.chosen)
    mode.ledger.see(place, func.name()).ghost = False
    return place


def _grouped(mode: Ghost, func: Any, args: Any, kwargs: Any) -> Any:
    """Products of groups of rows: torch's shape function knows of bfloat16 alone. Rows end at 16 bytes."""
    left, right = args[:2]
    dtype = kwargs.get("out_dtype") or (args[4] if len(args) > 4 else None) or left.dtype
    size: tuple[int, ...] = (left.shape[-2], right.shape[-1])
    if left.ndim == right.ndim:
        offsets = args[2] if len(args) > 2 else kwargs.get("offs")
        size = (len(left) if left.ndim == 3 else len(offsets), *size)
    row = -(-size[-1] * dtype.itemsize // 16) * 16 // dtype.itemsize
    stride = (row, 1) if len(size) == 2 else (size[-2] * row, row, 1)
    return mode._given(func, (size, stride, dtype), args, kwargs)


def _true(mode: Ghost, func: Any, args: Any, kwargs: Any) -> bool:
    return True


def _index(mode: Ghost, func: Any, args: Any, kwargs: Any) -> Any:
    """A mask is turned into the places where it is set, whose number then is that of the rows."""
    tensor, indices, *rest = args
    places: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            places.append(index)
            continue
        if mode._is_ghost(index):
            raise PlanError(
                "Which entries are chosen depends on numbers that are not known before the run.",
                given=f"{func.name()} with a mask {tuple(index.shape)}",
            )
        places.extend(index.nonzero(as_tuple=True))
    args = (tensor, places, *rest)
    if func._schema.is_mutable:
        return mode._written(func, args, kwargs)
    return mode._functional(func, args, kwargs)


def _normed(specs: Any, args: Any) -> Any:
    """A processor keeps means and deviations in the dtype of the weight, or of the input where there is none."""
    out, *kept = specs
    dtype = (args[0] if args[2] is None else args[2]).dtype
    return out, *((size, stride, dtype) for size, stride, _ in kept)


def _norm_back(specs: Any, args: Any) -> Any:
    """A processor works on a copy without gaps, and so the gradient has none."""
    if specs[0] is None:
        return specs
    size, _, dtype = specs[0]
    return (size, torch.empty(size, device="meta").stride(), dtype), *specs[1:]


_MENDED: Final[dict[Any, Callable[[Any, Any], Any]]] = {
    _aten.native_layer_norm.default: _normed,
    _aten.native_layer_norm_backward.default: _norm_back,
}
"""Where torch's shape functions tell what a GPU gives, or no device."""
_SPECIAL: Final[dict[Any, Callable[..., Any]]] = {
    _aten._local_scalar_dense.default: _scalar,
    _aten.topk.default: _ranked,
    _aten.argmax.default: _largest,
    _aten._grouped_mm.default: _grouped,
    _aten.equal.default: _true,
    _aten.is_nonzero.default: _true,
    _aten.index.Tensor: _index,
    _aten.index_put_.default: _index,
    _aten._index_put_impl_.default: _index,
    _aten.index_put.default: _index,
}
_PLUMBING: Final = {
    _aten.set_.source_Storage,
    _aten.resize_.default,
    _aten._unsafe_view.default,
    _aten.lift_fresh.default,
}
_FRESH: Final = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.zeros.default,
    _aten.ones.default,
    _aten.full.default,
    _aten.randn.default,
    _aten.rand.default,
}
