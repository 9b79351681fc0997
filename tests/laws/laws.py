"""What every method and every slot is held to. Each law takes a case and raises where it is broken.

``test_laws.py`` tries every registered method; ``test_planted.py`` shows that each law catches a bug.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import accelerate
import torch
from accelerate.hooks import remove_hook_from_submodules
from laws.worlds import Case, Inputs, logits, move, unpacked
from torch import Tensor, nn
from torch.nn import functional as F

from tarsia.core.attach import Part, activate, attach, base_parameters, detach, install, merge, patches, routed, unmerge
from tarsia.core.errors import AttachError, RouteError
from tarsia.core.patch import Patch
from tarsia.core.segments import Segments
from tarsia.core.site import Component, Kind, Role, Site
from tarsia.quant.codec import Scheme
from tarsia.quant.tensor import Weight4

EXACT, CLOSE = 0.0, 1e-5
SITE = Site("0", Component.LANGUAGE, Role.Q, 0, Kind.WEIGHT, (1, 1), "0.weight")


def check_close(given: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Raise AssertionError where two tensors differ by more than ``tolerance`` of their size."""
    assert given.dtype == wanted.dtype, f"{what}: {given.dtype} is not {wanted.dtype}"
    assert given.shape == wanted.shape, f"{what}: {tuple(given.shape)} is not {tuple(wanted.shape)}"
    assert given.isfinite().all(), f"{what}: not finite"
    error = (given.float() - wanted.float()).abs().max().item() if given.numel() else 0.0
    size = max(1.0, wanted.float().abs().max().item()) if wanted.numel() else 1.0
    assert error <= tolerance * size, f"{what}: differs by {error:.3g}, of {size:.3g}"


def digest(tensor: Tensor) -> str:
    if isinstance(tensor, Weight4):
        return " ".join(digest(stored) for stored in tensor.value.tensors.values())
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def digests(model: nn.Module) -> dict[str, str]:
    return {name: digest(parameter) for name, parameter in base_parameters(model).items()}


def loss(model: Callable[..., Any], inputs: Inputs) -> Tensor:
    """Next-token cross-entropy over the whole batch."""
    out = model(**inputs).logits.float()
    return F.cross_entropy(out[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())


def train(model: nn.Module, inputs: Inputs, steps: int = 2) -> None:
    """Some steps of gradient descent; the gradients of the last stay."""
    learnt = [p for patch in patches(model, "default").values() for p in patch.parameters()]
    for _ in range(steps):
        model.zero_grad()
        loss(model, inputs).backward()
        with torch.no_grad():
            for parameter in learnt:
                assert parameter.grad is not None, "a tensor of a patch has no gradient"
                parameter -= 0.1 * parameter.grad


@contextmanager
def outputs(model: nn.Module, sites: list[Site]) -> Iterator[dict[str, Tensor]]:
    """What the modules of ``sites`` gave in the calls inside, by name."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                seen[name] = out

        return hook

    handles = [model.get_submodule(site.module).register_forward_hook(keep(site.module)) for site in sites]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def folded(case: Case, model: nn.Module, *names: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A bare model whose weights are those that the adapters fold into, in this order: the specification."""
    bare = unpacked(case.world.model()).to(dtype)
    own = dict(bare.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in names:
            for site, patch in patches(model, name).items():
                bias = None if site.bias is None else own[site.bias]
                weight, bias = patch.fold(own[site.weight].data.clone(), None if bias is None else bias.data.clone())
                own[site.weight].copy_(weight)
                if site.bias is not None and bias is not None:
                    own[site.bias].copy_(bias)
                assert weight.dtype == dtype, "a fold changes the dtype"
    return bare


def law_identity(case: Case) -> None:
    """A new patch changes nothing, where its method says so."""
    if case.method.identity:
        check_close(
            logits(case.attached(), case.world.inputs), logits(case.world.model(), case.world.inputs), 1e-6, "step 0"
        )


def law_forward_is_fold(case: Case) -> None:
    """Every patched module gives what a module with the folded weights gives."""
    if not case.method.folds:
        return
    model = case.moved()
    reference = folded(case, model, "default")
    sites = list(patches(model, "default"))
    with outputs(model, sites) as live:
        given = logits(model, case.world.inputs)
    with outputs(reference, sites) as specified:
        wanted = logits(reference, case.world.inputs)
    check_close(given, wanted, CLOSE, "logits")
    for name in specified:
        check_close(live[name], specified[name], CLOSE, name)


def law_any_shape(
    case: Case, out: int, into: int, lead: tuple[int, ...], bias: bool, dtype: torch.dtype, role: Role = Role.Q
) -> None:
    """The forward of a linear layer's patch agrees with its fold for x [*lead, into]."""
    if Kind.WEIGHT not in case.method.kinds or not case.method.folds or (not bias and case.method.patch.lacks(SITE)):
        return
    torch.manual_seed(out * 31 + into)
    model = nn.Sequential(nn.Linear(into, out, bias)).to(dtype)
    site = Site("0", Component.LANGUAGE, role, 0, Kind.WEIGHT, (out, into), "0.weight", "0.bias" if bias else None)
    own = model[0].weight.detach()
    if case.method.corrects:
        model[0].weight = nn.Parameter(Weight4.of(own, Scheme()), requires_grad=False)
    config = case.config or case.method.config()
    attach(model, [site], [Part(case.name, "@0", config)], origin=lambda site: own)
    move(model, by=0.3)
    x = torch.randn(*lead, into).to(dtype)
    (patch,) = patches(model, "default").values()
    with torch.no_grad():
        given = model(x)
        wide = [t if t is None else t.detach().float() for t in (unpacked(model)[0].weight, model[0].bias)]
        weight, shift = patch.fold(*wide)
        wanted = F.linear(x.float(), weight, shift)
    assert given.dtype == dtype
    room = F.linear(x.float().abs(), weight.abs() + wide[0].abs(), None if shift is None else shift.abs())
    if case.method.measured:  # a row that nearly cancels is stretched to its length again, and its rounding with it
        room = room * 4 * (1 + patch.gains(wide[0]).detach().abs())
    scale = 1e-5 if dtype == torch.float32 else 2**-5
    assert ((given.float() - wanted).abs() <= scale * (room + 1)).all(), (given, wanted)


def law_only_patches_learn(case: Case) -> None:
    """Every tensor of a patch has a gradient after a step; the base has none."""
    model = case.attached()
    train(model, case.world.inputs)
    for site, patch in patches(model, "default").items():
        for name, parameter in patch.named_parameters():
            assert parameter.requires_grad, f"{site.path}: {name} is frozen"
            assert parameter.grad is not None, f"{site.path}: {name} has no gradient"
            assert parameter.grad.count_nonzero(), f"{site.path}: the gradient of {name} is zero"
    for name, parameter in base_parameters(model).items():
        assert not parameter.requires_grad, f"the base's {name} is trained"
        assert parameter.grad is None, f"the base's {name} has a gradient"


def law_merge_restores(case: Case) -> None:
    """Merged equals live; unmerged, every tensor is the very object that it was."""
    if not case.method.folds:
        return
    model = case.moved()
    live, own, bytes_ = logits(model, case.world.inputs), base_parameters(model), digests(model)
    keys = list(model.state_dict())
    merge(model)
    assert any(now is not own[name] for name, now in base_parameters(model).items()), "nothing was merged"
    assert list(model.state_dict()) == keys, "merging changes the keys"
    check_close(logits(model, case.world.inputs), live, CLOSE, "merged")
    unmerge(model)
    for name, now in base_parameters(model).items():
        assert now is own[name], f"{name} is another object"
        assert digest(now) == bytes_[name], f"{name} has other bytes"
    check_close(logits(model, case.world.inputs), live, EXACT, "unmerged")


def reborn(model: nn.Module, name: str = "default") -> list[tuple[Site, Patch]]:
    """An adapter's patches as they come back from what would be saved of them."""
    made = []
    for site, patch in patches(model, name).items():
        state = {key: value.clone() for key, value in patch.state_dict().items()}
        constants = {key: getattr(patch, key) for key in patch.constants}
        again = type(patch).restore(site, {key: tuple(value.shape) for key, value in state.items()}, constants)
        again.load_state_dict(state, strict=True)
        made.append((site, again))
    return made


def law_saved_is_loaded(case: Case) -> None:
    """Tensors and constants are all that there is to a patch."""
    model, other = case.moved(), case.world.model()
    install(other, reborn(model), name="default")
    check_close(logits(other, case.world.inputs), logits(model, case.world.inputs), EXACT, "loaded")
    old, new = model.state_dict(), other.state_dict()
    assert list(old) == list(new)
    for key in old:
        assert digest(old[key]) == digest(new[key]), key


def law_kept_is_the_same(case: Case) -> None:
    """What is saved of a finished patch, where that is another one, computes the same."""
    if case.method.patch.kept is Patch.kept:
        return
    model, other = case.moved(), case.world.model()
    install(other, [(site, patch.kept()) for site, patch in patches(model, "default").items()], name="default")
    check_close(logits(other, case.world.inputs), logits(model, case.world.inputs), EXACT, "kept")


def traces(model: nn.Module) -> dict[str, Any]:
    """All that attaching could leave behind."""
    found: dict[str, Any] = {"keys": list(model.state_dict())}
    for name, module in model.named_modules():
        found[f"{name} type"] = type(module)
        found[f"{name} attributes"] = sorted(module.__dict__)
        found[f"{name} children"] = list(module._modules)
        found[f"{name} hooks"] = {
            k: len(v) for k, v in module.__dict__.items() if k.endswith("_hooks") and v is not None
        }
        found[f"{name} mode"] = module.training
    for name, parameter in model.named_parameters():
        found[f"{name} is"] = id(parameter), type(parameter), parameter.requires_grad, digest(parameter)
    return found


def law_removal_leaves_no_trace(case: Case) -> None:
    """Attached, merged and taken out again, the model is what it was in every respect."""
    model = case.world.model()
    next(model.parameters()).requires_grad_(False)
    bare = logits(model, case.world.inputs)  # a first call leaves traces of Transformers' own
    before = traces(model)
    case.attach(model, "one")
    activate(model)
    case.attach(model, "two", seed=1)
    move(model, "two")
    logits(model, case.world.inputs)
    if case.method.folds:
        merge(model)
    detach(model, "one")
    detach(model, "two")
    after = traces(model)
    for key in {**before, **after}:
        assert before.get(key) == after.get(key), f"{key}: {before.get(key)} became {after.get(key)}"
    check_close(logits(model, case.world.inputs), bare, EXACT, "detached")


def law_nesting(case: Case) -> None:
    """Of several active adapters the first is lowest: the second folds what the first has folded."""
    model = case.world.model()
    for seed, name in enumerate(("one", "two"), 1):
        activate(model)
        case.attach(model, name, seed)
        move(model, name, seed)
    bare = logits(case.world.model(), case.world.inputs)
    for names in (("one",), ("two",), ("one", "two"), ("two", "one")) if case.method.folds else ():
        if case.method.replaces and len(names) > 1:
            _must_raise(AttachError, lambda names=names: activate(model, *names), "the lower would be lost")
            continue
        activate(model, *names)
        wanted = logits(folded(case, model, *names), case.world.inputs)
        # the roundings of as many patches
        near = CLOSE * len(names)
        check_close(logits(model, case.world.inputs), wanted, near, " under ".join(names))
        merge(model)
        check_close(logits(model, case.world.inputs), wanted, near, " merged under ".join(names))
        unmerge(model)
    activate(model)
    check_close(logits(model, case.world.inputs), bare, EXACT, "none active")


def _routable(case: Case) -> list[Site]:
    """Sites with one input and one output by row: not a mixture's, which see tokens and their experts."""
    others = (s.kind is Kind.EXPERT or s.role is Role.ROUTER for s in case.world.sites)
    return [s for s, other in zip(case.world.sites, others, strict=True) if s.stream is not None and not other]


def _shared(case: Case) -> nn.Module:
    """A model with two adapters, of unequal rank or length where the method has one, where rows can be told apart."""
    model = case.world.model()
    options = {name: 5 for name in ("rank", "length") if hasattr(case.method.config(), name)}
    case.attach(model, "one", 1, _routable(case))
    activate(model)
    case.attach(model, "two", 2, _routable(case), **options)
    by = max(case.far, 0.3 if Kind.SEQUENCE in case.method.kinds else 0.0)  # a lead is a few positions among many
    move(model, "one", 1, by)
    move(model, "two", 2, by)
    return model


def law_mixed_rows(case: Case) -> None:
    """A row in a mixed batch is that row alone, whatever its neighbours are."""
    model, inputs = _shared(case), case.world.inputs
    alone: dict[tuple[str | None, int], Tensor] = {}
    for name in ("one", "two", None):
        activate(model, *([] if name is None else [name]))
        for i in range(3):
            alone[name, i] = logits(model, case.world.row(i))[0]
    activate(model, "one")
    for i in filter(case.sees, range(3)):
        for a, b in (("one", "two"), ("one", None), ("two", None)):
            assert (alone[a, i] - alone[b, i]).abs().max() >= 0.1, f"row {i}: {a} acts as {b}"
    for names in (("one", None, "two"), ("two", "one", "two"), (None, "two", None), ("two", "two", "two"), (None,) * 3):
        with routed(model, names, case.world.segments):
            mixed = logits(model, inputs)
        for i, name in enumerate(names):
            real = inputs["attention_mask"][i].bool()
            check_close(mixed[i][real], alone[name, i][real], CLOSE, f"row {i} of {names}")


def law_wrong_segments_raise(case: Case) -> None:
    """Segments that are not of this batch are refused."""
    model, counts = _shared(case), case.world.segments.counts
    used = {site.stream for site in patches(model, "one")}
    names = ("one", None, "two")
    for stream in counts:
        wrong = dict(counts) | {stream: (*counts[stream][:-1], counts[stream][-1] + 1)}
        if stream in used:
            _must_raise(RouteError, lambda s=wrong: _route(model, case, names, Segments(s)), f"{stream} one too long")
    _must_raise(RouteError, lambda: _route(model, case, names[:2], case.world.segments), "a row without a name")
    _must_raise(RouteError, lambda: _route(model, case, (*names, None), case.world.segments), "a name without a row")
    missing = {k: v for k, v in counts.items() if k not in used}
    _must_raise(RouteError, lambda: _route(model, case, names, Segments(missing)), "streams that are not there")


def _route(model: nn.Module, case: Case, names: tuple[str | None, ...], segments: Segments) -> None:
    with routed(model, names, segments):
        logits(model, case.world.inputs)


def _must_raise(kind: type[Exception], act: Callable[[], Any], what: str) -> None:
    try:
        act()
    except kind:
        return
    raise AssertionError(f"{what}: nothing was raised")


def law_unroutable_raises(case: Case) -> None:
    """Where rows can not be told apart, mixing is an error and one adapter for all is not."""
    others = [s for s in case.world.sites if s not in _routable(case)]
    if not others or not case.parts(others):
        return
    model = case.world.model()
    case.attach(model, sites=others)
    move(model)
    live = logits(model, case.world.inputs)
    _must_raise(RouteError, lambda: _route(model, case, ("default", None, None), case.world.segments), "mixed")
    with routed(model, ("default",) * 3, case.world.segments):
        check_close(logits(model, case.world.inputs), live, EXACT, "one adapter for all")
    with routed(model, (None,) * 3, case.world.segments):
        bare = logits(case.world.model(), case.world.inputs)
        check_close(logits(model, case.world.inputs), bare, EXACT, "the base for all")


def _offload(model: nn.Module, where: str, folder: str) -> None:
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def law_offload(case: Case) -> None:
    """Offloaded by accelerate before or after, to memory or disk, patches act and go as ever."""
    live = case.moved()
    wanted, bare = logits(live, case.world.inputs), logits(case.world.model(), case.world.inputs)
    for where in ("cpu", "disk") if case.world.disk else ("cpu",):
        with tempfile.TemporaryDirectory() as folder:
            first = case.world.model()
            _offload(first, where, folder)
            install(first, reborn(live), name="default")
            check_close(logits(first, case.world.inputs), wanted, EXACT, f"{where}, offloaded before")
            if case.method.folds:
                _must_raise(AttachError, lambda model=first: merge(model), "merging what is offloaded")
            detach(first, "default")
            check_close(logits(first, case.world.inputs), bare, EXACT, f"{where}, detached under the hook")
            case.attach(first)
            if case.method.identity:
                check_close(logits(first, case.world.inputs), bare, 1e-6, f"{where}, made under the hook")
        with tempfile.TemporaryDirectory() as folder:
            later = deepcopy(live)
            _offload(later, where, folder)
            check_close(logits(later, case.world.inputs), wanted, EXACT, f"{where}, offloaded after")
            again = deepcopy(later)
            remove_hook_from_submodules(later)
            check_close(logits(later, case.world.inputs), wanted, EXACT, f"{where}, hooks removed")
            detach(later, "default")
            check_close(logits(later, case.world.inputs), bare, EXACT, f"{where}, detached at last")
            detach(again, "default")
            check_close(logits(again, case.world.inputs), bare, EXACT, f"{where}, detached under later hooks")


def law_offloaded_adapters_share(case: Case) -> None:
    """Two offloaded adapters over one another, and side by side in one batch, act as in memory."""
    model, names = _shared(case), ("one", None, "two")
    activate(model, *(("two",) if case.method.replaces else ("one", "two")))
    piled = logits(model, case.world.inputs)
    with routed(model, names, case.world.segments):
        mixed = logits(model, case.world.inputs)
    _offload(model, "cpu", "")
    check_close(logits(model, case.world.inputs), piled, CLOSE, "over one another")
    with routed(model, names, case.world.segments):
        check_close(logits(model, case.world.inputs), mixed, CLOSE, "side by side")


def law_copies_are_independent(case: Case) -> None:
    """A deep copy shares nothing with its original."""
    model = case.moved()
    wanted = logits(model, case.world.inputs)
    copy = deepcopy(model)
    move(model, seed=5)
    check_close(logits(copy, case.world.inputs), wanted, EXACT, "the copy, its original changed")
    moved = logits(model, case.world.inputs)
    assert not torch.equal(moved, wanted)
    detach(copy, "default")
    check_close(logits(model, case.world.inputs), moved, EXACT, "the original, its copy changed")
    check_close(logits(copy, case.world.inputs), logits(case.world.model(), case.world.inputs), EXACT, "bare copy")


def law_compiles(case: Case, backend: str = "eager") -> None:
    """Each kind of patched module compiles as one graph, where it does so without its patch."""
    model, bare = case.moved(), case.world.model()
    tried = compiled = 0
    inputs: dict[str, tuple[Any, Any]] = {}
    # modules of one type that a slot treats alike are one graph
    firsts = {
        (site.kind, type(model.get_submodule(site.module)), site.bias is None, bool(site.tied)): site
        for site in reversed(list(patches(model, "default")))
    }
    handles = []
    for site in firsts.values():

        def keep(module: nn.Module, args: Any, keywords: Any, name: str = site.module) -> None:
            inputs[name] = args, keywords

        handles.append(model.get_submodule(site.module).register_forward_pre_hook(keep, with_kwargs=True))
    logits(model, {**case.world.inputs, "use_cache": False})  # a cache would grow with each call of a layer
    for handle in handles:
        handle.remove()
    for module in model.modules():
        module._forward_hooks.clear()  # those by which Transformers keeps inner outputs break a graph themselves
    for name, (args, keywords) in inputs.items():
        module = model.get_submodule(name)
        torch._dynamo.reset()
        with torch.no_grad():
            wanted = module(*args, **keywords)
            if not isinstance(wanted, Tensor):
                continue
            tried += 1
            try:
                torch.compile(bare.get_submodule(name), fullgraph=True, backend=backend)(*args, **keywords)
            except torch._dynamo.exc.TorchDynamoException:
                continue  # lengths that are known from the pictures alone, in Qwen's tower
            torch._dynamo.reset()
            given = torch.compile(module, fullgraph=True, backend=backend)(*args, **keywords)
        compiled += 1
        check_close(given, wanted, CLOSE, name)
    assert compiled or not tried, "no module of this world compiles"


def law_model_compiles(case: Case) -> None:
    """A whole patched model compiles as one graph, forward and backward."""
    compiled_whole(case, "eager")


def compiled_whole(case: Case, backend: str) -> tuple[Any, Tensor]:
    """The whole patched model as one graph, proved in training, and the logits that it must give."""
    model = case.moved()
    loss(model, case.world.inputs).backward()
    learnt = [p for patch in patches(model, "default").values() for p in patch.parameters()]
    wanted, gradients = logits(model, case.world.inputs), [p.grad.clone() for p in learnt]
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    given: list[Tensor] = []

    def kept(**inputs: Any) -> Any:
        out = compiled(**inputs)
        given.append(out.logits.detach())
        return out

    loss(kept, case.world.inputs).backward()
    check_close(given[0], wanted, CLOSE, "compiled")
    for parameter, gradient in zip(learnt, gradients, strict=True):
        check_close(parameter.grad, gradient, 1e-4, "gradient")
    return compiled, wanted


def law_base_bytes_stay(case: Case) -> None:
    """Nothing that is done with patches touches a byte of the base."""
    model = case.world.model()
    before, own = digests(model), base_parameters(model)
    case.attach(model)
    train(model, case.world.inputs)
    if case.method.folds:
        merge(model)
        logits(model, case.world.inputs)
        assert {name: digest(own[name]) for name in own} == before, "merging writes into the base"
        unmerge(model)
    train(model, case.world.inputs, 1)
    detach(model, "default")
    assert digests(model) == before


def law_only_the_outermost_goes(case: Case) -> None:
    """With something else wrapped around a patched module, detaching is refused and changes nothing."""
    model = case.moved()
    wanted, keys = logits(model, case.world.inputs), list(model.state_dict())
    module = model.get_submodule(list(patches(model, "default"))[-1].module)
    inner = module.forward
    module.forward = lambda *args, **keywords: inner(*args, **keywords)
    _must_raise(AttachError, lambda: detach(model, "default"), "detached from below")
    _must_raise(AttachError, lambda: case.attach(model, "other"), "attached from below")
    check_close(logits(model, case.world.inputs), wanted, EXACT, "refused")
    assert list(model.state_dict()) == keys
    module.forward = inner
    detach(model, "default")
    check_close(logits(model, case.world.inputs), logits(case.world.model(), case.world.inputs), EXACT, "allowed")


def _side_by_side(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)


def law_masters_are_float32(case: Case) -> None:
    """On a bf16 base patches are float32, and outputs and folds are bf16."""
    model = case.world.model().to(torch.bfloat16)
    if case.world.mixture:
        model.set_experts_implementation("eager")  # the grouped product wants wider experts in bf16
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in case.world.inputs.items()}
    # a layer rounds in another order where its input lies otherwise in memory
    layers = [model.get_submodule(site.module) for site in case.world.sites if site.kind is Kind.WEIGHT]
    hooks = [layer.register_forward_pre_hook(_side_by_side) for layer in layers]
    bare = logits(model, inputs)
    case.attach(model)
    check_masters(model)
    if case.method.identity:
        check_close(logits(model, inputs), bare, EXACT, "step 0")
    for hook in hooks:
        hook.remove()
    train(model, inputs)
    move(model)
    check_masters(model)
    given = logits(model, inputs)
    assert given.dtype == torch.bfloat16
    sites = list(patches(model, "default"))
    with outputs(model, sites) as live:
        logits(model, inputs)
    for name, out in live.items():
        assert out.dtype == torch.bfloat16, f"{name} gives {out.dtype}"
    if case.method.folds:
        reference = folded(case, model, "default", dtype=torch.bfloat16)
        if case.world.mixture:
            reference.set_experts_implementation("eager")
        merge(model)
        # what stays packed is multiplied in another order than its numbers are
        same = 2**-5 if case.world.packed - {site.weight for site in sites} else EXACT
        check_close(logits(model, inputs), logits(reference, inputs), same, "merged")


def check_masters(model: nn.Module) -> None:
    for site, patch in patches(model, "default").items():
        for name, parameter in patch.named_parameters():
            assert parameter.dtype == torch.float32, f"{site.path}: {name} is {parameter.dtype}"


def law_checkpointing(case: Case) -> None:
    """Activations computed a second time give the same gradients; what a cache would bring in is refused there."""
    model = case.moved().train()
    model.enable_input_require_grads()
    loss(model, case.world.inputs).backward()
    learnt = {f"{s.path}.{n}": p for s, patch in patches(model, "default").items() for n, p in patch.named_parameters()}
    wanted = {name: parameter.grad.clone() for name, parameter in learnt.items()}
    # a reentrant checkpoint needs an input with a gradient, which no vision tower's is
    for reentrant in (False, True) if case.world.name == "text" else (False,):
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if Kind.SEQUENCE in case.method.kinds:  # Transformers' layers drop their cache where they are computed again
            _must_raise(RouteError, lambda: loss(model, case.world.inputs), "a lead before checkpointed layers")
            continue
        loss(model, case.world.inputs).backward()
        for name, parameter in learnt.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            check_close(parameter.grad, wanted[name], 1e-6, name)


def law_modes(case: Case) -> None:
    """No gradient mode changes an output, and none spoils the training after it."""
    model = case.moved()
    wanted = model(**case.world.inputs).logits
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            check_close(model(**case.world.inputs).logits, wanted, EXACT, mode.__name__)
    train(model, case.world.inputs)
    late = case.world.model()
    with torch.inference_mode():
        case.attach(late)
        late(**case.world.inputs)
    train(late, case.world.inputs)


def law_train_mode(case: Case) -> None:
    """A patch follows the model's mode; without dropout it draws no random numbers and changes nothing."""
    base = case.world.model().train()
    model = case.world.model().train()
    case.attach(model)
    torch.manual_seed(3)
    wanted = logits(base, case.world.inputs)
    torch.manual_seed(3)
    given = logits(model, case.world.inputs)
    assert torch.rand(1) == _draw_after(base, case), "patches draw random numbers"
    if case.method.identity:
        check_close(given, wanted, 1e-6, "step 0 in train mode")
    for patch in patches(model, "default").values():
        assert all(module.training for module in patch.modules()), "attached in train mode, a patch is not in it"
    move(model, by=case.far)
    model.eval()
    check_close(logits(model, case.world.inputs), logits(case.moved(), case.world.inputs), EXACT, "eval")
    if hasattr(case.method.config(), "dropout"):
        _check_dropout(case)


def _draw_after(model: nn.Module, case: Case) -> Tensor:
    torch.manual_seed(3)
    logits(model, case.world.inputs)
    return torch.rand(1)


def _check_dropout(case: Case) -> None:
    model = case.world.model()
    case.attach(model, dropout=0.5)
    move(model)
    steady = logits(model, case.world.inputs)
    check_close(logits(model, case.world.inputs), steady, EXACT, "dropout in eval mode")
    if case.method.folds:
        check_close(steady, logits(folded(case, model, "default"), case.world.inputs), CLOSE, "dropout in eval mode")
    model.train()
    assert not torch.equal(logits(model, case.world.inputs), logits(model, case.world.inputs)), "dropout never drops"


def law_merged_is_guarded(case: Case) -> None:
    """While patches are merged, whatever would not act is refused."""
    if not case.method.folds:
        return
    model = case.moved()
    merge(model)
    wanted = logits(model, case.world.inputs)
    for what, act in {
        "merged twice": lambda: merge(model),
        "activated": lambda: activate(model),
        "attached": lambda: case.attach(model, "other"),
        "routed": lambda: _route(model, case, (None,) * 3, case.world.segments),
    }.items():
        _must_raise(AttachError, act, what)
        check_close(logits(model, case.world.inputs), wanted, EXACT, f"refused: {what}")
    unmerge(model)
    unmerge(model)


LAWS = {name: law for name, law in globals().items() if name.startswith("law_") and law is not law_any_shape}
