"""Stage two of the base model: the tower is joined to a small language model.

    python -m tarsia.base.join --photographs cifar10-train.parquet --test cifar10-test.parquet --work DIR --out DIR

Needs the tower that ``tarsia.base.see`` left in DIR. For the first 60 % of the steps the tower is frozen, then all is
trained. Writes a LLaVA-architecture checkpoint in bfloat16 that Transformers loads, and its card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tarsia.base import pictures, resumable, see, texts

SPECIAL = ("<pad>", "<image>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, IMAGE, END = 0, 1, 5
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}{%- endif -%}"
    "{{- '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|end|>' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
BATCH = {"photographs": 44, "digits": 16, "scenes": 40, "search": 4, "two": 6, "text": 48}


About = Callable[[Sequence[pictures.Thing], random.Random], tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Row:
    """One question with its pictures (uint8 [SIZE, SIZE, 3] each) and its answer."""

    question: str
    answer: str
    shown: tuple[np.ndarray, ...] = ()


def tokenizer(work: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of this training: ``work/tokenizer.json``, which the first run learns."""
    file = work / "tokenizer.json"
    if not file.exists():
        learnt().save(str(file))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(file)),
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=["<image>", "<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=1024,
        padding_side="right",
    )


def learnt() -> Tokenizer:
    """Byte-level BPE of 1,024 tokens, learnt from 20,000 training texts and the words about pictures."""
    rng = random.Random("tokenizer")
    corpus = [f"{q}\n{a}" for _, q, a in map(texts.text, range(20_000)) if not texts.held_out(q)]
    for seed in range(1500):
        corpus += map("\n".join, (
            texts.about_scene(pictures.scene(seed)[1], rng),
            texts.about_photograph(rng.choice(pictures.PHOTOGRAPHS), rng),
            texts.about_digit(rng.randrange(10), rng),
        ))  # fmt: skip
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return bpe


def processor(tok: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Resize to SIZE x SIZE, scale to -1..1, 64 image tokens a picture."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    side = {"height": pictures.SIZE, "width": pictures.SIZE}
    return LlavaProcessor(
        SiglipImageProcessorPil(
            size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=Image.Resampling.BICUBIC
        ),
        tok,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        image_token="<image>",
    )


def build(tower: Path) -> LlavaForConditionalGeneration:
    """The joined model with the trained tower in it."""
    language = LlamaConfig(
        vocab_size=1024, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, pad_token_id=PAD, eos_token_id=END,
        bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=see.TOWER, text_config=language, image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_seq_length=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    with safe_open(tower, "pt") as file:
        prefix = "model/tower."
        seen = {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
    model.model.vision_tower.load_state_dict(seen)
    return model


class World:
    """Every training row, as a function of (seed, step)."""

    def __init__(self, photographs: Path, seed: int, mix: Mapping[str, int]) -> None:
        self.seed, self.mix = seed, mix
        self.photographs, self.labels = pictures.photographs(photographs)

    def rows(self, step: int) -> Iterator[list[Row]]:
        """Rows with one picture, with two and with none, each as a batch."""
        rng = random.Random(f"{self.seed} {step}")
        noise = np.random.default_rng((self.seed, step))
        one = [self.photograph(rng, noise) for _ in range(self.mix["photographs"])]
        for row in rng.choices(pictures.digit_rows("train"), k=self.mix["digits"]):
            picture, value = pictures.digit(row, (rng.randint(-6, 6), rng.randint(-6, 6)))
            one.append(Row(*texts.about_digit(value, rng), (np.asarray(picture),)))
        one += [drawn(rng.randrange(100_000), rng) for _ in range(self.mix["scenes"])]
        for _ in range(self.mix["search"]):
            one.append(drawn(rng.randrange(100_000), rng, texts.about_search))
        yield one
        yield [self.two(rng) for _ in range(self.mix["two"])]
        yield [Row(q, a) for q, a in text_rows(step * 1000, self.mix["text"], held_out=False)]

    def photograph(self, rng: random.Random, noise: np.random.Generator) -> Row:
        i = rng.randrange(len(self.labels))
        return Row(
            *texts.about_photograph(pictures.PHOTOGRAPHS[self.labels[i]], rng), (see.crop(self.photographs[i], noise),)
        )

    def two(self, rng: random.Random) -> Row:
        a, b = rng.sample(range(len(self.labels)), 2)
        first, second = (pictures.PHOTOGRAPHS[self.labels[i]] for i in (a, b))
        return Row(*texts.about_two(first, second, rng), (self.photographs[a], self.photographs[b]))


def drawn(seed: int, rng: random.Random, about: About = texts.about_scene) -> Row:
    """One row about the rendered scene ``seed``."""
    picture, things = pictures.scene(seed)
    return Row(*about(things, rng), (np.asarray(picture),))


def text_rows(start: int, count: int, *, held_out: bool) -> list[tuple[str, str]]:
    """The first ``count`` text rows from ``start`` on that are, or are not, held out."""
    found: list[tuple[str, str]] = []
    while len(found) < count:
        _, question, answer = texts.text(start)
        if texts.held_out(question) == held_out:
            found.append((question, answer))
        start += 1
    return found


def encode(tok: PreTrainedTokenizerFast, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids [B, T] padded on the right, labels (-100 off the answer) and pixels, all rows with as many pictures."""
    ids, labels = [], []
    for row in rows:
        prompt = [3] + [IMAGE] * 64 * len(row.shown) + tok(row.question)["input_ids"] + [END, 4]
        answer = [*tok(row.answer)["input_ids"], END]
        ids.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = nn.utils.rnn.pad_sequence
    pixels = see.normalise(np.stack([p for r in rows for p in r.shown])) if rows[0].shown else None
    return pad(ids, True, PAD), pad(labels, True, -100), pixels


def forward(
    model: LlavaForConditionalGeneration, ids: Tensor, labels: Tensor, pixels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum of the answer tokens' losses and, per row, whether every one was the most likely."""
    hidden = model.model(input_ids=ids, pixel_values=pixels, attention_mask=(ids != PAD).long()).last_hidden_state
    target = labels[:, 1:]
    at = target != -100
    logits = model.lm_head(hidden[:, :-1][at])
    right = torch.ones(target.shape, dtype=torch.bool)
    right[at] = logits.argmax(-1) == target[at]
    return F.cross_entropy(logits, target[at], reduction="sum"), right.all(1)


def held_out_rows(test: Path, limit: int) -> dict[str, list[Row]]:
    """Rows that training never sees, by source, answered in words."""
    shots, labels = pictures.photographs(test)
    rng = random.Random("held out")
    digits = [pictures.digit(i) for i in pictures.digit_rows("held-out")[:limit]]
    chosen: dict[str, list[Row]] = {
        "photographs": [
            Row("What is this?", texts.article(pictures.PHOTOGRAPHS[labels[i]]), (shots[i],))
            for i in rng.sample(range(len(labels)), limit)
        ],
        "digits": [Row("What digit is this?", pictures.NUMBERS[v], (np.asarray(p),)) for p, v in digits],
        "scenes": [row for i in range(limit) if len((row := drawn(10_000_000 + i, rng)).answer) < 40],
        "search": [drawn(10_000_000 + i, rng, texts.about_search) for i in range(limit)],
    }
    at = 50_000_000
    while min(len(chosen.get(k, ())) for k in ("words", "refusals", "talk", "repeat")) < min(limit, 60):
        kind, question, answer = texts.text(at)
        at += 1
        if texts.held_out(question) and len(chosen.setdefault(kind, [])) < limit:
            chosen[kind].append(Row(question, answer))
    return chosen


@torch.no_grad()
def examine(
    model: LlavaForConditionalGeneration, tok: PreTrainedTokenizerFast, rows: dict[str, list[Row]]
) -> dict[str, float]:
    """Share of rows answered exactly, by source (greedy decoding reproduces the answer iff every token is top)."""
    model.eval()
    shares = {}
    for source, members in rows.items():
        right = [forward(model, *encode(tok, members[i : i + 100]))[1] for i in range(0, len(members), 100)]
        shares[source] = round(float(torch.cat(right).float().mean()), 4)
    model.train()
    return shares


def export(
    model: LlavaForConditionalGeneration, tok: PreTrainedTokenizerFast, out: Path, card: dict[str, object]
) -> None:
    """Write weights in bfloat16, processor and card."""
    model.to(torch.bfloat16).save_pretrained(out)
    processor(tok).save_pretrained(out)
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    (out / "card.json").write_text(json.dumps({"name": out.name, "sha256": digest, **card}, indent=1) + "\n")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def train(model: LlavaForConditionalGeneration, tok: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """All steps that are left, with a checkpoint every four minutes and a look at held-out rows every 150 steps."""
    tower, inner = model.model.vision_tower, model.model
    rest = nn.ModuleList([inner.multi_modal_projector, inner.language_model, model.lm_head])
    pairs = [
        *resumable.optimisers(rest, [inner.language_model.layers], args.lr),
        *resumable.optimisers(tower, [tower.encoder], 0.2 * args.lr),
    ]
    checkpoint, log = args.work / "join.safetensors", args.work / "join.jsonl"
    first = resumable.load(checkpoint, model, pairs)
    resumable.cut(log, first)
    mix = BATCH | {name: int(rows) for name, _, rows in (pair.partition("=") for pair in args.mix.split(",") if pair)}
    command = f"python -m tarsia.base.join --steps {args.steps} --lr {args.lr} --seed {args.seed} --joint {args.joint}"
    resumable.remember(args.work, command + (f" --mix {args.mix}" if args.mix else ""), first)
    world, trial = World(args.photographs, args.seed, mix), held_out_rows(args.test, 200)
    began = saved = time.monotonic()
    losses: list[float] = []
    for step in range(first, args.steps):
        resumable.schedule(pairs, step, args.steps)
        tower.requires_grad_(step >= args.joint * args.steps)
        batches = [encode(tok, rows) for rows in world.rows(step)]
        tokens = sum(int((labels != -100).sum()) for _, labels, _ in batches)
        losses.append(0.0)
        for batch in batches:
            part = forward(model, *batch)[0] / tokens
            part.backward()
            losses[-1] += part.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in pairs:
            optimiser.step()
            optimiser.zero_grad()
        last = step + 1 in (args.steps, args.stop)
        if (step + 1) % 25 == 0 or last:
            seconds = (time.monotonic() - began) / (step + 1 - first)
            shown = examine(model, tok, trial) if (step + 1) % 150 == 0 or last else {}
            resumable.note(
                log, step=step + 1, loss=round(float(np.mean(losses)), 4), seconds=round(seconds, 3), **shown
            )
            losses = []
        if time.monotonic() - saved > 240 or last:
            resumable.save(checkpoint, step + 1, model, pairs)
            saved = time.monotonic()
        if last:
            break


def card(model: nn.Module, args: argparse.Namespace, final: dict[str, float]) -> dict[str, object]:
    """How the model was made and how well it answers: commands, seed, digests of the data, curves."""
    files = (args.photographs, args.test, Path(pictures.__file__).parent / "digits.png")

    def lines(name: str) -> list[object]:
        return [json.loads(line) for line in (args.work / f"{name}.jsonl").read_text().splitlines()]

    return {
        "commands": lines("commands"),
        "seed": args.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_exact": final,
        "data": {file.name: sha256(file) for file in files},
        "torch": torch.__version__,
        "curve": {stage: lines(stage) for stage in ("see", "join")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="CIFAR-10 training Parquet file")
    parser.add_argument("--test", type=Path, required=True, help="CIFAR-10 test Parquet file")
    parser.add_argument("--work", type=Path, required=True, help="folder with the tower; checkpoint and log go here")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--joint", type=float, default=0.6, help="share of the steps after which the tower is trained too"
    )
    parser.add_argument(
        "--mix", default="", help="rows of a step that differ from the usual, such as scenes=90,text=30"
    )
    parser.add_argument("--stop", type=int, help="stop after this step, as a killed run would")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, tok = build(args.work / "see.safetensors"), tokenizer(args.work)
    train(model, tok, args)
    if args.stop is None:
        model = model.to(torch.bfloat16).float()
        final = examine(model, tok, held_out_rows(args.test, 1000))
        export(model, tok, args.out, card(model, args, final))
        print(json.dumps(final))


if __name__ == "__main__":
    main()
