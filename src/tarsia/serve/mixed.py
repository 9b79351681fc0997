"""One installed adapter that is all adapters: at each site it looks at the board, whose tokens lie where."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from tarsia.adapter import Host
from tarsia.core.attach import install, slots
from tarsia.core.errors import AttachError, RouteError
from tarsia.core.lead import Pairs
from tarsia.core.patch import Outside, Patch
from tarsia.core.site import Kind, Site
from tarsia.serve import kernel
from tarsia.serve.forms import COLUMNS, Form, Neck, Odd, Thin, Whole

if TYPE_CHECKING:
    from tarsia.serve.page import Page

NAME: Final = "serve"
"""The one adapter that is installed."""
_KEPT: Final = 8
"""Tables that are kept for the next steps: in one step rows are looked up, read and asked for logits."""


class Board:
    """Whose tokens lie where in the pass that runs now. One thread at a time, as with the model itself."""

    def __init__(self, host: Host) -> None:
        if slots(host.model):
            raise AttachError("The base that is to be served has adapters of its own.", do="detach them first")
        self.host = host
        self.here: Alone | Line | None = None
        self.fitting: set[Hashable] = set()
        self._sites = {site.path: site for site in host.sites}
        self._places: dict[str, Mixed] = {}
        self._tables: dict[tuple[int, ...], Table] = {}

    @contextmanager
    def alone(self, page: Page | None) -> Iterator[None]:
        """Every call inside is wholly this adapter's (None: the base's): pictures, proofs, batches of its rows."""
        with self._with(Alone(page)):
            yield

    @contextmanager
    def lying(self, pages: Sequence[Page | None], counts: Sequence[int]) -> Iterator[None]:
        """A line of rows inside: [1, T, ...] or [T, width], row i having the next ``counts[i]`` tokens.

        What stands before rows (prompts, prefixes) is in the cache of whoever calls: nothing is laid before them here.
        Raises RouteError where a patched site sees another number of tokens.
        """
        if len(pages) != len(counts) or any(count < 0 for count in counts):
            raise RouteError(
                "The line has other rows than adapters.", given=f"{len(pages)} adapters, {len(counts)} rows"
            )
        runs = [
            (page, sum(n for _, n in run)) for page, run in groupby(zip(pages, counts, strict=True), lambda r: r[0])
        ]
        with self._with(Line(self._table([page for page, _ in runs]), [count for _, count in runs])):
            yield

    @contextmanager
    def _with(self, here: Alone | Line) -> Iterator[None]:
        before, self.here = self.here, here
        try:
            yield
        finally:
            self.here = before

    def _table(self, pages: Sequence[Page | None]) -> Table:
        key = tuple(map(id, pages))  # the table holds the pages, so an id is nobody else's while it is kept
        found = self._tables.pop(key, None)
        if found is None:
            found = Table(pages, len(self._places))
            while len(self._tables) >= _KEPT:
                del self._tables[next(iter(self._tables))]
        self._tables[key] = found
        return found

    def forget(self, page: Page) -> None:
        """Let go of whatever is kept of a page."""
        self._tables = {key: table for key, table in self._tables.items() if id(page) not in key}

    def install(self, paths: Sequence[str]) -> None:
        """Have a patch at each of these sites, and where their tensors are used a second time."""
        fresh = [path for path in paths if path not in self._places and path in self._sites]
        if not fresh:
            return
        wanted = set(fresh)
        order = [site for site in self.host.sites if site.path in wanted]
        install(self.host.model, [(site, self._patch(site)) for site in order], name=NAME, more=True)
        self._tables.clear()

    def with_these(self, paths: Iterable[str]) -> int:
        """How many patches there are once these sites have some."""
        fresh = [self._sites[path] for path in paths if path not in self._places and path in self._sites]
        return len(self._places) + len(fresh) + sum(len(site.tied) for site in fresh)

    def _patch(self, site: Site) -> Mixed:
        self._places[site.path] = made = Mixed(self, site, len(self._places))
        return made

    def remove(self) -> None:
        """Take every patch out: the model is as it was."""
        from tarsia.core.attach import detach

        if any(NAME in slot.patches for slot in slots(self.host.model)):
            detach(self.host.model, NAME)
        self._places, self._tables = {}, {}

    def entries(self, forms: Mapping[str, Form]) -> Tensor:
        """What the kernels read of these forms, int64 [sites, 12] by the number of the site; 0 where there is none."""
        made = torch.zeros(len(self._places), COLUMNS, dtype=torch.int64)
        rows = [
            (self._places[path].number, form.entry()) for path, form in forms.items() if isinstance(form, Thin | Neck)
        ]
        if rows:
            made[[number for number, _ in rows]] = torch.tensor([entry for _, entry in rows])
        return made


@dataclass(frozen=True, eq=False)
class Alone:
    """A call that is wholly one adapter's."""

    page: Page | None


@dataclass(frozen=True, eq=False)
class Apart:
    """A form that runs over its own rows: the numbers of these among those of the line."""

    form: Whole | Odd
    rows: list[int]


@dataclass(frozen=True, eq=False, slots=True)
class Here:
    """The rows of a table at one site: forms as `kernel.grouped` takes them (None: nobody has one), and those apart.

    ``scaled``: one of them scales the input. ``entries`` int64 [rows, 12].
    """

    grouped: list[Any] | None
    scaled: bool
    entries: Tensor
    apart: list[Apart]


@dataclass(eq=False)
class Table:
    """The forms of a line's rows at every site. Rows of one adapter that lie side by side are one row here."""

    pages: Sequence[Page | None]
    sites: int
    _here: dict[str, Here] = field(default_factory=dict)

    @cached_property
    def patched(self) -> frozenset[str]:
        """Paths of the sites at which any row has a form."""
        return frozenset().union(*(page.forms.keys() for page in self.pages if page is not None))

    @cached_property
    def entries(self) -> Tensor:
        """int64 [sites, rows, 12], made once for all sites."""
        made = torch.zeros(len(self.pages), self.sites, COLUMNS, dtype=torch.int64)
        for row, page in enumerate(self.pages):
            if page is not None:
                made[row, : len(page.entries)] = page.entries
        whole = made.transpose(0, 1).contiguous()
        device = next((page.device for page in self.pages if page is not None), whole.device)
        return whole.to(device)

    def at(self, path: str, number: int) -> Here:
        """What there is at the site of this path and number."""
        found = self._here.get(path)
        if found is None:
            forms = [None if page is None else page.forms.get(path) for page in self.pages]
            grouped = [form if isinstance(form, Thin | Neck) else None for form in forms]
            held: dict[int, Apart] = {}
            for row, form in enumerate(forms):
                if isinstance(form, Whole | Odd):
                    held.setdefault(id(form), Apart(form, [])).rows.append(row)
            found = self._here[path] = Here(
                grouped=grouped if any(grouped) else None,
                scaled=any(isinstance(form, Thin) and form.inner is not None for form in grouped),
                entries=self.entries[number],
                apart=list(held.values()),
            )
        return found


class Line:
    """Where each row of a table lies in the pass that runs now."""

    __slots__ = ("counts", "ends", "starts", "table", "total")

    def __init__(self, table: Table, counts: Sequence[int]) -> None:
        self.table, self.counts = table, counts
        self.ends = [0, *accumulate(counts)]
        self.total = self.ends[-1]
        self.starts = torch.tensor(self.ends, dtype=torch.int32)

    def spans(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """First token and the one after the last of each of these rows."""
        return [(self.ends[row], self.ends[row + 1]) for row in rows]

    def axis(self, x: Tensor, site: Site, known: int | None) -> int:
        """The dimension along which tokens lie: [T, width] of a router, [1, T, ...], or [1, heads, T, ...] of a norm.

        ``known`` settles it where there are as many heads as tokens. Raises RouteError where no dimension is of the
        line's length, or nobody can tell which.
        """
        flat = x.ndim == 2 and x.is_floating_point()
        places = (0,) if flat else (1, 2) if x.ndim == 4 else (1,)
        fitting = [i for i in places if i < x.ndim and x.shape[i] == self.total and (flat or x.shape[0] == 1)]
        if len(fitting) > 1:
            fitting = [i for i in fitting if i == known]
        if not fitting or known not in (None, *fitting):
            raise RouteError(
                f"{site.path} does not see the line that was laid out.",
                given=f"{tuple(x.shape)}",
                allowed=f"{self.total} tokens of rows of {self.counts}"[:200],
                do="call the model with what was given to `lying`",
            )
        return fitting[0]


class Mixed(Patch):
    """What all adapters do at one site, each to its own tokens; the base runs once for all."""

    def __init__(self, board: Board, site: Site, number: int) -> None:
        super().__init__()
        self.board, self.site, self.number = board, site, number
        self.along: int | None = None  # the dimension of tokens, once a line has shown it

    def again(self, place: Site) -> Patch:
        return self.board._patch(place)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise AttachError("Many adapters can not be folded into one weight.", given=self.site.path)

    def forward(self, x: Any, base: Any) -> Any:
        here = self.board.here
        if here is None:
            raise RouteError(
                "Nobody has said whose tokens these are.", given=self.site.path, do="enter board.alone or board.lying"
            )
        if isinstance(here, Alone):
            return self._alone(here.page, x, base)
        if self.site.kind is Kind.SEQUENCE:
            return ()
        if self.site.path not in here.table.patched:
            return base(x)
        return self._lying(here, x, base)

    def _alone(self, page: Page | None, x: Any, base: Any) -> Any:
        form = None if page is None else page.forms.get(self.site.path)
        if self.site.kind is Kind.SEQUENCE:
            return _lead(page)
        if page is None or form is None:
            return base(x)
        if isinstance(form, Odd):
            return form.patch(x, base)
        if isinstance(form, Whole):
            return base.apply(form.weight, form.bias, x)
        entries = page.entries[self.number : self.number + 1].to(x.device)
        starts = torch.tensor([0, x.numel() // x.shape[-1]], dtype=torch.int32)
        scaled = isinstance(form, Thin) and form.inner is not None
        return _grouped(x, base, starts, Here([form], scaled, entries, []))

    def _lying(self, line: Line, x: Tensor, base: Any) -> Any:
        shape = x.shape
        if len(shape) == 3 and shape[0] == 1 and shape[1] == line.total:
            axis = 1
        else:
            axis = line.axis(x, self.site, self.along)
            self.along = axis if x.ndim == 4 else None
        here = line.table.at(self.site.path, self.number)
        out = base(x) if here.grouped is None else _grouped(x, base, line.starts, here)
        for one in here.apart:
            self._own(one.form, x, out, base, axis, line.spans(one.rows))
        return out

    def _own(
        self, form: Whole | Odd, x: Tensor, out: Any, base: Any, axis: int, spans: Sequence[tuple[int, int]]
    ) -> None:
        """Let a form run over its own tokens alone, and lay what it gives in their places in ``out``."""
        y: Tensor = out[0] if isinstance(out, tuple) else out
        first, last = spans[0][0], spans[-1][1]
        whole = all(end == start for (_, end), (start, _) in pairwise(spans))
        index = None if whole else torch.cat([torch.arange(*span) for span in spans]).to(x.device)
        own = x.narrow(axis, first, last - first) if index is None else x.index_select(axis, index)
        if isinstance(form, Whole):
            changed = F.linear(own, form.weight, form.bias)
        elif isinstance(form.patch, Outside):
            given = y.narrow(axis, first, last - first) if index is None else y.index_select(axis, index)
            changed = form.patch.change(own, given)
        else:
            changed = form.patch(own, base)
        if index is None:
            y.narrow(axis, first, last - first).copy_(changed)
        else:
            y.index_copy_(axis, index, changed)


def _lead(page: Page | None) -> Pairs:
    return () if page is None else page.lead


def _grouped(x: Tensor, base: Any, starts: Tensor, here: Here) -> Any:
    """The base once for all tokens, and each row's Thin or Neck over its own."""
    forms = here.grouped
    assert forms is not None
    if here.scaled:
        x = kernel.inner(x.reshape(-1, x.shape[-1]), starts, forms, here.entries).view(x.shape)
    out = base(x)
    y: Tensor = out[0] if isinstance(out, tuple) else out
    y = y.contiguous()
    given = x if x.shape[:-1] == y.shape[:-1] else y
    kernel.grouped(given.contiguous().view(-1, given.shape[-1]), y.view(-1, y.shape[-1]), starts, forms, here.entries)
    return (y, *out[1:]) if isinstance(out, tuple) else y
