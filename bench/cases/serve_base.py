"""A mixed batch, each row with an adapter of its own, against the base alone: the whole model, in one process.

SmolLM2-135M in a LLaVA (``bench.smol``), float32. 8 and 16 rows of a question of 24 words without a picture are asked
at once and say 64 tokens each; in a mixed batch each row has its own LoRA of rank 16 at every linear layer of the
language model. *engine, mixed* and *engine, base* are the same engine; *generate, base* is Transformers' own
``generate`` on a model without any patch, the rows padded into one batch. The three take turns (A B C C B A ...),
every round asks what was never asked before, and the ratios are medians of those within a round. Answers of the base
are the same ids in the engine and in ``generate``; two mixed rows a round are held to the adapter attached alone and
``generate``.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

from bench import serving
from bench.race import THREADS
from bench.run import Values

ROWS = (8, 16)
TOKENS = 64
WORDS = 24
ROUNDS = 9
CHECKED = 2


def measure() -> Values:
    """Each number of rows."""
    import torch

    from tarsia.serve.load import inside

    torch.set_num_threads(THREADS)
    plain, engine, names = serving.host(), *serving.thick(max(ROWS))
    values: dict[str, dict[str, float | int | str]] = {}
    turn = 0
    for rows in ROWS:
        runs: dict[str, list[Any]] = {"engine, mixed": [], "engine, base": [], "generate, base": []}
        for number in range(ROUNDS + 1):
            asked = inside.texts(turn := turn + 1, rows, WORDS, pictured=False)
            prompts = [inside.encoded(plain, one) for one in asked]
            ways = {
                "engine, mixed": partial(inside.run, engine, prompts, names[:rows], TOKENS),
                "engine, base": partial(inside.run, engine, prompts, [None] * rows, TOKENS),
                "generate, base": partial(inside.plainly, plain, asked, TOKENS),
            }
            found = {name: ways[name]() for name in (list(ways) if number % 2 else reversed(ways))}
            serving.same(found["engine, base"].ids, found["generate, base"].ids, "the base's answers")
            for i in range(CHECKED):
                alone = serving.alone(plain, names[i], asked[i], TOKENS)
                serving.same([found["engine, mixed"].ids[i]], [alone], f"the answer of {names[i]}")
            for name, one in found.items():
                runs[name] += [one] if number else []  # the first round warms up
        for name, held in runs.items():
            base = zip(runs["engine, base"], held, strict=True)
            values[f"{name}, {rows} rows"] = {
                "tokens/s": round(median(one.rate for one in held), 1),
                "of the engine's base": round(median(one.rate / b.rate for b, one in base), 3),
                "rounds": ROUNDS,
                "threads": THREADS,
            }
    return values
