"""Faults of adapter files: one that loads, reports success and is not what was trained."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from data.processors import made
from museum import worlds
from museum.fault import Harmless, Told
from museum.fault import fault as planted_at
from museum.worlds import CONFIG, TENSORS
from train import small

from tarsia.adapter import Adapter, Host, load, open_base, put, save
from tarsia.core.attach import Part, attach, patches
from tarsia.core.errors import AdapterError, BaseMismatch
from tarsia.methods.lora import LoRAConfig

fault = partial(planted_at, stage="adapter")
HELD, OLD = "model.language_model.layers.", "language_model.layers."


def theirs(folder: Path) -> tuple[Path, torch.Tensor]:
    """An adapter of PEFT's, and what it computed when it was saved."""
    return worlds.written(folder)


def verdict(folder: Path, wanted: torch.Tensor) -> str:
    """What PEFT makes of a folder that was damaged."""
    got = worlds.logits(worlds.there(folder))
    if torch.equal(got, worlds.logits(worlds.model())):
        return "the outputs are the base's"
    return worlds.same(got, wanted, "those of the adapter that was saved")


@fault("an adapter whose keys are of an older model class", "huggingface/peft#2566", "illuin-tech/colpali#424",
       "vllm-project/vllm#41702", verdict=Harmless, says="it is read, outputs are as when saved")  # fmt: skip
def old_keys(folder: Path, planted: bool) -> Told:
    adapter, wanted = theirs(folder)
    if planted:
        worlds.retensor(adapter / TENSORS, lambda held: {k.replace(HELD, OLD): v for k, v in held.items()})
        worlds.edit(adapter / CONFIG, lambda fields: fields.update(target_modules=r".*language_model.*(q_proj|v_proj)"))
    got = worlds.logits(worlds.here(adapter).model)
    return (worlds.same(got, wanted, "those of the adapter that was saved"),)


@old_keys.peer
def _(folder: Path) -> str:
    adapter, wanted = theirs(folder)
    worlds.retensor(adapter / TENSORS, lambda held: {k.replace(HELD, OLD): v for k, v in held.items()})
    return verdict(adapter, wanted)


@fault("an adapter whose keys are of no model", "vllm-project/vllm#34186", "vllm-project/vllm#48019",
       "huggingface/peft#2699", verdict=AdapterError, says="does not have")  # fmt: skip
def foreign_keys(folder: Path, planted: bool) -> Told:
    adapter, _ = theirs(folder)
    if planted:
        worlds.retensor(adapter / TENSORS, lambda held: {k.replace("layers.", "blocks."): v for k, v in held.items()})
    worlds.here(adapter)
    return ()


@foreign_keys.peer
def _(folder: Path) -> str:
    adapter, wanted = theirs(folder)
    worlds.retensor(adapter / TENSORS, lambda held: {k.replace("layers.", "blocks."): v for k, v in held.items()})
    return verdict(adapter, wanted)


@fault("an adapter of another base with the same shapes", "predibase/lorax#58", "vllm-project/vllm#12106",
       verdict=BaseMismatch, says="not the same weights")  # fmt: skip
def other_base(folder: Path, planted: bool) -> Told:
    worlds.here(worlds.ours(folder), worlds.host(seed=1 if planted else 0))
    return ()


@other_base.peer
def _(folder: Path) -> str:
    adapter, _ = theirs(folder)
    base = worlds.model(seed=1)
    before = worlds.logits(base)
    moved = not torch.equal(worlds.logits(worlds.there(adapter, base)), before)
    return f"the adapter {'acts' if moved else 'does nothing'} on the other base"


@fault("a PEFT adapter of a base of another name", "predibase/lorax#58", "vllm-project/vllm#12106",
       verdict=BaseMismatch, says="another name")  # fmt: skip
def other_name(folder: Path, planted: bool) -> Told:
    adapter, _ = theirs(folder)
    name = "lab/another-7b" if planted else "lab/base"
    worlds.edit(adapter / CONFIG, lambda fields: fields.update(base_model_name_or_path=name))
    worlds.model().save_pretrained(folder / "base")
    base = open_base(str(folder / "base"), processor=False)
    put(base, load(adapter, base), "theirs")
    return ()


@other_name.peer
def _(folder: Path) -> str:
    adapter, wanted = theirs(folder)
    worlds.edit(adapter / CONFIG, lambda fields: fields.update(base_model_name_or_path="lab/another-7b"))
    return verdict(adapter, wanted)


def quantised(kind: str | None) -> Any:
    """A model that says it was quantised, as a checkpoint's configuration does."""
    base = worlds.model()
    if kind is not None:
        base.config.quantization_config = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": kind}
    return base


@fault("an adapter that was trained on a base of another quantisation", "huggingface/peft#2321",
       "huggingface/peft#2105", verdict=BaseMismatch, says="quantisation")  # fmt: skip
def other_quantisation(folder: Path, planted: bool) -> Told:
    adapter = worlds.ours(folder, Host.of(quantised("nf4")))
    worlds.here(adapter, Host.of(quantised("fp4" if planted else "nf4")))
    return ()


@other_quantisation.peer
def _(folder: Path) -> str:
    adapter, wanted = theirs(folder)
    got = worlds.logits(worlds.there(adapter, quantised("fp4")))
    return worlds.same(got, wanted, "those on the other base")


@fault("an adapter that was trained with another chat template", "hiyouga/LlamaFactory#5489",
       "mkupermann/souprise#17", verdict=BaseMismatch, says="template")  # fmt: skip
def other_template(folder: Path, planted: bool) -> Told:
    adapter = worlds.ours(folder, Host.of(worlds.model(), processor=made("llava", "chatml")))
    spoken = made("llava", "llama 3" if planted else "chatml")
    worlds.here(adapter, Host.of(worlds.model(), processor=spoken))
    return ()


@other_template.peer
def _(folder: Path) -> str:
    adapter, wanted = theirs(folder)
    known = [name for name in json.loads((adapter / CONFIG).read_text()) if "template" in name]
    return f"{verdict(adapter, wanted)}; its configuration has {len(known)} fields for a template"


@fault("an adapter file with tensors missing", "huggingface/peft#2699", "huggingface/peft#2118",
       verdict=AdapterError, says="have no tensor")  # fmt: skip
def missing_tensors(folder: Path, planted: bool) -> Told:
    adapter, _ = theirs(folder)
    if planted:
        worlds.retensor(adapter / TENSORS, lambda held: {k: v for k, v in held.items() if ".layers.1." not in k})
    worlds.here(adapter)
    return ()


@missing_tensors.peer
def _(folder: Path) -> str:
    adapter, wanted = theirs(folder)
    worlds.retensor(adapter / TENSORS, lambda held: {k: v for k, v in held.items() if ".layers.1." not in k})
    return verdict(adapter, wanted)


@fault("an adapter file that was saved empty", "ymcui/Chinese-LLaMA-Alpaca#711", verdict=AdapterError, says="no tensor")
def no_tensors(folder: Path, planted: bool) -> Told:
    adapter, _ = theirs(folder)
    if planted:
        worlds.retensor(adapter / TENSORS, lambda held: {})
    worlds.here(adapter)
    return ()


@no_tensors.peer
def _(folder: Path) -> str:
    adapter, wanted = theirs(folder)
    worlds.retensor(adapter / TENSORS, lambda held: {})
    return verdict(adapter, wanted)


@fault("tensors that the configuration does not speak of", "huggingface/peft#1323", "hiyouga/LlamaFactory#10294",
       verdict=AdapterError, says="does not speak of")  # fmt: skip
def left_over(folder: Path, planted: bool) -> Told:
    adapter, _ = theirs(folder)
    if planted:
        narrowed = worlds.TARGETS.replace("q_proj|v_proj", "q_proj")
        worlds.edit(adapter / CONFIG, lambda fields: fields.update(target_modules=narrowed))
    worlds.here(adapter)
    return ()


@left_over.peer
def _(folder: Path) -> str:
    adapter, wanted = theirs(folder)
    narrowed = worlds.TARGETS.replace("q_proj|v_proj", "q_proj")
    worlds.edit(adapter / CONFIG, lambda fields: fields.update(target_modules=narrowed))
    return verdict(adapter, wanted)


@fault("no alpha in the configuration, so that a default decides", "huggingface/lerobot#3551",
       "ml-explore/mlx-examples#622", verdict=AdapterError, says="lora_alpha")  # fmt: skip
def no_alpha(folder: Path, planted: bool) -> Told:
    adapter, _ = worlds.written(folder, lora_alpha=32)
    if planted:
        worlds.edit(adapter / CONFIG, lambda fields: fields.pop("lora_alpha"))
    worlds.here(adapter)
    return ()


@no_alpha.peer
def _(folder: Path) -> str:
    adapter, wanted = worlds.written(folder, lora_alpha=32)
    worlds.edit(adapter / CONFIG, lambda fields: fields.pop("lora_alpha"))
    return verdict(adapter, wanted)


@fault("a scale that another program reads otherwise", "sgl-project/sglang#40835", "vllm-project/vllm#10798",
       verdict=AdapterError, says="do not agree on the scale")  # fmt: skip
def other_scale(folder: Path, planted: bool) -> Told:
    adapter = worlds.ours(folder)
    if planted:
        worlds.edit(adapter / CONFIG, lambda fields: fields.update(use_rslora=True))
    worlds.here(adapter)
    return ()


@other_scale.peer
def _(folder: Path) -> str:
    adapter, wanted = theirs(folder)
    worlds.edit(adapter / CONFIG, lambda fields: fields.update(use_rslora=True))
    return verdict(adapter, wanted)


@fault("a variant that the reader does not know", "huggingface/peft#2340", "hiyouga/LlamaFactory#2696",
       verdict=AdapterError, says="use_quora")  # fmt: skip
def unknown_variant(folder: Path, planted: bool) -> Told:
    adapter, _ = theirs(folder)
    worlds.edit(adapter / CONFIG, lambda fields: fields.update(use_quora=planted))
    worlds.here(adapter)
    return ()


@unknown_variant.peer
def _(folder: Path) -> str:
    adapter, wanted = theirs(folder)
    worlds.edit(adapter / CONFIG, lambda fields: fields.update(use_quora=True))
    return "loads as if the field were not there; " + verdict(adapter, wanted)


@fault("DoRA whose flag was lost on the way", "vllm-project/vllm#10798", "huggingface/peft#2340",
       verdict=AdapterError, says="DoRA")  # fmt: skip
def lost_dora(folder: Path, planted: bool) -> Told:
    adapter, _ = worlds.written(folder, use_dora=planted)
    worlds.edit(adapter / CONFIG, lambda fields: fields.update(use_dora=False))
    worlds.here(adapter)
    return ()


@lost_dora.peer
def _(folder: Path) -> str:
    adapter, wanted = worlds.written(folder, use_dora=True)
    worlds.edit(adapter / CONFIG, lambda fields: fields.update(use_dora=False))
    return verdict(adapter, wanted)


@fault("an adapter that is all zeros", "tloen/alpaca-lora#357", "vllm-project/vllm#34186",
       verdict=AdapterError, says="changes nothing")  # fmt: skip
def all_zeros(folder: Path, planted: bool) -> Told:
    adapter, _ = theirs(folder)
    if planted:
        worlds.retensor(adapter / TENSORS, lambda held: {k: v * 0 if "lora_B" in k else v for k, v in held.items()})
    worlds.here(adapter)
    return ()


@all_zeros.peer
def _(folder: Path) -> str:
    adapter, wanted = theirs(folder)
    worlds.retensor(adapter / TENSORS, lambda held: {k: v * 0 if "lora_B" in k else v for k, v in held.items()})
    return verdict(adapter, wanted)


@fault("one byte of the file has changed", "sgl-project/sglang#14022", "hiyouga/LlamaFactory#1910",
       verdict=AdapterError, says="not the file that was saved")  # fmt: skip
def changed_byte(folder: Path, planted: bool) -> Told:
    adapter = worlds.ours(folder)
    if planted:
        flip(adapter)
    worlds.here(adapter)
    return ()


def flip(adapter: Path) -> None:
    """Set a bit of the last number's exponent, as a disk does that fails."""
    content = bytearray((adapter / TENSORS).read_bytes())
    content[-1] ^= 0x40
    (adapter / TENSORS).write_bytes(content)


@changed_byte.peer
def _(folder: Path) -> str:
    adapter, wanted = theirs(folder)
    flip(adapter)
    return verdict(adapter, wanted)


@fault("the file is cut short", "huggingface/peft#1599", "sgl-project/sglang#14022",
       verdict=AdapterError, says="truncated")  # fmt: skip
def cut_short(folder: Path, planted: bool) -> Told:
    adapter, _ = theirs(folder)
    if planted:
        (adapter / TENSORS).write_bytes((adapter / TENSORS).read_bytes()[:-100])
    worlds.here(adapter)
    return ()


@cut_short.peer
def _(folder: Path) -> str:
    adapter, wanted = theirs(folder)
    (adapter / TENSORS).write_bytes((adapter / TENSORS).read_bytes()[:-100])
    return verdict(adapter, wanted)


@fault("an adapter that is not a number", "getainode/ainode#186", "openvla/openvla#53",
       verdict=AdapterError, says="no numbers")  # fmt: skip
def not_a_number(folder: Path, planted: bool) -> Told:
    adapter, _ = theirs(folder)
    if planted:
        worlds.retensor(adapter / TENSORS, lambda held: {k: v * torch.nan for k, v in held.items()})
    worlds.here(adapter)
    return ()


@not_a_number.peer
def _(folder: Path) -> str:
    adapter, _ = theirs(folder)
    worlds.retensor(adapter / TENSORS, lambda held: {k: v * torch.nan for k, v in held.items()})
    return f"{'no' if worlds.logits(worlds.there(adapter)).isnan().all() else 'some'} output is a number"


class Program:
    """What a pickle can hold: a call that is made while it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickled(adapter: Path, trap: Path) -> None:
    (adapter / TENSORS).unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Program(trap)))


@fault("an adapter that is a pickle", "huggingface/lerobot#3047", "huggingface/peft#2027",
       verdict=AdapterError, says="never read")  # fmt: skip
def a_pickle(folder: Path, planted: bool) -> Told:
    adapter, _ = theirs(folder)
    if planted:
        pickled(adapter, folder / "trap")
    try:
        worlds.here(adapter)
    finally:
        assert not (folder / "trap").exists(), "the pickle's program ran"
    return ()


@a_pickle.peer
def _(folder: Path) -> str:
    adapter, wanted = theirs(folder)
    pickled(adapter, folder / "trap")
    return verdict(adapter, wanted)


@fault("a head that is the embedding too", "huggingface/peft#2018", "huggingface/transformers#45127",
       verdict=AdapterError, says="takes no LoRA here")  # fmt: skip
def tied_head(folder: Path, planted: bool) -> Told:
    """PEFT's update of a head whose tensor the embedding uses too."""
    tied = {"tie_word_embeddings": planted}
    adapter, _ = worlds.written(folder, options=tied, **({"target_modules": ["lm_head"]} if planted else {}))
    worlds.here(adapter, worlds.host(**tied))
    return ()


@tied_head.peer
def _(folder: Path) -> str:
    live = worlds.adapted(options={"tie_word_embeddings": True}, target_modules=["lm_head"])
    before = worlds.logits(live)
    return f"merged, the {worlds.same(worlds.logits(live.merge_and_unload()), before, 'what they were')}"


@fault("a save that is cut off half-way", "Lightning-AI/pytorch-lightning#688",
       "huggingface/peft#1599", verdict=AdapterError, says="can not be written")  # fmt: skip
def half_saved(folder: Path, planted: bool) -> Told:
    """The disk fills while an adapter is replaced: the old one must still be there, whole."""
    first = worlds.ours(folder)
    base = worlds.host()
    part = Part("lora", "language.*.{q,v}", LoRAConfig())
    attach(base.model, base.sites, [part], name="next")
    second = Adapter.of(base, "next", [part])
    assert patches(base.model, "next")
    try:
        if planted:
            with full_disk():
                save(second, first)
        else:
            save(second, first)
    finally:
        held = load(first)
        assert (held.patches.keys(), len(list(first.iterdir()))) == (second.patches.keys(), 3), (
            "no whole adapter is left"
        )
    return ()


def full_disk() -> Any:
    """Writing a tensor fails, as on a full disk, after the file was begun."""
    from unittest import mock

    import safetensors.torch

    def begun(tensors: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"\0" * 16)
        raise OSError(28, "No space left on device")

    return mock.patch.object(safetensors.torch, "save_file", begun)


@half_saved.peer
def _(folder: Path) -> str:
    from unittest import mock

    import peft.peft_model

    adapter, wanted = theirs(folder)

    def begun(tensors: object, path: str, **_: object) -> None:
        Path(path).write_bytes(b"\0" * 16)
        raise OSError(28, "No space left on device")

    with mock.patch.object(peft.peft_model, "safe_save_file", begun), suppress(OSError):
        worlds.adapted(seed=2).save_pretrained(adapter)
    try:
        return verdict(adapter, wanted)
    except Exception as error:  # noqa: BLE001 (what the damaged folder raises is the observation)
        return f"the save raises; the adapter that was there before can not be loaded any more ({type(error).__name__})"


def saved_base(folder: Path) -> Path:
    """A checkpoint folder of the base, with its processor."""
    return small.base(folder / "base")


def without_projector(base: Path) -> Path:
    worlds.retensor(base / "model.safetensors", lambda held: {k: v for k, v in held.items() if "projector" not in k})
    return base


@fault("a base of which some weights are missing", "haotian-liu/LLaVA#1679", verdict=AdapterError, says="not whole")
def base_not_whole(folder: Path, planted: bool) -> Told:
    base = saved_base(folder)
    open_base(str(without_projector(base) if planted else base))
    return ()


@base_not_whole.peer
def _(folder: Path) -> str:
    from transformers import AutoModelForImageTextToText

    base = without_projector(saved_base(folder))
    first, second = (AutoModelForImageTextToText.from_pretrained(base).eval() for _ in range(2))
    names = [name for name, value in first.named_parameters() if not torch.equal(value, second.get_parameter(name))]
    return f"loads, and {len(names)} tensors are other random numbers each time"


def without_pictures(base: Path) -> Path:
    """Only the tokenizer's files are left, as where a merge copies no more."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        (base / name).unlink(missing_ok=True)
    return base


@fault("a base whose picture processor was not copied with it", "EvolvingLMMs-Lab/lmms-engine#156",
       "modelscope/ms-swift#9187", verdict=AdapterError, says="processor")  # fmt: skip
def no_picture_processor(folder: Path, planted: bool) -> Told:
    base = saved_base(folder)
    open_base(str(without_pictures(base) if planted else base))
    return ()


@no_picture_processor.peer
def _(folder: Path) -> str:
    from transformers import AutoProcessor

    found = AutoProcessor.from_pretrained(without_pictures(saved_base(folder)))
    return f"gives a {type(found).__name__}, which takes no pictures"


def enlarged() -> Any:
    """A model whose vocabulary has grown by two words, as where tokens were added for training."""
    base = worlds.model()
    base.resize_token_embeddings(98, mean_resizing=False)
    return base


def grown(folder: Path) -> Path:
    """PEFT's adapter of an enlarged model."""
    made_of = peft.get_peft_model(enlarged(), peft.LoraConfig(target_modules=worlds.TARGETS))
    worlds.noisy(made_of).save_pretrained(folder / "grown", save_embedding_layers=True)
    return folder / "grown"


@fault("a vocabulary that was enlarged for training", "huggingface/transformers#45127", "hiyouga/LlamaFactory#7665",
       verdict=AdapterError, says="vocabulary that was enlarged")  # fmt: skip
def enlarged_vocabulary(folder: Path, planted: bool) -> Told:
    worlds.here(grown(folder) if planted else theirs(folder)[0])
    return ()


@enlarged_vocabulary.peer
def _(folder: Path) -> str:
    worlds.there(grown(folder))
    return "loads"
