"""Faults of using an adapter: answers, merging and routing that are not what they seem."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from evaluate import tiny
from museum import worlds
from museum.fault import Harmless, Reported, Told
from museum.fault import fault as planted_at

from tarsia.adapter import Adapter, Host, probe, prove, put
from tarsia.cli.adapted import warn_without_effect
from tarsia.core.attach import Part, activate, attach, merge, patches, routed, unmerge
from tarsia.core.errors import AdapterError, AttachError
from tarsia.evaluate import evaluate, generate
from tarsia.methods.lora import LoRAConfig

fault = partial(planted_at, stage="use")


def trained(base: Host, select: str = "language.*.{q,v}", name: str = "mine", seed: int = 1, **options: Any) -> None:
    """Attach an adapter that moves the outputs, as after a training."""
    attach(base.model, base.sites, [Part("lora", select, LoRAConfig(**options))], name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for patch in patches(base.model, name).values():
            for parameter in patch.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@fault("dropout acts on a model that was set to evaluation", "huggingface/peft#3753", "huggingface/transformers#34469",
       verdict=Harmless, says="an adapter takes the mode of the module that it is put in")  # fmt: skip
def dropout_in_evaluation(folder: Path, planted: bool) -> Told:
    base = worlds.host()
    trained(base, dropout=0.5 if planted else 0.0)
    return (str(worlds.logits(base.model).sum().item()), str(worlds.logits(base.model).sum().item()))


@dropout_in_evaluation.peer
def _(folder: Path) -> str:
    base = worlds.model().eval()
    made = peft.get_peft_model(base, peft.LoraConfig(target_modules=worlds.TARGETS, lora_dropout=0.5))
    mode = made.training
    worlds.noisy(made).train(mode)
    same = torch.equal(worlds.logits(made), worlds.logits(made))
    return f"two passes over one batch give {'the same' if same else 'different'} outputs"


@fault("answers that depend on the side of the padding", "huggingface/transformers#26569",
       "huggingface/transformers#22707", verdict=Harmless,
       says="a batch is answered as its rows are alone, whatever the tokenizer's padding side")  # fmt: skip
def padding_side(folder: Path, planted: bool) -> Told:
    base, rows = tiny.host(), tiny.rows(3, (1,))
    base.processor.tokenizer.padding_side = "right" if planted else "left"
    return generate(base, rows, 6, batch=3 if planted else 1)


@padding_side.peer
def _(folder: Path) -> str:
    base = worlds.model()
    rows = [[1, 9, 20, 33, 47, 61, 70], [1, 9]]
    ids = torch.tensor([rows[0], rows[1] + [0] * 5])
    mask = (ids != 0).long()
    told = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    batch = base.generate(input_ids=ids, attention_mask=mask, **told)[1, 7:]
    alone = base.generate(input_ids=torch.tensor([rows[1]]), **told)[0, 2:]
    return f"the shorter row is answered {'as' if torch.equal(batch, alone) else 'otherwise than'} alone"


@fault("answers that were cut off and are counted as wrong", "UKGovernmentBEIS/inspect_ai#3582",
       "allenai/olmo-eval#399", verdict=Reported, says="cut at 3: 3")  # fmt: skip
def cut_answers(folder: Path, planted: bool) -> Told:
    base = tiny.host()
    if not planted:  # a model that ends every answer at once
        with torch.no_grad():
            base.model.lm_head.weight.zero_()
        base.model.generation_config.eos_token_id = 0
    report = evaluate(base, {"tests": tiny.rows(3, (0,))}, max_new_tokens=3)
    return [f"{column.header}: {next(iter(column.cells))}" for column in report.table().columns]


@cut_answers.peer
def _(folder: Path) -> str:
    ids = torch.tensor([[1, 9, 20, 33]])
    said = worlds.model().generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    return f"{said.shape[1] - 4} tokens come back, with nothing to say that the answer had not ended"


@fault("an adapter that these questions never reach", "vllm-project/vllm#34186", "sgl-project/sglang#28784",
       verdict=Reported, says="changes nothing here")  # fmt: skip
def without_effect(folder: Path, planted: bool) -> Told:
    """It patches the vision tower, and no question has a picture."""
    base = tiny.host()
    trained(base, "vision.*.{q,v}")
    heard = io.StringIO()
    with redirect_stderr(heard):
        warn_without_effect(base, tiny.rows(2, (0,) if planted else (1,)))
    return heard.getvalue().splitlines()


@without_effect.peer
def _(folder: Path) -> str:
    text = worlds.inputs("llava", (0, 0))
    config = peft.LoraConfig(target_modules=r".*vision_tower.*(q_proj|v_proj)")
    made = worlds.noisy(peft.get_peft_model(worlds.model(), config))
    base = worlds.logits(worlds.model(), text)
    return worlds.same(worlds.logits(made, text), base, "the base's").replace("the base's", "those of the base")


@fault("outputs are not those of the day when the adapter was saved", "vllm-project/vllm#10798",
       "huggingface/peft#1388", verdict=AdapterError, says="not those of the day")  # fmt: skip
def other_outputs(folder: Path, planted: bool) -> Told:
    """The weights are the same, and something in the code that runs them is not."""
    first = worlds.host()
    trained(first)
    part = Part("lora", "language.*.{q,v}", LoRAConfig())
    adapter = Adapter.of(first, "mine", [part], probe=probe(first, worlds.inputs()))
    base = worlds.host()
    if planted:
        changed(base.model)
    put(base, adapter, "mine")
    prove(base, "mine", adapter.probe)
    return ()


def changed(base: Any) -> None:
    """A norm that is computed a little otherwise, as between two versions of a library."""
    base.get_submodule("model.language_model.norm").register_forward_hook(lambda module, inputs, out: out * 1.01)


@other_outputs.peer
def _(folder: Path) -> str:
    adapter, wanted = worlds.written(folder)
    base = worlds.model()
    changed(base)
    return worlds.same(worlds.logits(worlds.there(adapter, base)), wanted, "those of the day")


@fault("a base that unmerging does not give back", "huggingface/peft#3650", "huggingface/peft#1388",
       verdict=Harmless, says="unmerging gives back every bit")  # fmt: skip
def unmerged(folder: Path, planted: bool) -> Told:
    base = worlds.host()
    before = base.model.get_parameter("model.language_model.layers.0.self_attn.q_proj.weight").clone()
    trained(base)
    if planted:
        merge(base.model)
        now = base.model.get_parameter("model.language_model.layers.0.self_attn.q_proj.weight")
        assert not torch.equal(now, before), "the plant does nothing"
        unmerge(base.model)
    now = base.model.get_parameter("model.language_model.layers.0.self_attn.q_proj.weight")
    return (f"{int((now != before).sum())} numbers differ",)


@unmerged.peer
def _(folder: Path) -> str:
    made = worlds.adapted()
    layer = made.base_model.model.model.language_model.layers[0].self_attn.q_proj.base_layer
    before = layer.weight.clone()
    made.merge_adapter()
    made.unmerge_adapter()
    return f"{'some' if bool((layer.weight != before).any()) else 'no'} numbers of the base differ afterwards"


@fault("another adapter is put in while one is merged", "huggingface/peft#3756", "huggingface/peft#3763",
       verdict=AttachError, says="merged into the weights")  # fmt: skip
def attached_while_merged(folder: Path, planted: bool) -> Told:
    base = worlds.host()
    trained(base)
    if planted:
        merge(base.model)
    trained(base, name="second", seed=2)
    activate(base.model, "second")
    return ()


@attached_while_merged.peer
def _(folder: Path) -> str:
    made = worlds.adapted()
    alone = worlds.adapted(seed=2)
    made.merge_adapter()
    made.add_adapter("second", peft.LoraConfig(target_modules=worlds.TARGETS))
    made.set_adapter("second")
    state = {k.replace(".default.", ".second."): v for k, v in alone.state_dict().items() if "lora_" in k}
    made.load_state_dict(state, strict=False)
    return worlds.same(worlds.logits(made.eval()), worlds.logits(alone), "those of the second adapter")


IDEFICS = r".*vision_model.*(q_proj|v_proj)"


@fault("rows of one batch with adapters of their own, and pictures in unequal number", "huggingface/peft#1967",
       "huggingface/peft#1990", verdict=Harmless, says="each row has its own adapter's outputs")  # fmt: skip
def misrouted_rows(folder: Path, planted: bool) -> Told:
    """Three rows with none, one and two pictures give Idefics3's tower three entries, by accident as many."""
    base = worlds.host("idefics3")
    batch = worlds.inputs("idefics3", (0, 1, 2))
    trained(base, "vision.*.{q,v}", "a", 1)
    trained(base, "vision.*.{q,v}", "b", 2)
    names = [None, "a", "b"]
    if planted:
        with routed(base.model, names, base.anatomy.segments(batch)):
            found = worlds.logits(base.model, batch)
    else:
        alone = []
        for row, name in enumerate(names):
            activate(base.model, *([name] if name else []))
            alone.append(worlds.logits(base.model, batch)[row])
        found = torch.stack(alone)
    return [f"{value:.3f}" for value in (found * batch["attention_mask"][..., None]).sum((1, 2)).tolist()]


@misrouted_rows.peer
def _(folder: Path) -> str:
    batch = worlds.inputs("idefics3", (0, 1, 2))
    made = peft.get_peft_model(worlds.model("idefics3"), peft.LoraConfig(target_modules=IDEFICS), adapter_name="first")
    made.add_adapter("second", peft.LoraConfig(target_modules=IDEFICS))
    worlds.noisy(made)
    alone = []
    for row, name in enumerate([None, "first", "second"]):
        if name is None:
            with made.disable_adapter():
                alone.append(worlds.logits(made, batch)[row])
        else:
            made.set_adapter(name)
            alone.append(worlds.logits(made, batch)[row])
    with torch.no_grad():
        mixed = made(**batch, adapter_names=["__base__", "first", "second"]).logits
    seen = batch["attention_mask"].bool()
    off = [float((mixed[row] - alone[row])[seen[row]].abs().max()) > 1e-3 for row in range(3)]
    return f"{sum(off)} of 3 rows do not have their own adapter's outputs"


def halved(folder: Path) -> Path:
    """An adapter of PEFT's whose factors were saved in half precision."""
    adapter, _ = worlds.written(folder)
    worlds.retensor(adapter / worlds.TENSORS, lambda held: {key: value.bfloat16() for key, value in held.items()})
    return adapter


@fault("an adapter in half precision that rounds the base when it is merged", "huggingface/peft#1388",
       "huggingface/peft#2502", verdict=Harmless, says="merged in the wider precision, outputs stay")  # fmt: skip
def rounded_base(folder: Path, planted: bool) -> Told:
    base = worlds.here(halved(folder))
    if planted:
        merge(base.model)
    return [f"{value:.3f}" for value in worlds.logits(base.model).abs().sum((1, 2)).tolist()]


@rounded_base.peer
def _(folder: Path) -> str:
    made = worlds.there(halved(folder))
    before = worlds.logits(made)
    made.merge_adapter()
    return f"merged, {worlds.same(worlds.logits(made), before, 'what they were')}"


@fault("one of two adapters that act is merged, and the other no longer acts", "huggingface/peft#3763",
       "huggingface/peft#3756", verdict=Harmless, says="all that act are merged, outputs stay")  # fmt: skip
def partly_merged(folder: Path, planted: bool) -> Told:
    base = worlds.host()
    trained(base, name="first", seed=1)
    trained(base, name="second", seed=2)
    activate(base.model, "first", "second")
    if planted:
        merge(base.model)
    return [f"{value:.2f}" for value in worlds.logits(base.model).abs().sum((1, 2)).tolist()]


@partly_merged.peer
def _(folder: Path) -> str:
    made = peft.get_peft_model(worlds.model(), peft.LoraConfig(target_modules=worlds.TARGETS), adapter_name="first")
    made.add_adapter("second", peft.LoraConfig(target_modules=worlds.TARGETS))
    worlds.noisy(made)
    made.base_model.set_adapter(["first", "second"])
    before = worlds.logits(made)
    made.merge_adapter(adapter_names=["first"])
    return worlds.same(worlds.logits(made), before, "what they were")


@fault("answers are drawn by lot because the model's makers liked it", "huggingface/lighteval#559",
       "huggingface/transformers#21220", verdict=Harmless, says="the likeliest answer is given")  # fmt: skip
def sampled_answers(folder: Path, planted: bool) -> Told:
    base = tiny.host()
    if planted:
        base.model.generation_config.update(do_sample=True, temperature=5.0)
    torch.manual_seed(int(planted))
    return generate(base, tiny.rows(2, (0,)), 6)


@sampled_answers.peer
def _(folder: Path) -> str:
    base = worlds.model()
    base.generation_config.update(do_sample=True, temperature=5.0)
    said = []
    for seed in range(2):
        torch.manual_seed(seed)
        said.append(base.generate(input_ids=torch.tensor([[1, 9, 20, 33]]), max_new_tokens=6, pad_token_id=0))
    return f"asked twice, it answers {'the same' if torch.equal(*said) else 'two things'}"
