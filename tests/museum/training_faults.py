"""Faults of training and resuming: a run that ends well and is not the run that was asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import transformers
from data.processors import TEMPLATES
from museum import worlds
from museum.fault import Harmless, Reported, Told
from museum.fault import fault as planted_at
from train import small

from tarsia.adapter import FourBits, open_base
from tarsia.adapter.proof import Unmoved
from tarsia.core.attach import slots
from tarsia.core.errors import ConfigError, SelectionError, TrainingError
from tarsia.core.site import Component
from tarsia.train.events import Event, Notice, Step
from tarsia.train.loop import fit
from tarsia.train.recipe import Recipe
from tarsia.train.run import Run

fault = partial(planted_at, stage="training")
LANGUAGE = [{"method": "lora", "select": "language.*.{q,v}", "lr": 1e-2, "rank": 2, "dropout": 0.1}]
SEEING = [{"method": "lora", "select": "vision.*.{q,v}", "lr": 1e-2, "rank": 2}]


SHARED = TemporaryDirectory()


@cache
def world() -> dict[str, Any]:
    """A base and two sources, built once."""
    return small.world(Path(SHARED.name))


def values(folder: Path, **changed: Any) -> dict[str, Any]:
    """A recipe of four steps on the language model alone, a checkpoint every second."""
    return {
        **world(),
        "out": str(folder / "out"),
        "parts": LANGUAGE,
        "steps": 4,
        "warmup": 0,
        "save_every": 2,
    } | changed


def told(events: list[Event]) -> Told:
    """What the run told its user beside its curve."""
    return [event.what for event in events if isinstance(event, Notice)]


def curve(events: list[Event]) -> Told:
    return [f"{step.step} {step.loss!r} {step.grad_norm!r}" for step in events if isinstance(step, Step)]


def stopped(folder: Path, **changed: Any) -> dict[str, Any]:
    """A run that was stopped after its third step; its checkpoint is of the second."""
    asked = values(folder, **changed)
    small.until(fit(small.recipe(asked)), 3)
    return asked


# The peers' way to train: the Trainer of Transformers on a PEFT model.


class Rows(torch.utils.data.Dataset):
    """Twelve rows of text, as many tokens each; ``shift`` makes others of them."""

    def __init__(self, shift: int = 0, labelled: bool = True) -> None:
        self.shift, self.labelled = shift, labelled

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(12) * (row + 3) + self.shift) % 80 + 8
        return {"input_ids": ids, "attention_mask": ids.new_ones(12), "labels": ids if self.labelled else ids * 0 - 100}


def trainer(folder: Path, model: Any = None, rows: Any = None, **options: Any) -> transformers.Trainer:
    """A Trainer of four steps that saves every second."""
    asked = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "seed": 0}
    asked |= {"per_device_train_batch_size": 2, **options}
    transformers.set_seed(0)
    config = peft.LoraConfig(target_modules=worlds.TARGETS, r=2, lora_dropout=0.1)
    arguments = transformers.TrainingArguments(
        folder / "theirs", use_cpu=True, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, save_strategy="steps", **asked,
    )  # fmt: skip
    adapted = model if model is not None else peft.get_peft_model(worlds.model(), config)
    return transformers.Trainer(adapted, arguments, train_dataset=rows or Rows())


def losses(made: transformers.Trainer) -> list[float]:
    return [round(line["loss"], 5) for line in made.state.log_history if "loss" in line]


@contextmanager
def interrupted(after: int) -> Iterator[None]:
    """Stop the Trainer after this many steps, as a kill does."""

    def step(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.state.global_step == after:
            raise KeyboardInterrupt
        return plain(self, *arguments, **keywords)

    plain = transformers.Trainer.training_step
    with mock.patch.object(transformers.Trainer, "training_step", step), suppress(KeyboardInterrupt):
        yield


def halted(folder: Path, **options: Any) -> None:
    """A Trainer's run that was stopped after its third step."""
    with interrupted(3):
        trainer(folder, **options).train()


@fault("a run goes on with another recipe", "huggingface/transformers#18070", "huggingface/transformers#23099",
       verdict=ConfigError, says="another recipe")  # fmt: skip
def other_recipe(folder: Path, planted: bool) -> Told:
    asked = stopped(folder)
    return told(small.run(asked, *(["seed=7"] if planted else [])))


@other_recipe.peer
def _(folder: Path) -> str:
    halted(folder)
    made = trainer(folder, seed=7)
    made.train(resume_from_checkpoint=True)
    return f"goes on to step {made.state.global_step} with other numbers than it began with"


@fault("a run goes on with rows that have changed", "huggingface/accelerate#2016", "modelscope/ms-swift#10050",
       verdict=ConfigError, says="rows have changed")  # fmt: skip
def other_rows(folder: Path, planted: bool) -> Told:
    rows = small.rows(folder / "rows.jsonl", 5, (0,))
    asked = stopped(folder, data={"train": [{"path": str(rows)}]})
    if planted:
        small.rows(folder / "rows.jsonl", 6, (0,))
    return told(small.run(asked))


@other_rows.peer
def _(folder: Path) -> str:
    halted(folder)
    made = trainer(folder, rows=Rows(shift=5))
    made.train(resume_from_checkpoint=True)
    return f"goes on to step {made.state.global_step} on the other rows"


@fault("the newest checkpoint is damaged", "huggingface/transformers#35782", "huggingface/transformers#35525",
       verdict=Reported, says="checkpoint is damaged")  # fmt: skip
def damaged_checkpoint(folder: Path, planted: bool) -> Told:
    asked = values(folder, save_every=1)
    small.until(fit(small.recipe(asked)), 4)
    if planted:
        newest = max((folder / "out/checkpoints").iterdir()) / "tensors.safetensors"
        newest.write_bytes(newest.read_bytes()[:-20])
    return told(small.run(asked))


@damaged_checkpoint.peer
def _(folder: Path) -> str:
    halted(folder, save_steps=1)
    newest = folder / "theirs/checkpoint-3/adapter_model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-20])
    trainer(folder).train(resume_from_checkpoint=True)
    return "goes on"


@fault("a checkpoint whose optimiser was lost", "huggingface/peft#859", "bitsandbytes-foundation/bitsandbytes#782",
       verdict=TrainingError, says="No checkpoint can be read")  # fmt: skip
def lost_optimiser(folder: Path, planted: bool) -> Told:
    asked = stopped(folder)
    if planted:
        held = folder / "out/checkpoints/step-000002/tensors.safetensors"
        worlds.retensor(held, lambda all_: {k: v for k, v in all_.items() if not k.startswith("optimiser/")})
    return told(small.run(asked))


@lost_optimiser.peer
def _(folder: Path) -> str:
    halted(folder)
    (folder / "theirs/checkpoint-2/optimizer.pt").unlink()
    made = trainer(folder)
    made.train(resume_from_checkpoint=True)
    steps = {int(state["step"]) for state in made.optimizer.state.values()}
    return f"goes on to step {made.state.global_step}; the optimiser has counted {', '.join(map(str, steps))}"


@fault("dropout starts anew after a resume", "huggingface/transformers#35850", "huggingface/accelerate#2016",
       verdict=Harmless, says="the resumed curve is the same curve, bit for bit")  # fmt: skip
def dropout_resumed(folder: Path, planted: bool) -> Told:
    if planted:
        asked = stopped(folder)
        torch.rand(5)  # whatever else the process draws in between
        return [line for line in curve(small.run(asked)) if int(line.split()[0]) > 2]
    return [line for line in curve(small.run(values(folder))) if int(line.split()[0]) > 2]


@dropout_resumed.peer
def _(folder: Path) -> str:
    whole = trainer(folder / "whole")
    whole.train()
    halted(folder)
    torch.rand(5)
    made = trainer(folder)
    made.train(resume_from_checkpoint=True)
    return f"the resumed losses are {'' if losses(made)[-2:] == losses(whole)[-2:] else 'not '}those of the whole run"


@fault("the disk is full while a checkpoint is written", "Lightning-AI/pytorch-lightning#688",
       "huggingface/transformers#35525", verdict=TrainingError, says="disk is full")  # fmt: skip
def full_disk(folder: Path, planted: bool) -> Told:
    import os

    asked, plain = values(folder), os.fsync

    def fsync(handle: int) -> None:
        if "partial-000004" in os.readlink(f"/proc/self/fd/{handle}") and planted:
            raise OSError(28, "No space left on device")
        plain(handle)

    with mock.patch.object(os, "fsync", fsync):
        try:
            small.run(asked)
        finally:
            held = sorted(path.name for path in (folder / "out/checkpoints").iterdir())
            assert held[0] == "step-000002" and len(held) == 2 - planted, held
    return ()


@full_disk.peer
def _(folder: Path) -> str:
    def broken(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    with mock.patch.object(torch, "save", broken), suppress(OSError):
        trainer(folder, save_steps=3).train()
    try:
        trainer(folder).train(resume_from_checkpoint=True)
    except Exception as error:  # noqa: BLE001 (what the half-written checkpoint does is the observation)
        return f"the half-written checkpoint is the newest, and going on raises `{type(error).__name__}`"
    return "goes on from the half-written checkpoint, without its optimiser"


@fault("two runs in one folder", "deepinv/deepinv#525", "LibreYOLO/libreyolo#833",
       verdict=ConfigError, says="Another run")  # fmt: skip
def two_runs(folder: Path, planted: bool) -> Told:
    first = fit(small.recipe(values(folder)))
    next(first)
    try:
        return told(small.run(values(folder if planted else folder / "other")))
    finally:
        first.close()


@two_runs.peer
def _(folder: Path) -> str:
    for seed in (0, 7):
        trainer(folder, seed=seed).train()
    names = sorted(path.name for path in (folder / "theirs").iterdir())
    return f"the second writes over the first's {', '.join(names)}"


def poisoned(asked: dict[str, Any], planted: bool, part: str) -> Told:
    """A run in which numbers of the second step are none: its inputs', or its gradients'."""
    if part == "loss":
        plain = Run.encode

        def encode(self: Run, numbers: Any) -> Any:
            batch = plain(self, numbers)
            if self.step == 1 and planted and "pixel_values" in batch.inputs:
                batch.inputs["pixel_values"][0] = math.nan
            return batch

        with mock.patch.object(Run, "encode", encode):
            return told(small.run(asked))
    base = open_base(asked["model"])
    events = []
    for event in fit(small.recipe(asked), host=base):
        events.append(event)
        if isinstance(event, Step) and event.step == 1 and planted:
            patch = next(p for s in slots(base.model) for held in s.patches.values() for p in held.values())
            next(patch.parameters()).register_hook(lambda grad: grad * math.inf)
    return told(events)


@fault("a loss that is not a number", "huggingface/trl#6702", "getainode/ainode#186",
       verdict=TrainingError, says="loss of step 2 is not a number")  # fmt: skip
def loss_nan(folder: Path, planted: bool) -> Told:
    return poisoned(values(folder, batch=4, accumulate=1), planted, "loss")


@loss_nan.peer
def _(folder: Path) -> str:
    made = trainer(folder)
    plain, calls = type(made).compute_loss, []

    def poisoned_loss(self: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        loss = plain(self, *arguments, **keywords)
        return loss * math.nan if len(calls) == 2 else loss

    with mock.patch.object(type(made), "compute_loss", poisoned_loss):
        made.train()
    trained = [p for p in made.model.parameters() if p.requires_grad]
    broken = all(bool(p.isnan().any()) for p in trained)
    shown = all(math.isfinite(loss) for loss in losses(made))
    return f"logs {'only finite losses' if shown else 'nan'}; the adapter is {'no number' if broken else 'finite'}"


@fault("a gradient that is not a number", "openvla/openvla#53", "getainode/ainode#186",
       verdict=TrainingError, says="gradient of step 2 is not a number")  # fmt: skip
def gradient_nan(folder: Path, planted: bool) -> Told:
    return poisoned(values(folder), planted, "gradient")


@gradient_nan.peer
def _(folder: Path) -> str:
    made = trainer(folder)
    name, first = next((n, p) for n, p in made.model.named_parameters() if "lora_B" in n)
    first.register_hook(lambda grad: grad * math.inf)
    made.train()
    broken = bool(dict(made.model.named_parameters())[name].isnan().any())
    return f"trains to its end; the adapter is {'no number' if broken else 'finite'}"


@fault("vision is adapted, and no row has a picture", "2U1/Qwen-VL-Series-Finetune#193", "huggingface/trl#1936",
       verdict=TrainingError, says="No row has a picture")  # fmt: skip
def no_pictures(folder: Path, planted: bool) -> Told:
    rows = small.rows(folder / "rows.jsonl", 4, (0,) if planted else (1,))
    return told(small.run(values(folder, parts=SEEING, data={"train": [{"path": str(rows)}]})))


@no_pictures.peer
def _(folder: Path) -> str:
    config = peft.LoraConfig(target_modules=r".*vision_tower.*(q_proj|v_proj)|.*language_model.*q_proj")
    made = trainer(folder, peft.get_peft_model(worlds.model(), config))
    made.train()
    idle = [n for n, p in made.model.named_parameters() if "vision" in n and "lora_B" in n and not p.any()]
    return f"trains to its end; all {len(idle)} vision updates are still zero"


def cut_off(base: Any) -> None:
    """The projector's output no longer depends on anything, as in a model that was written wrongly."""
    projector = base.get_submodule("model.multi_modal_projector")
    projector.register_forward_hook(lambda module, inputs, output: output.detach())


@fault("patches that no gradient ever reaches", "2U1/Qwen-VL-Series-Finetune#193", "unslothai/unsloth#3089",
       verdict=TrainingError, says="never had a gradient")  # fmt: skip
def no_gradient(folder: Path, planted: bool) -> Told:
    base = open_base(world()["model"])
    if planted:
        cut_off(base.model)
    return told(small.run(values(folder, parts=SEEING + LANGUAGE), host=base))


@no_gradient.peer
def _(folder: Path) -> str:
    base = worlds.model()
    cut_off(base)
    config = peft.LoraConfig(target_modules=r".*vision_tower.*layers\.[01]\..*q_proj|.*language_model.*q_proj")
    made = peft.get_peft_model(base, config)
    optimiser = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], 1e-2)
    for _ in range(4):
        made(**worlds.inputs()).logits.square().mean().backward()
        optimiser.step()
    idle = [n for n, p in made.named_parameters() if "vision" in n and "lora_B" in n and not p.any()]
    return f"four steps later {len(idle)} of 2 vision updates are still zero"


@fault("a training that changes nothing", "tloen/alpaca-lora#357", "vllm-project/vllm#34186",
       verdict=Unmoved, says="changes no output")  # fmt: skip
def no_change(folder: Path, planted: bool) -> Told:
    return told(small.run(values(folder, parts=[{**LANGUAGE[0], "lr": 1e-60 if planted else 1e-2}])))


@no_change.peer
def _(folder: Path) -> str:
    made = trainer(folder, learning_rate=1e-60)
    made.train()
    made.save_model(folder / "adapter")
    moved = not torch.equal(worlds.logits(worlds.there(folder / "adapter")), worlds.logits(worlds.model()))
    return f"saves an adapter that changes {'some' if moved else 'no'} output"


@fault("micro-batches with few and with many labels count alike", "huggingface/transformers#24725",
       "huggingface/transformers#35203", verdict=Harmless,
       says="a step's loss and gradient are those of its rows in one batch")  # fmt: skip
def uneven_micro_batches(folder: Path, planted: bool) -> Told:
    rows = folder / "rows.jsonl"
    said = [{"question": "what is this?", "answer": "a cat and a dog " * (1 + 7 * (n % 2))} for n in range(4)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in said))
    parts = [{**LANGUAGE[0], "dropout": 0.0}]
    shape = {"batch": 1, "accumulate": 4} if planted else {"batch": 4, "accumulate": 1}
    asked = values(folder, data={"train": [{"path": str(rows)}]}, parts=parts, steps=1, **shape)
    return [f"{s.loss:.4f} {s.grad_norm:.3f}" for s in small.run(asked) if isinstance(s, Step)]


class Uneven(Rows):
    """Every second row has labels on its last tokens alone."""

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        told = super().__getitem__(row)
        labels = told["labels"].clone()
        labels[: 10 * (row % 2)] = -100
        return told | {"labels": labels}


@uneven_micro_batches.peer
def _(folder: Path) -> str:
    found = []
    for batch, parts in ((4, 1), (1, 4)):
        shape = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts, "max_steps": 1}
        config = peft.LoraConfig(target_modules=worlds.TARGETS, r=2)
        model = worlds.noisy(peft.get_peft_model(worlds.model(), config))
        made = trainer(folder / str(batch), model, Uneven(), **shape)
        made.train()
        found.append(made.state.log_history[0])
    same = {key: abs(found[0][key] - found[1][key]) < 1e-3 * found[0][key] for key in ("loss", "grad_norm")}
    kept = [key for key, equal in same.items() if equal]
    return f"the Trainer's {' and '.join(kept) or 'numbers'} {'are' if kept else 'are not'} those of one batch"


@fault("a source of replay that is never drawn", "LLaVA-VL/LLaVA-NeXT#364", "Physical-Intelligence/openpi#844",
       verdict=Reported, says="No row of replay will be drawn")  # fmt: skip
def replay_undrawn(folder: Path, planted: bool) -> Told:
    replay = {"path": str(small.rows(folder / "replay.jsonl", 4, (0,))), "weight": 1e-5 if planted else 0.5}
    task = {"path": str(small.rows(folder / "task.jsonl", 4, (0,))), "weight": 0.5}
    return told(small.run(values(folder, data={"train": [task, replay]})))


@replay_undrawn.peer
def _(folder: Path) -> str:
    from datasets import Dataset, interleave_datasets

    sources = [Dataset.from_list([{"source": name}] * 16) for name in ("task", "replay")]
    mixed = interleave_datasets(sources, probabilities=[1 - 1e-5, 1e-5], seed=0, stopping_strategy="first_exhausted")
    return f"{sum(row['source'] == 'replay' for row in mixed)} of {len(mixed)} rows are replay"


@fault("the template lets no answer end, so that the model never stops", "zjysteven/lmms-finetune#47",
       "tatsu-lab/stanford_alpaca#126", verdict=Reported, says="When to stop will not be learnt")  # fmt: skip
def no_end(folder: Path, planted: bool) -> Told:
    base = open_base(world()["model"])
    template = TEMPLATES["vicuna" if planted else "vicuna with end"]
    base.processor.chat_template = template.replace("MARK", base.processor.image_token)
    return told(small.run(values(folder), host=base))


@no_end.peer
def _(folder: Path) -> str:
    processor = open_base(world()["model"]).processor
    processor.chat_template = TEMPLATES["vicuna"].replace("MARK", processor.image_token)
    said = [{"role": role, "content": [{"type": "text", "text": "yes"}]} for role in ("user", "assistant")]
    last = processor.apply_chat_template(said, tokenize=True, return_dict=True)["input_ids"][0][-1]
    special = last in processor.tokenizer.all_special_ids
    return f"the row ends with {'a control token' if special else repr(processor.tokenizer.decode([last]))}"


@fault("a learning rate that YAML takes for a word", "hiyouga/LlamaFactory#4014", "huggingface/trl#1450",
       verdict=Harmless, says="1e-2 is the number 0.01, with a point or without")  # fmt: skip
def yaml_number(folder: Path, planted: bool) -> Told:
    path = folder / "recipe.yaml"
    asked = values(folder, parts=[{**LANGUAGE[0], "lr": "RATE"}], steps=1)
    path.write_text(json.dumps(asked).replace('"RATE"', "1e-2" if planted else "0.01"))
    return [f"{step.lr} {step.loss!r}" for step in fit(Recipe.load(path)) if isinstance(step, Step)]


@yaml_number.peer
def _(folder: Path) -> str:
    path = folder / "arguments.yaml"
    path.write_text(f"output_dir: {folder}\nlearning_rate: 1e-2\nuse_cpu: true\n")
    (read,) = transformers.HfArgumentParser(transformers.TrainingArguments).parse_yaml_file(str(path))
    return f"the learning rate is {read.learning_rate!r}"


@fault("a key that stands twice in a recipe", "snowflakedb/ArcticTraining#85", "rbgirshick/yacs#17",
       verdict=ConfigError, says="stands twice")  # fmt: skip
def key_twice(folder: Path, planted: bool) -> Told:
    path = folder / "recipe.yaml"
    text = json.dumps(values(folder, steps=1))
    path.write_text(text.replace('"warmup": 0', '"warmup": 0, "seed": 3' + ', "seed": 4' * planted))
    Recipe.load(path)
    return ()


@key_twice.peer
def _(folder: Path) -> str:
    path = folder / "arguments.yaml"
    path.write_text(f"output_dir: {folder}\nseed: 3\nuse_cpu: true\nseed: 4\n")
    (read,) = transformers.HfArgumentParser(transformers.TrainingArguments).parse_yaml_file(str(path))
    return f"the seed is {read.seed}"


@fault("a tower that is to stay in 16 bits, by a name without its prefix", "1038lab/ComfyUI-JoyCaption#53",
       "unslothai/unsloth#4208", "huggingface/transformers#45674",
       verdict=SelectionError, says="no path of this model matches")  # fmt: skip
def spared_tower(folder: Path, planted: bool) -> Told:
    """Here it is said what is to be in 4 bits, by the same names: what is not named is spared."""
    worlds.model().save_pretrained(folder / "base")
    named = FourBits(select="@language_model.*_proj" if planted else "@model.language_model.*_proj")
    host = open_base(str(folder / "base"), processor=False, four_bits=named)
    assert host.quantisation is not None
    report = host.quantisation.report(host.sites)
    tower = {line["kept"] for line in report["roles"] if line["component"] == Component.VISION}
    assert tower and None not in tower, tower
    return [f"in 4 bits: {line['component']} {line['role']}" for line in report["roles"] if line["kept"] is None]


@spared_tower.peer
def _(folder: Path) -> str:
    pytest.importorskip("bitsandbytes", reason="Transformers' own 4 bits")
    pytest.importorskip("accelerate", reason="Transformers wants it beside bitsandbytes")
    worlds.model().save_pretrained(folder / "base")
    asked = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["vision_tower"])
    made = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base", quantization_config=asked)
    linear = {name: module for name, module in made.named_modules() if isinstance(module, torch.nn.Linear)}
    four = {name for name, module in linear.items() if type(module).__name__ == "Linear4bit"}
    tower = {name for name in linear if ".vision_tower." in name}
    head = "the head, which is spared where nothing is named, is too" if "lm_head" in four else "the head is not"
    return f"{len(tower & four)} of the tower's {len(tower)} linear layers are in 4 bits; {head}"
