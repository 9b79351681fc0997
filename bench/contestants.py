"""Who takes part in ``bench/cases/step.py``: the same step of the same model, in Tarsia and in what others use.

All load ``bench.smol``'s model, train low-rank updates of the same rank on the same sites from the same first values,
see the same batch, clip the gradient to 1 and step with AdamW.
"""

from __future__ import annotations

import atexit
import importlib
import math
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.race import Step

IGNORED = -100
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
RATE = 2e-4


def batch(folder: Path, rows: int = 4, length: int = 256, labelled: float = 0.3) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and labels [rows, length]: a picture, a question, an answer; ``labelled`` is the answers' share."""
    from transformers import AutoTokenizer

    from bench.smol import IMAGE, PATCHES, TOWERS

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer((Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf8"))["input_ids"]
    picture = [tokenizer.convert_tokens_to_ids(IMAGE)] * PATCHES
    ids = torch.tensor([picture + text[n * length : (n + 1) * length - PATCHES] for n in range(rows)])
    labels = torch.full_like(ids, IGNORED)
    total, done = math.floor(labelled * rows * length), 0
    for row in range(rows):
        count = (total - done) // (rows - row)
        labels[row, -count:] = ids[row, -count:]
        done += count
    side = TOWERS[folder.name]["image_size"]
    pixels = torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return inputs, labels


def first(shape: tuple[int, int], name: str) -> Tensor:
    """The first value of A [rank, in] at the site of this name, for every contestant the same."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.empty(shape).uniform_(-1, 1, generator=generator) / math.sqrt(shape[1])


_OPEN = ExitStack()


def _forever(context: AbstractContextManager[Any]) -> None:
    """Stay inside ``context`` as long as the process lasts."""
    _OPEN.enter_context(context)


def tarsia(
    folder: str, rank: int = 16, method: str = "lora", cache: str | None = None, four_bits: str | None = None
) -> Step:
    """What ``tarsia.train.loop`` does in one step, on a batch that is there; the language model in ``four_bits``."""
    from tarsia.adapter import FourBits, open_base
    from tarsia.core.attach import Part, attach, patches
    from tarsia.core.method import find
    from tarsia.data import Batch
    from tarsia.train.exact import deterministic
    from tarsia.train.features import features
    from tarsia.train.heap import kept_heap
    from tarsia.train.lean import lean
    from tarsia.train.optimiser import adamw
    from tarsia.train.step import backward
    from tarsia.train.store import Store

    form = None if four_bits is None else FourBits(four_bits, select="language")
    host = open_base(folder, processor=False, four_bits=form)
    options: dict[str, Any] = {"rank": rank, "alpha": 2.0 * rank} if method == "lora" else {}
    select = f"language.*.{{{','.join(ROLES)}}}"
    attach(host.model, host.sites, [Part(method, select, find(method).configure(options))], name="bench")
    made = patches(host.model, "bench")
    if method == "lora":
        with torch.no_grad():
            for site, patch in made.items():
                held: Any = patch
                held.A.copy_(first(held.A.shape, site.path))
    named: Mapping[str, nn.Parameter] = {
        f"{site.path}/{key}": p for site, patch in made.items() for key, p in patch.named_parameters()
    }
    inputs, labels = batch(Path(folder))
    rows = len(labels)
    whole = Batch(inputs, labels, (1,) * rows, ("bench",) * rows, tuple(range(rows)))
    optimiser = adamw([named], [RATE], (0.9, 0.999), 0.0)
    host.model.train()
    if cache is not None:
        _forever(features(host, Store(Path(cache), 2**30)))
    _forever(lean(host.model))
    _forever(kept_heap())

    def step() -> float:
        with deterministic(torch.device("cpu")):
            losses = backward(host.model, [whole], 1)
            nn.utils.clip_grad_norm_(named.values(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return losses.loss

    return step


def adapted_by_peft(folder: str, rank: int, four_bits: str | None = None) -> nn.Module:
    """The model with PEFT's low-rank updates, at their first values; the language model in bitsandbytes' 4 bits."""
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    options: dict[str, Any] = {}
    if four_bits is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=four_bits,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            # a bare "vision_tower" is not recognised, and the tower would be in 4 bits after all
            llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        )
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **options)
    names = "|".join(f"{role}_proj" for role in ROLES)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=rf".*language_model\..*\.({names})")
    adapted: nn.Module = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                site = name.removeprefix("base_model.model.").partition(".lora_A")[0]
                parameter.copy_(first((parameter.shape[0], parameter.shape[1]), site))
    return adapted


def peft(folder: str, rank: int = 16, four_bits: str | None = None) -> Step:
    """PEFT over Transformers, whose model computes the loss from labels that it is given."""
    adapted = adapted_by_peft(folder, rank, four_bits)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    inputs, labels = batch(Path(folder))
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    adapted.train()

    def step() -> float:
        loss = adapted(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def trl(folder: str, rank: int = 16) -> Step:
    """TRL's SFTTrainer over the same PEFT model: steps of the loop inside ``train()`` and their logged loss.

    The loop runs in a greenlet, on the thread that asks for steps, so that what is counted on a thread is seen.
    """
    from transformers import AutoProcessor, TrainerCallback

    library, greenlet = importlib.import_module("trl"), importlib.import_module("greenlet")
    adapted = adapted_by_peft(folder, rank)
    inputs, labels = batch(Path(folder))
    caller = greenlet.getcurrent()

    class Turns(TrainerCallback):  # type: ignore[misc]
        """Goes back to the caller after each step."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            caller.switch(float(logs["loss"]))

    scratch = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, scratch)
    trainer = library.SFTTrainer(
        model=adapted,
        args=library.SFTConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=len(labels),
            max_steps=10**6,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            max_length=None,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=_pictures(len(labels)),
        data_collator=lambda rows: {**inputs, "labels": labels},
        processing_class=AutoProcessor.from_pretrained(folder),
        callbacks=[Turns()],
    )
    trainer.remove_callback(importlib.import_module("transformers").PrinterCallback)
    loop = greenlet.greenlet(trainer.train)

    def step() -> float:
        loss: float = loop.switch()
        return loss

    return step


def _pictures(rows: int) -> Any:
    """Rows that make TRL take the model for one that sees; what is in them is not read."""
    from datasets import Dataset

    return Dataset.from_dict({"images": [[]] * rows, "prompt": ["?"] * rows, "completion": ["!"] * rows})


def loss_layer(kind: str, rows: int = 2048, width: int = 576, vocabulary: int = 49152, labelled: float = 0.3) -> Step:
    """Head and loss alone, forward and backward: ``chunks`` of labelled positions, or ``all`` positions' logits."""
    from tarsia.train.loss import head_losses

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = 0.05 * torch.randn(vocabulary, width, generator=generator)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) > labelled] = IGNORED

    def step() -> float:
        hidden.grad = None
        if kind == "chunks":
            wanted = labels != IGNORED
            loss = head_losses(hidden[wanted], weight, None, labels[wanted]).mean()
        else:
            loss = nn.functional.cross_entropy(nn.functional.linear(hidden, weight), labels, ignore_index=IGNORED)
        loss.backward()
        return float(loss.detach())

    return step
