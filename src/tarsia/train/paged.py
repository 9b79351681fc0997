"""AdamW whose states are in pages: in 32 or 8 bits, and able to leave the device's memory and come back.

A step visits the states once, always in the same order. Of what is visited in a circle the page that was used longest
ago is the very next one that is needed: throwing that one out, as a cache does by default, would never find anything.
So the first pages stay, as many as the budget has room for, and each step reads and writes just the others, through two
buffers: while one page is computed on, the one before is written and the next one read.

In 32 bits it is the same kernel on the same numbers as ``torch.optim.AdamW``, cut where its vectors begin anyway, so
the bits are the same. In 8 bits (arXiv:2110.02861) a piece is taken out of its codes, stepped by that kernel and put
back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tarsia.core.errors import TrainingError
from tarsia.quant.eight_bits import BLOCK, SMALLEST, blocks, decode, encode
from tarsia.train.heap import out_of_memory
from tarsia.train.layout import Bits, Page, Piece, lay
from tarsia.train.pages import Store, store_for
from tarsia.train.spread import Spec, Spread

LARGEST_PAGE: Final = 1 << 24
SMALLEST_PAGE: Final = 1 << 12
"""Bytes of a page: a power of two (pinned memory is given out in those), at most an eighth of the budget."""
SECOND: Final = ("exp_avg", "exp_avg_sq")
"""What torch calls the two moments, and so what checkpoints do."""


@dataclass(frozen=True, slots=True)
class Form:
    """``bits`` of each state, and where states go: with ``paged`` they can leave the device's memory.

    At most ``budget`` bytes of them are there, two pages of 4,096 at least; None: all, until memory runs out.
    ``folder`` is for a processor's pages.
    """

    bits: Bits = 32
    paged: bool = False
    budget: int | None = None
    folder: Path = Path("pages")


class PagedAdamW(torch.optim.AdamW):
    """AdamW with its moments in pages. Between ``step``s at most the budget, less two pages, is in memory.

    ``groups`` are those of ``tarsia.train.optimiser.adamw``. Raises TrainingError for parameters that are not float32
    numbers side by side in memory.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float], form: Form) -> None:
        members = [(group, p) for group in groups for p in group["params"]]
        on_cpu = all(p.device.type == "cpu" for _, p in members)
        super().__init__([dict(group) for group in groups], betas=betas, fused=True if on_cpu else None)
        self.form = form
        self.told: list[str] = []
        self._members = [(group, name, p) for group in self.param_groups for name, p in _named(group)]
        for _, name, parameter in self._members:
            _check(name, parameter)
        counts = [p.numel() for _, _, p in self._members]
        self._bits: list[Bits] = [8 if form.bits == 8 and count >= SMALLEST else 32 for count in counts]
        self.pages = lay(list(zip(counts, self._bits, strict=True)), _page_size(form.budget) // 4)
        self._keep = _staying(self.pages, form.budget)
        device = self._members[0][2].device if self._members else torch.device("cpu")
        self.store: Store = store_for(device, form.paged, form.folder)

    @property
    def bytes(self) -> int:
        """Of all states."""
        return 4 * sum(page.size for page in self.pages)

    @property
    def resident(self) -> int:
        """Bytes of states that are in the device's memory between two steps."""
        return 4 * sum(page.size for page in self._there)

    @property
    def _there(self) -> list[Page]:
        """Pages that are in the device's memory between two steps: beside the parameters in ``state``."""
        return [page for page in self.pages if page.name in self._places]

    @property
    def _places(self) -> dict[Any, dict[str, Tensor]]:
        return self.state

    @property
    def line(self) -> str:
        """What there is to say of it before a run."""
        small = sum(p.numel() < SMALLEST for _, _, p in self._members) if self.form.bits == 8 else 0
        bits = f"states in {self.form.bits} bits" + (f" ({small} small tensors in 32)" if small else "")
        if not self.form.paged:
            return bits
        if self._keep == len(self.pages):
            return f"{bits}, paged: all {self.bytes:,} bytes stay until memory runs out"
        stay = 4 * sum(page.size for page in self.pages[: self._keep])
        return f"{bits}, paged: {stay:,} of {self.bytes:,} bytes stay, the rest comes and goes at each step"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Where pages go to is ready inside, and leaves nothing behind. Raises TrainingError where it can not be."""
        try:
            self._open()
            yield
        finally:
            for page in self._there:
                del self._places[page.name]
            self.store.close()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Raises TrainingError where a page is lost."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for _, _, parameter in self._members:
            if parameter.grad is not None and not self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros((), device=self._counts(parameter))
        with_gradient = [p for p in self.pages if any(self._members[i.tensor][2].grad is not None for i in p.pieces)]
        for page, buffer in self._turn(with_gradient):
            self._update(page, buffer)
            del buffer  # else it could not leave, if that is what makes room for the next one
        return loss

    def leave(self) -> int:
        """Let every state leave the device's memory; they come back at the next step. Returns the bytes that left."""
        freed = self.resident if self.form.paged else 0
        if freed:
            self._leave(self._there)
        return freed

    def news(self) -> tuple[str, ...]:
        """What there is to tell since it was last asked."""
        told, self.told = tuple(self.told), []
        return told

    def specs(self, before: str = "") -> dict[str, Spec]:
        """Dtype and shape of every state by ``{parameter}/{key}``, with ``before`` in front.

        In 32 bits those of ``torch.optim.AdamW``; in 8 bits ``exp_avg`` and ``exp_avg_sq`` are codes, uint8 in the
        parameter's shape, beside ``exp_avg_scales`` and ``exp_avg_sq_scales``, float32 [blocks].
        """
        found: dict[str, Spec] = {}
        for i in self._begun():
            _, name, parameter = self._members[i]
            found[f"{before}{name}/step"] = (self.state[parameter]["step"].dtype, ())
            for key in SECOND:
                eight = self._bits[i] == 8
                found[f"{before}{name}/{key}"] = (torch.uint8 if eight else torch.float32, tuple(parameter.shape))
                if eight:
                    found[f"{before}{name}/{key}_scales"] = (torch.float32, (blocks(parameter.numel()),))
        return found

    def parts(self, before: str = "") -> Iterator[tuple[str, int, Tensor]]:
        """Every state in pieces, page by page: its name, the place of its first number, and the piece [n] itself."""
        begun = self._begun()
        for i in begun:
            _, name, parameter = self._members[i]
            yield f"{before}{name}/step", 0, self.state[parameter]["step"].view(1)
        turned: dict[str, Tensor] = {}
        for page, buffer in self._turn([p for p in self.pages if any(i.tensor in begun for i in p.pieces)], back=False):
            for piece in page.pieces:
                _, name, parameter = self._members[piece.tensor]
                for key, part, scales in _parts(piece, buffer) if piece.tensor in begun else ():
                    full, start = f"{before}{name}/{key}", piece.begin // BLOCK if scales else piece.begin
                    if scales or parameter.is_contiguous():
                        yield full, start, part
                        continue
                    # its order of memory is not that of its numbers in a file: it goes there as a whole
                    whole = turned.setdefault(full, torch.empty_like(parameter, dtype=part.dtype, device="cpu"))
                    _flat(whole)[start : start + part.numel()].copy_(part)
                    if piece.last:
                        yield full, 0, turned.pop(full).contiguous().view(-1)
            del buffer

    def spread(self, before: str) -> Spread:
        """``specs`` and ``parts`` under these names, for a file."""
        return _Under(self, before)

    def stored(self) -> dict[str, Tensor]:
        """Every state, whole and on the processor, whatever is where."""
        found = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in self.specs().items()}
        for name, start, part in self.parts():
            found[name].view(-1)[start : start + part.numel()].copy_(part)
        return found

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``stored`` gave, of this form's bits, whatever was paged there.

        Raises KeyError for a tensor that belongs to no parameter and TrainingError for one that is not of this form.
        """
        places = {name: i for i, (_, name, _) in enumerate(self._members)}
        given = {places[full.rpartition("/")[0]] for full in tensors}
        for i in given:
            _, name, parameter = self._members[i]
            self.state[parameter]["step"] = tensors[f"{name}/step"].to(self._counts(parameter), copy=True)
        held: dict[str, Tensor] = {}
        for page, buffer in self._turn([p for p in self.pages if any(i.tensor in given for i in p.pieces)]):
            for piece in page.pieces:
                if piece.tensor in given:
                    self._copy_in(piece, buffer, tensors, held)
            del buffer

    def state_dict(self) -> dict[str, Any]:
        """Not torch's: ``stored`` is what there is. Raises TrainingError."""
        raise TrainingError("States in pages are no dictionary of torch's.", do="ask stored() and adopt()")

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Not torch's: ``adopt`` is what there is. Raises TrainingError."""
        self.state_dict()

    def _open(self) -> None:
        self.store.open([page.size for page in self.pages], self._keep)

    def _turn(self, pages: Sequence[Page], back: bool = True) -> Iterator[tuple[Page, Tensor]]:
        """Bring these pages into the device's memory one after the other; with ``back`` what is changed there stays."""
        self._open()
        done, stayed = 0, self._keep
        for page in pages:
            buffer = self._stay(page)
            if buffer is None:
                break
            yield page, buffer
            del buffer
            done += 1
        yield from self._stream(pages[done:], back)
        if self._keep < stayed:
            self.told.append(
                f"There is no room for all of the optimiser's states: from now on {self._keep} of "
                f"{len(self.pages)} pages stay, the others come and go at each step."
            )

    def _stay(self, page: Page) -> Tensor | None:
        """A page that is in memory, or is brought there to stay; None where it is not one of those."""
        if page.name not in self._places and page.index < self._keep:
            buffer = self._room(page.size)
            if page.index < self._keep:  # there was room, and none of it was this page's
                self.store.wait(self.store.read(page.index, buffer))
                self._places[page.name] = {"states": buffer}
        return self._places[page.name]["states"] if page.name in self._places else None

    def _stream(self, pages: Sequence[Page], back: bool) -> Iterator[tuple[Page, Tensor]]:
        """Two buffers in turn: one is computed on while the other is written and read."""
        buffers = [self._room(max(page.size for page in pages)) for _ in pages[:2]]
        halves = [buffers[i % 2][: page.size] for i, page in enumerate(pages)]
        reads = [self.store.read(page.index, half) for page, half in islice(zip(pages, halves, strict=True), 2)]
        writes = []
        for i, page in enumerate(pages):
            self.store.wait(reads[i])
            yield page, halves[i]
            if back:
                writes.append(self.store.write(page.index, halves[i]))
            if i + 2 < len(pages):
                reads.append(self.store.read(pages[i + 2].index, halves[i + 2]))
        for ticket in writes:
            self.store.wait(ticket)

    def _room(self, numbers: int) -> Tensor:
        """Memory for a page. Where there is none fewer pages stay from now on.

        Raises TrainingError where there is none though all have left.
        """
        while True:
            try:
                return self.store.room(numbers)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if not (self.form.paged and self._there):
                    raise TrainingError(
                        "There is no memory for the optimiser's states.",
                        given=f"{4 * numbers:,} bytes at a time, {self.bytes:,} in all",
                        do=_advice(self.form),
                    ) from error
            last = self._there[-1]
            self._keep = last.index
            self._leave([last])

    def _leave(self, pages: Sequence[Page]) -> None:
        for ticket in [self.store.write(page.index, self._places[page.name]["states"]) for page in pages]:
            self.store.wait(ticket)
        for page in pages:
            del self._places[page.name]

    def _update(self, page: Page, buffer: Tensor) -> None:
        whole: dict[int, list[Piece]] = {}
        for piece in page.pieces:
            group, _, parameter = self._members[piece.tensor]
            if parameter.grad is None:
                continue
            if piece.bits == 32:
                whole.setdefault(id(group), []).append(piece)
                continue
            codes, scales, codes_2, scales_2 = piece.codes(buffer)
            first, second = decode(codes, scales, True), decode(codes_2, scales_2, False)
            self._kernel([piece], [(first, second)])
            for (to, to_scales), moment, signed in (
                ((codes, scales), first, True),
                ((codes_2, scales_2), second, False),
            ):
                rounded, scale = encode(moment, signed)
                to.copy_(rounded)
                to_scales.copy_(scale)
        for pieces in whole.values():
            self._kernel(pieces, [piece.moments(buffer) for piece in pieces])

    def _kernel(self, pieces: Sequence[Piece], moments: Sequence[tuple[Tensor, Tensor]]) -> None:
        """torch's own update of pieces of one group."""
        group = self._members[pieces[0].tensor][0]
        parameters, gradients, counts = [], [], []
        for piece in pieces:
            parameter = self._members[piece.tensor][2]
            parameters.append(_flat(parameter)[piece.begin : piece.end])
            gradients.append(_flat(_alike(parameter))[piece.begin : piece.end])
            # the kernel counts on: the tensor's own number is for its last piece
            count = self.state[parameter]["step"]
            counts.append(count if piece.last else count.clone())
        adamw(
            parameters,
            gradients,
            [first for first, _ in moments],
            [second for _, second in moments],
            [],
            counts,
            foreach=group["foreach"],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _copy_in(self, piece: Piece, buffer: Tensor, given: Mapping[str, Tensor], held: dict[str, Tensor]) -> None:
        """``held`` are tensors of which more pieces will come."""
        _, name, parameter = self._members[piece.tensor]
        for key, part, scales in _parts(piece, buffer):
            full = f"{name}/{key}"
            if full not in held:
                held[full] = self._checked(full, given, part.dtype, None if scales else parameter)
            start = piece.begin // BLOCK if scales else piece.begin
            part.copy_(held[full][start : start + part.numel()])
            if piece.last:
                del held[full]

    def _checked(self, full: str, given: Mapping[str, Tensor], dtype: torch.dtype, like: Tensor | None) -> Tensor:
        """A tensor that was given, [n] in the order of memory of the parameter ``like``; scales have none."""
        value = given.get(full)
        shape = None if like is None else tuple(like.shape)
        if value is None or value.dtype != dtype or (shape is not None and tuple(value.shape) != shape):
            raise TrainingError(
                "The optimiser's states are not of this form.",
                given=f"{full}: " + ("nothing" if value is None else f"{value.dtype} {tuple(value.shape)}"),
                allowed=f"{dtype}" + ("" if shape is None else f" {shape}"),
                do="set optimiser.bits as the run began",
            )
        return value if like is None else _flat(_in_order(value, like))

    def _begun(self) -> list[int]:
        """Numbers of the tensors that have had a gradient."""
        return [i for i, (_, _, parameter) in enumerate(self._members) if self.state.get(parameter)]

    def _counts(self, parameter: Tensor) -> torch.device:
        """Where torch counts a parameter's steps: beside it for its fused kernel, else on the processor."""
        return parameter.device if self.param_groups[0]["fused"] else torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Under:
    """The states under names that begin with ``before``."""

    optimiser: PagedAdamW
    before: str

    def specs(self) -> Mapping[str, Spec]:
        return self.optimiser.specs(self.before)

    def parts(self) -> Iterator[tuple[str, int, Tensor]]:
        return self.optimiser.parts(self.before)


def _parts(piece: Piece, buffer: Tensor) -> Iterator[tuple[str, Tensor, bool]]:
    """A piece's tensors in a page, by the key of a checkpoint; and whether it is one of scales."""
    if piece.bits == 32:
        for key, part in zip(SECOND, piece.moments(buffer), strict=True):
            yield key, part, False
        return
    codes, scales, codes_2, scales_2 = piece.codes(buffer)
    for key, code, scale in ((SECOND[0], codes, scales), (SECOND[1], codes_2, scales_2)):
        yield key, code, False
        yield f"{key}_scales", scale, True


def _named(group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return zip(group["names"], group["params"], strict=True)


def _check(name: str, parameter: Tensor) -> None:
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    if parameter.dtype != torch.float32 or not (parameter.is_contiguous() or dense):
        raise TrainingError(
            "Only float32 numbers that lie side by side in memory have states in pages.",
            given=f"{name}: {parameter.dtype}, {tuple(parameter.shape)} with strides {parameter.stride()}",
            do="leave optimiser out",
        )


def _page_size(budget: int | None) -> int:
    """Bytes of a page."""
    if budget is None:
        return LARGEST_PAGE
    return max(SMALLEST_PAGE, min(LARGEST_PAGE, 1 << ((budget // 8).bit_length() - 1)))


def _staying(pages: Sequence[Page], budget: int | None) -> int:
    """How many of the first pages stay, so that two buffers for the others are within the budget too."""
    sizes = [4 * page.size for page in pages]
    if budget is None or sum(sizes) <= budget:
        return len(pages)
    return max(n for n in range(len(pages)) if sum(sizes[:n]) + 2 * max(sizes[n:]) <= budget)


def _flat(tensor: Tensor) -> Tensor:
    """All numbers of a dense tensor in the order of memory, [n]."""
    if tensor.is_contiguous():
        return tensor.detach().view(-1)
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _alike(parameter: Tensor) -> Tensor:
    """A parameter's gradient, its numbers in the parameter's order of memory."""
    assert parameter.grad is not None
    return _in_order(parameter.grad, parameter)


def _in_order(value: Tensor, parameter: Tensor) -> Tensor:
    if value.stride() == parameter.stride() or (value.is_contiguous() and parameter.is_contiguous()):
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _advice(form: Form) -> str:
    if not form.paged:
        return "set optimiser.paged: true"
    return "free memory, lower the rank or select fewer sites" + (
        "" if form.bits == 8 else ", or set optimiser.bits: 8"
    )
