"""2,000 adapters against 5, by Zipf's law, with a pool that holds 64: what they cost in tokens a second.

SmolLM2-135M in a LLaVA (``bench.smol``), float32; an adapter is a LoRA of rank 8 at queries and values of the
language model and of the vision tower (``bench.serving``), 2 MiB. In a round 48 questions are asked at once, each
with a picture of its own and 24 words that nobody asked before, and 32 tokens are said to each; whom they ask is
drawn by Zipf's law with exponent 1.1 among 2,000 or among 5. Both are the same engine with the same budget, and take
turns (A B B A ...); ratios are medians of those within a round. Adapters were proved before (the first time that one
is read takes a proof), and come from the page cache. One answer a round is held, id for id, to the adapter attached
alone and Transformers' ``generate``.
"""

from __future__ import annotations

import random
from statistics import median
from typing import Any

from bench import serving
from bench.race import THREADS
from bench.run import Values

FEW = 5
POOL = 64
ZIPF = 1.1
ROWS = 48
TOKENS = 32
WORDS = 24
ROUNDS = 3
CHECKED = 1


def drawn(number: int, many: int) -> list[str]:
    """Whom a round's questions are for."""
    from tarsia.serve.load.asked import shares

    names = [serving.name(i) for i in range(many)]
    return random.Random(f"{number} of {many}").choices(names, cum_weights=shares(many, ZIPF), k=ROWS)


def measure() -> Values:
    """Both numbers of adapters."""
    import torch

    from tarsia.serve.load import inside

    torch.set_num_threads(THREADS)
    plain = serving.host()
    engine = serving.engine(serving.library(base=plain), POOL)
    wanted = {many: [drawn(n, many) for n in range(ROUNDS + 1)] for many in (serving.COUNT, FEW)}
    serving.prove(engine, sorted({name for rounds in wanted.values() for names in rounds for name in names}))
    before = engine.pages.stats()
    runs: dict[int, list[Any]] = {many: [] for many in wanted}
    for number in range(ROUNDS + 1):
        for many in list(wanted) if number % 2 else list(wanted)[::-1]:
            asked = inside.texts(10_000 + 2 * number + (many == FEW), ROWS, WORDS, pictured=True)
            found = inside.run(engine, [inside.encoded(plain, a) for a in asked], wanted[many][number], TOKENS)
            for i in range(CHECKED):
                alone = serving.alone(plain, wanted[many][number][i], asked[i], TOKENS, serving.library())
                serving.same([found.ids[i]], [alone], f"an answer of {wanted[many][number][i]}")
            runs[many] += [found] if number else []
    after = engine.pages.stats()
    values: dict[str, dict[str, float | int | str]] = {}
    for many, held in runs.items():
        values[f"{many:,} adapters"] = {
            "tokens/s": round(median(one.rate for one in held), 1),
            "requests/s": round(median(ROWS / one.seconds for one in held), 2),
            "different a round": round(median(len(set(names)) for names in wanted[many][1:])),
            "rounds": ROUNDS,
        }
    pairs = zip(runs[serving.COUNT], runs[FEW], strict=True)
    values[f"{serving.COUNT:,} adapters"]["slower by %"] = round(
        100 * (1 - median(a.rate / b.rate for a, b in pairs)), 1
    )
    values["pool"] = {"adapters that it holds": POOL, "threads": THREADS}
    values["pool"] |= {
        name: after[name] - before[name] for name in ("adapter_loads", "adapter_evictions", "adapter_proofs")
    }
    return values
