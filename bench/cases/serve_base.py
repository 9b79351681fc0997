"""A mixed batch, each row with an adapter of its own, against the base alone: the whole model, in one process.

SmolLM2-135M in a LLaVA (``bench.smol``), float32. 8 and 16 rows of a question of 24 words without a picture are asked
at once and say 32 tokens each; in a mixed batch each row has its own LoRA of rank 16, at queries and values of the
language model or at every linear layer of it. *engine, mixed* and *engine, base* are the same engine; *generate, base*
is Transformers' own ``generate`` on a model without any patch, the rows padded into one batch. The three take turns (A
B C C B A ...), every round asks what was never asked before, and the ratios are medians of those within a round.
Answers of the base are the same ids in the engine and in ``generate``; one mixed row a round is held to the adapter
attached alone and ``generate``. *by bytes* is what is left where reading every number once is all that takes time.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

from bench import serving
from bench.race import THREADS
from bench.run import Values

ROWS = (8, 16)
TOKENS = 32
WORDS = 24
ROUNDS = 3
CHECKED = 1


def measure() -> Values:
    """Each place of the adapters, and each number of rows."""
    import torch

    torch.set_num_threads(THREADS)
    plain = serving.host()
    values: Values = {}
    for place, where in (("queries and values", "qv"), ("every layer", "all")):
        values = {**values, **_raced(plain, place, where)}
    return values


def _raced(plain: Any, place: str, where: str) -> Values:
    from tarsia.serve.load import inside

    engine, names = serving.loaded(max(ROWS), where)
    held = serving.thick(max(ROWS), where)
    decoder = sum(p.numel() for p in plain.model.model.language_model.parameters())
    each = held.search()[0].numbers
    values: dict[str, dict[str, float | int | str]] = {}
    turn = 0
    for rows in ROWS:
        runs: dict[str, list[Any]] = {"mixed": [], "base": [], "generate, base": []}
        for number in range(ROUNDS + 1):
            asked = inside.texts(turn := turn + 1, rows, WORDS, pictured=False)
            prompts = [inside.encoded(plain, one) for one in asked]
            ways = {
                "mixed": partial(inside.run, engine, prompts, names[:rows], TOKENS),
                "base": partial(inside.run, engine, prompts, [None] * rows, TOKENS),
                "generate, base": partial(inside.plainly, plain, asked, TOKENS),
            }
            found = {name: ways[name]() for name in (list(ways) if number % 2 else reversed(ways))}
            serving.same(found["base"].ids, found["generate, base"].ids, "the base's answers")
            for i in range(CHECKED):
                alone = serving.alone(plain, names[i], asked[i], TOKENS, held)
                serving.same([found["mixed"].ids[i]], [alone], f"the answer of {names[i]}")
            for name, one in found.items():
                runs[name] += [one] if number else []  # the first round warms up
        for name, ran in runs.items():
            pairs = zip(runs["base"], ran, strict=True)
            values[f"{place}, {rows} rows: {name}"] = {
                "tokens/s": round(median(one.rate for one in ran), 1),
                "of the engine's base": round(median(one.rate / b.rate for b, one in pairs), 3),
                "rounds": ROUNDS,
                "threads": THREADS,
            }
        values[f"{place}, {rows} rows: mixed"]["by bytes"] = round(decoder / (decoder + rows * each), 3)
    return values
