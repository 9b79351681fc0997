"""16 rows with 16 adapters against PEFT's mixed batch (``adapter_names``) in Transformers' ``generate``: same answers.

On two bases in float32: SmolLM2-135M in a LLaVA (``bench.smol``) and the embedded mini-1, whose layers are narrow. An
adapter is a LoRA of rank 16 at every linear layer of the language model. 16 questions of 24 words, without and with a
picture, are asked at once, one of each adapter, and 32 tokens are said to each. Both read the same folders, take turns
(A B B A ...) and are asked what was never asked before; every id that either says must be the other's. Ratios are
medians of those within a round.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

from bench import serving
from bench.race import THREADS
from bench.run import Values

ROWS = 16
TOKENS = 32
WORDS = 24
ROUNDS = 3


def measure() -> Values:
    """Each base, without and with a picture."""
    import torch

    torch.set_num_threads(THREADS)
    values: Values = {}
    for model in (serving.SMOL, serving.MINI):
        values = {**values, **_raced(model)}
    return values


def _raced(model: str) -> Values:
    from tarsia.serve.load import inside

    engine, names = serving.loaded(ROWS, "all", model)
    plain = serving.host(model)
    peft = serving.peft(plain, names, model)
    values: dict[str, dict[str, float | int | str]] = {}
    turn = 1000
    for kind in ("text", "a picture each"):
        runs: dict[str, list[Any]] = {"Tarsia": [], "PEFT": []}
        for number in range(ROUNDS + 1):
            asked = inside.texts(turn := turn + 1, ROWS, WORDS, pictured=kind != "text")
            prompts = [inside.encoded(plain, one) for one in asked]
            ways = {
                "Tarsia": partial(inside.run, engine, prompts, names, TOKENS),
                "PEFT": partial(inside.generated, plain, peft, asked, TOKENS, adapter_names=names),
            }
            found = {name: ways[name]() for name in (list(ways) if number % 2 else reversed(ways))}
            serving.same(found["Tarsia"].ids, found["PEFT"].ids, "the answers of both")
            for name, one in found.items():
                runs[name] += [one] if number else []
        for name, held in runs.items():
            row = {"tokens/s": round(median(one.rate for one in held), 1), "rounds": ROUNDS, "threads": THREADS}
            values[f"{model}, {kind}: {name}"] = row
        pairs = zip(runs["Tarsia"], runs["PEFT"], strict=True)
        values[f"{model}, {kind}: Tarsia"]["times PEFT's"] = round(median(a.rate / b.rate for a, b in pairs), 2)
    return values
