"""A run of a recipe without numbers: its own code, on tensors that take no memory, with every block noted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from tarsia.adapter import Adapter, Fingerprint, Host, files
from tarsia.adapter.four_bits import FourBits, Quantisation, choose
from tarsia.adapter.host import CONFIG, TEXTS, anatomy_in, dtype_of, folder_of, not_twice, processor_in
from tarsia.adapter.reading import check_finite, read_json
from tarsia.adapter.stored import stored_form
from tarsia.anatomy import Anatomy
from tarsia.core.attach import Covered, base_parameters
from tarsia.core.patch import Origin
from tarsia.core.site import Kind, Site
from tarsia.plan import cuda
from tarsia.plan.ghost import Ghost, Op, harmless
from tarsia.plan.ledger import Block, Category, Ledger, Mark
from tarsia.plan.loading import Files, arrive
from tarsia.plan.workspace import Workspace
from tarsia.quant.codec import NESTED_BLOCK, Quantised, Scheme
from tarsia.quant.rounding import Loss
from tarsia.quant.tensor import Weight4
from tarsia.train import loop
from tarsia.train.features import Cache, features
from tarsia.train.memory import listening
from tarsia.train.paged import PagedAdamW
from tarsia.train.recipe import Recipe
from tarsia.train.run import NAME, Run, prepare
from tarsia.train.store import Store

_NOBODY: Final = Fingerprint(*("of a rehearsal",) * 5)


@dataclass(frozen=True, slots=True)
class Outline:
    """What is read of a base: its configuration and its processor, and no weights."""

    name: str
    path: Path
    anatomy: Anatomy
    processor: Any

    @classmethod
    def of(cls, name: str) -> Self:
        """Raises as ``tarsia.adapter.open_base`` does."""
        folder = folder_of(name, (*CONFIG, *TEXTS))
        return cls(name, folder, anatomy_in(folder), processor_in(folder))


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What was noted: blocks in the order of their birth, where phases begin, operations, and what the run says.

    ``end`` is the last moment. ``vocabulary`` is what a row of logits has, ``parameters`` how many the base has.
    """

    blocks: tuple[Block, ...]
    marks: tuple[Mark, ...]
    end: int
    ops: Mapping[Op, int]
    coverage: tuple[Covered, ...]
    fast: tuple[str, ...]
    dtype: torch.dtype
    vocabulary: int
    parameters: int

    @classmethod
    def of(cls, run: Run, ghost: Ghost) -> Self:
        """All that was noted up to now."""
        ledger = ghost.ledger
        return cls(
            blocks=ledger.settled(),
            marks=tuple(ledger.marks),
            end=ledger.now,
            ops=Counter(ghost.ops),
            coverage=run.coverage,
            fast=run.fast,
            dtype=dtype_of(run.recipe.precision, run.device),
            vocabulary=run.host.anatomy.config.get_text_config().vocab_size,
            parameters=sum(parameter.numel() for parameter in base_parameters(run.model).values()),
        )


@contextmanager
def rehearsing(recipe: Recipe, outline: Outline, ledger: Ledger, gpu: int | None = None) -> Iterator[tuple[Run, Ghost]]:
    """The run that ``recipe`` describes, on a base without numbers, ready for its steps.

    ``gpu`` is the major number of a GPU's capability: the run goes as it would there (``tarsia.plan.cuda``).
    """
    if gpu is not None:
        recipe = cuda.as_there(recipe)
    with Ghost(ledger, Workspace(ledger) if gpu is None else cuda.Scratch(gpu)) as ghost, ExitStack() as stack:
        run = prepared(recipe, outline, ghost)
        with ledger.during("prepare"):
            if gpu is not None:
                cuda.by_lists(run.optimiser)
            if isinstance(run.optimiser, PagedAdamW):
                run.optimiser.store = _NoPages()
            run.fast = stack.enter_context(loop.training(run))
            if recipe.features is not None:
                run.features = stack.enter_context(features(run.host, _Nowhere()))
                _believe(run.features)
        stack.enter_context(listening(_phases(run, ledger)))
        yield run, ghost


def prepared(recipe: Recipe, outline: Outline, ghost: Ghost) -> Run:
    """The base without numbers, with the recipe's patches; within ``ghost``."""
    ledger = ghost.ledger
    with ledger.during("load"):
        host = ghost_host(recipe, outline, ghost)
    with ledger.during("prepare"):
        run = prepare(recipe, host, torch.get_num_threads())
        ledger.label((p for patch in run.patches.values() for p in patch.parameters()), Category.PATCHES)
    return run


def steps(run: Run, ledger: Ledger, numbers: Iterable[int]) -> None:
    """Go through the steps of these numbers (from 0), one after the other."""
    for number in numbers:
        run.step = number
        with ledger.during("step"):
            loop.one_step(run)
        ledger.label(_states(run.optimiser), Category.STATES)


def settle(run: Run, ledger: Ledger) -> None:
    """Give the optimiser the states that it has after a first step, without that step."""
    for patch in run.patches.values():
        for parameter in patch.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    run.watch.observe(1, ())
    run.optimiser.step()
    run.optimiser.zero_grad(set_to_none=True)
    ledger.label(_states(run.optimiser), Category.STATES)


def ending(run: Run, ledger: Ledger) -> None:
    """What comes after the last step: the probe, and the adapter as a value."""
    run.step = run.schedule.steps
    with ledger.during("save"):
        proof = loop.final_probe(run)
        adapter = Adapter.of(run.host, NAME, run.parts, {}, probe=proof)
        # as ``save`` does before it writes: in the form that the file holds, all of them at once
        check_finite(files.stored(adapter))


def ghost_host(recipe: Recipe, outline: Outline, ghost: Ghost) -> Host:
    """The base of a recipe as ``recipe.open()`` would give it, without its numbers."""
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    dtype = dtype_of(recipe.precision, torch.device("cpu"))
    with no_init_weights():
        model: Any = AutoModelForImageTextToText.from_config(outline.anatomy.config, dtype=dtype)
    model.tie_weights()
    for parameter in model.parameters():
        ghost.haunt(parameter)
        harmless(parameter.data)
    sites = tuple(outline.anatomy.sites(model))
    held = _quantised(recipe, outline, model, sites, ghost)
    packed = held is not None and held.asked is None
    weights = Files.of(outline.path, model, sites, packed)
    arrive(model, weights, ghost.ledger)
    host = Host(
        name=outline.name,
        path=None,
        model=model.eval(),
        processor=outline.processor,
        anatomy=outline.anatomy,
        sites=sites,
        fingerprint=_NOBODY,
        variables=dict(recipe.variables),
        quantisation=held,
        resolution=recipe.resolution,
    )
    if recipe.four_bits is not None:
        host.__dict__["origin"] = _origin(model, weights.dtype, ghost)
    return host


def _origin(model: nn.Module, stored: torch.dtype, ghost: Ghost) -> Origin:
    """As the host's own, of a base whose files are not read."""

    def read(site: Site) -> Tensor:
        weight = torch.empty(model.get_parameter(site.weight).shape, dtype=stored)
        ghost.haunt(weight)
        ghost.ledger.see(weight, "read").outside = True
        return weight

    return read


def _quantised(
    recipe: Recipe, outline: Outline, model: nn.Module, sites: tuple[Any, ...], ghost: Ghost
) -> Quantisation | None:
    """Put weights in 4 bits where the recipe or the files want them.

    Raises QuantisedAlready where both do, as opening the base does.
    """
    stored = stored_form(read_json(outline.path / "config.json"), outline.path)
    asked = None if recipe.four_bits is None else recipe.four_bits.form
    not_twice(asked, stored, outline.path)
    form: FourBits | None = asked or stored
    if form is None:
        return None
    found = choose(form, model, sites)
    if any(site.kind is Kind.EXPERT for site in found.sites):
        model.set_experts_implementation("eager")  # type: ignore[operator]
    for site in found.sites:
        owner, _, name = site.weight.rpartition(".")
        module = model.get_submodule(owner)
        weight = _codes(module._parameters[name], form.scheme, ghost)
        found.losses[site.weight] = Loss(weight.numel(), sum(t.nbytes for t in weight.value.tensors.values()), 0.0, 0.0)
        module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    return found if asked is not None else Quantisation(None, form, found.sites, found.kept, found.losses)


def _codes(weight: Tensor | None, scheme: Scheme, ghost: Ghost) -> Weight4:
    """A weight's codes and constants, of the right sizes."""
    assert weight is not None
    count = weight.numel()
    blocks = -(-count // scheme.block)
    codes = torch.empty((-(-count // 2), 1), dtype=torch.uint8)
    scales = torch.empty(blocks, dtype=torch.uint8 if scheme.nested else torch.float32)
    nested = torch.empty(-(-blocks // NESTED_BLOCK)) if scheme.nested else None
    offset = torch.empty(()) if scheme.nested else None
    parts = [codes, scales, *(t for t in (nested, offset) if t is not None)]
    for part in parts:
        ghost.haunt(part)
    return Weight4(Quantised(codes, scales, nested, offset, scheme, tuple(weight.shape), weight.dtype))


def _phases(run: Run, ledger: Ledger) -> Any:
    def begins(name: str) -> None:
        if name == "update":
            gradients = (p.grad for patch in run.patches.values() for p in patch.parameters())
            ledger.label((g for g in gradients if g is not None), Category.GRADIENTS)
        ledger.begin(name)

    return begins


def _states(optimiser: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimiser.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


class _Nowhere(Store):
    """A store that keeps nothing: every picture is a new one, as in the first epoch."""

    def __init__(self) -> None:
        self.folder, self.limit = Path("/nowhere"), 0
        self.told: list[str] = []
        self.damaged = self.evicted = self.unwritten = 0

    def get(self, key: bytes) -> None:
        return None

    def put(self, key: bytes, tensors: Mapping[str, Tensor]) -> None:
        pass


class _NoPages:
    """A store of an optimiser's pages that keeps none: what a step takes of memory are the buffers alone."""

    def __init__(self) -> None:
        self._known: set[int] = set()

    def open(self, sizes: Sequence[int], leaving: int) -> None:
        pass

    def room(self, numbers: int) -> Tensor:
        return torch.empty(numbers, dtype=torch.float32)

    def write(self, page: int, source: Tensor) -> None:
        self._known.add(page)

    def read(self, page: int, into: Tensor) -> None:
        if page not in self._known:
            into.zero_()

    def wait(self, ticket: None) -> None:
        pass

    def close(self) -> None:
        pass


def _believe(cache: Cache) -> None:
    """Let the cache compute all that it would, and take what it can not compare for equal."""
    changed: Any = cache
    changed._stage_digest = lambda: b"of a rehearsal"
    changed._prove = lambda apart, together, device: together() and None
