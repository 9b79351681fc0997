"""What small models really hold while they are trained, in bytes, beside what the sums of memory say."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from tarsia.adapter import Adapter, open_base, save
from tarsia.core.attach import Part, attach, detach, patches
from tarsia.core.site import Component, Kind, Role, Site
from tarsia.labs.frame.chapter import Desk
from tarsia.labs.frame.tables import Cell
from tarsia.methods.lora import LoRAConfig
from tarsia.plan import sums
from tarsia.plan.assumptions import Assumptions
from tarsia.plan.figure import GIGA
from tarsia.plan.geometry import MODELS, Decoder, Geometry, Tower, inside, lora, quantised, top
from tarsia.quant.codec import Scheme, encode
from tarsia.quant.tensor import Weight4
from tarsia.train.memory import live
from tarsia.train.optimiser import adamw, state

SMALL: Final = Decoder(256, 4, 8, 2, 688, 1000)
STEPPED: Final = Decoder(256, 6, 8, 2, 1024, 2000)
"""Small enough for every computer: LLaMA's form with shared keys and values."""
BATCH, LENGTH, RANK = 2, 192, 32
ROLES: Final = {f"{role}_proj": role for role in (Role.Q, Role.K, Role.V, Role.O, Role.GATE, Role.UP, Role.DOWN)}
JOBS: Final = sums.JOBS
OTHERS: Final = "other states"

Rows = dict[str, Mapping[str, Cell]]


def fields(decoder: Decoder) -> dict[str, Any]:
    """The shapes as Transformers' configurations spell them."""
    return {
        "hidden_size": decoder.hidden,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "intermediate_size": decoder.intermediate,
        "vocab_size": decoder.vocabulary,
    }


def on_meta(decoder: Decoder, tower: Tower | None) -> nn.Module:
    """The model that Transformers makes of these shapes, without its numbers."""
    from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, Qwen2_5_VLConfig, Qwen2Config

    with torch.device("meta"):
        if tower is None:
            kind = Qwen2Config if decoder.bias else LlamaConfig
            return AutoModelForCausalLM.from_config(kind(**fields(decoder), tie_word_embeddings=False))  # type: ignore[no-any-return]
        seen = {"hidden_size": tower.hidden, "intermediate_size": tower.intermediate, "out_hidden_size": tower.out}
        config = Qwen2_5_VLConfig(text_config=fields(decoder), vision_config={**seen, "depth": tower.layers})
        model: nn.Module = AutoModel.from_config(config)
        model.head = nn.Linear(decoder.hidden, decoder.vocabulary, bias=False)
        return model


def llama(decoder: Decoder, dtype: torch.dtype) -> nn.Module:
    """A LLaMA of these shapes with random numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**fields(decoder))).to(dtype)
    return model.train()


def linears(model: nn.Module) -> Iterator[tuple[str, Role, nn.Linear]]:
    """The linear layers of the blocks: path, role, module."""
    for path, module in model.named_modules():
        if (role := ROLES.get(path.rpartition(".")[2])) is not None and isinstance(module, nn.Linear):
            yield path, role, module


def size(tensors: Sequence[Tensor]) -> int:
    """Bytes of these tensors' storages, each counted once."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values())


def against(formula: int, measured: int) -> Mapping[str, Cell]:
    """Both, and what they are apart."""
    return {"formula": formula, "measured": measured, "apart": measured - formula}


def counted(desk: Desk) -> Rows:
    """The table's models against those that Transformers builds."""
    found: Rows = {}
    for i, (name, model) in enumerate(MODELS.items()):
        desk.show(0.05 + 0.3 * i / len(MODELS), name)
        built = on_meta(model.decoder, model.tower)
        numbers = sum(p.numel() for p in built.parameters())
        d = model.decoder
        found[f"numbers: {name}"] = {
            **against(model.parameters, numbers),
            "4-bit blocks, GB": sum(quantised(d, True)) / GIGA,
            "LoRA of rank 16": lora(d, 16),
        }
    return found


def trained(mixed: bool) -> dict[str, list[Tensor]]:
    """A small model trained one step with every parameter: what it then holds, by the names of the sums."""
    model = llama(SMALL, torch.bfloat16 if mixed else torch.float32)
    named = dict(model.named_parameters())
    masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in named.items()} if mixed else named
    optimiser = adamw([masters], [1e-4], (0.9, 0.999), 0.0)
    ids = torch.arange(64)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    if mixed:
        for name, master in masters.items():
            master.grad = named[name].grad.float()  # type: ignore[union-attr]
    optimiser.step()
    if mixed:
        optimiser.zero_grad(set_to_none=True)
    moments = state(optimiser)
    return {
        sums.WEIGHTS: list(named.values()),
        sums.GRADIENTS: [p.grad for p in named.values() if p.grad is not None],
        **({sums.MASTER: list(masters.values())} if mixed else {}),
        sums.FIRST: [t for name, t in moments.items() if name.endswith("/exp_avg")],
        sums.SECOND: [t for name, t in moments.items() if name.endswith("/exp_avg_sq")],
        OTHERS: [t for name, t in moments.items() if name.rpartition("/")[2] not in ("exp_avg", "exp_avg_sq", "step")],
    }


def whole() -> Rows:
    """Weights, gradients, master copies and moments of a small model against the texts' bytes a parameter."""
    found: Rows = {}
    for name, mixed in (("mixed precision", True), ("float32", False)):
        a = Assumptions(SMALL.parameters, **({} if mixed else sums.FP32))
        real = trained(mixed)
        lines = {line.what: line.bytes for line in sums.training(a)}
        for what in lines | {name: held for name, held in real.items() if held}:
            found[f"whole: {name}, {what}"] = against(lines.get(what, 0), size(real.get(what, [])))
        found[f"held: {name}"] = against(sum(lines.values()), size([t for held in real.values() for t in held]))
    return found


def adapted(decoder: Decoder, rank: int, four_bits: bool) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A small model in bfloat16 with LoRAs over its blocks' linear layers: the model, and what is trained."""
    model = llama(decoder, torch.bfloat16).requires_grad_(False)
    sites = []
    for path, role, module in linears(model):
        if four_bits:
            module.weight = nn.Parameter(Weight4(encode(module.weight.detach(), Scheme())), requires_grad=False)
        layer = int(path.split(".")[2])
        shape = tuple(module.weight.shape)
        sites.append(Site(path, Component.LANGUAGE, role, layer, Kind.WEIGHT, shape, f"{path}.weight"))
    attach(model, sites, [Part("lora", "language.*", LoRAConfig(rank, 8.0))])
    made = {
        f"{site.path}.{name}": p
        for site, patch in patches(model, "default").items()
        for name, p in patch.requires_grad_(True).named_parameters()
    }
    model.enable_input_require_grads()  # type: ignore[operator]
    return model, made


def saved(model: nn.Module) -> int:
    """Bytes that autograd keeps from a forward pass to its loss, but for the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        # a loss's own few bytes (how many labels there are) are of no token
        if place not in own and tensor.numel() > 1:
            held[place] = tensor
        return tensor

    ids = torch.randint(0, SMALL.vocabulary, (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    return size(list(held.values()))


def activations() -> Rows:
    """What autograd keeps against the formula."""
    found: Rows = {}
    ways = {
        "LoRA, bfloat16": (adapted(SMALL, 8, False)[0], 2, False),
        "whole, bfloat16": (llama(SMALL, torch.bfloat16), 2, True),
        "whole, float32": (llama(SMALL, torch.float32), 4, True),
    }
    for name, (model, width, full) in ways.items():
        blocks = inside(SMALL, BATCH, LENGTH, width, full=full, checkpointing=False)
        found[f"kept: {name}"] = against(blocks + top(SMALL, BATCH * LENGTH, width, full), saved(model))
    return found


def four_bits() -> Rows:
    """Codes and constants of a small model's linear layers from Tarsia's own tensors."""
    found: Rows = {}
    weights = [module.weight.detach() for _, _, module in linears(llama(SMALL, torch.bfloat16))]
    for name, nested in (("constants in float32", False), ("constants nested", True)):
        held = [t for weight in weights for t in encode(weight, Scheme(nested=nested)).tensors.values()]
        found[f"4 bits: {name}"] = against(sum(quantised(SMALL, nested)), size(held))
    return found


def stepped(name: str, checkpointing: bool, accumulation: int) -> Rows:
    """The highest moment of a real QLoRA's second step on the CPU, against the sum."""
    model, named = adapted(STEPPED, RANK, True)
    optimiser = adamw([named], [1e-4], (0.9, 0.999), 0.0)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    ids = torch.randint(0, STEPPED.vocabulary, (BATCH, LENGTH))

    def step() -> None:
        for _ in range(accumulation):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    step()
    packed = [t for _, _, m in linears(model) if isinstance(m.weight, Weight4) for t in m.weight.value.tensors.values()]
    dense = [p for p in model.parameters() if not isinstance(p, Weight4)]
    standing = size([*packed, *dense, *state(optimiser).values()])
    with live() as watched:
        step()
    a = Assumptions(
        STEPPED.parameters,
        Geometry(STEPPED, "small"),
        rank=RANK,
        patches="float32",
        batch=BATCH,
        length=LENGTH,
        checkpointing=checkpointing,
        accumulation=accumulation,
        unpacked=False,
    )
    total = sum(line.bytes for line in sums.qlora(a))
    row = against(total, standing + watched.peak)
    return {f"step: {name}": {**row, "apart, %": 100 * (standing + watched.peak - total) / total}}


def moments() -> Rows:
    """What torch's AdamW keeps of a parameter in bfloat16."""
    parameter = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimiser = adamw([{"p": parameter}], [1e-3], (0.9, 0.999), 0.0)
    parameter.square().sum().backward()
    optimiser.step()
    return {"adamw: a moment of a bfloat16 parameter": {"bytes": state(optimiser)["p/exp_avg"].element_size()}}


def on_disk(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def ten(desk: Desk) -> Rows:
    """Ten checkpoints and ten adapters of mini-1, as files."""
    host = open_base("mini-1")
    parts = [Part("lora", "language.*.{q,k,v,o,gate,up,down}", LoRAConfig(16, 16.0))]
    numbers = sum(p.numel() for p in {id(p): p for p in host.model.parameters()}.values())
    config = host.model.config.get_text_config()  # type: ignore[union-attr, operator]
    decoder = Decoder(*(getattr(config, name) for name in fields(SMALL)))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for job in range(JOBS):
            desk.show(0.8 + 0.02 * job, f"job {job + 1} of {JOBS} on disk")
            attach(host.model, host.sites, parts)
            save(Adapter.of(host, "default", parts), place / "adapters" / str(job))
            detach(host.model, "default")
            host.model.save_pretrained(place / "checkpoints" / str(job))  # type: ignore[operator]
        each = {kind: on_disk(place / kind) for kind in ("checkpoints", "adapters")}
    formula = {"checkpoints": JOBS * 4 * numbers, "adapters": JOBS * 4 * lora(decoder, 16)}
    return {
        f"disk: {JOBS} {kind}": {
            **against(formula[kind], held),
            "more than numbers, %": 100 * (held / formula[kind] - 1),
        }
        for kind, held in each.items()
    }
