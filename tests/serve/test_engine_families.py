"""Every row of a mixed batch is what it is alone, in every family that is served."""

from __future__ import annotations

import pytest
import torch
from served import ADAPTERS, SERVED, asked, engine, ids, likely, served

from tarsia.serve.engine import run

TOLERANCE = 1e-5
QUICK = ("llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "gemma3", "internvl")
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SERVED]


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_all_kinds_in_one_batch_equal_the_plain_model_with_their_adapter_alone(name: str) -> None:
    one = served(name)
    pages = one.pages()
    serving = engine(pages)
    asks = [
        (adapter, row, asked(prompt, adapter, 64 if adapter in ("high", "prompt") else 8, logprobs=20))
        for row, prompt in enumerate(one.prompts)
        for adapter in (None, *ADAPTERS)
    ]
    found = run(serving, [request for *_, request in asks])
    for adapter, row, request in asks:
        events = found[request.id]
        assert events[-1].kind == "done", events[-1]
        said = ids(events)
        own = one.logits(adapter, row, said)
        expected = own.clone()
        expected[:, list(request.sampling.bias)] = -torch.inf
        assert expected.argmax(-1).tolist() == said, (adapter, row)
        exact = own.log_softmax(-1)
        for place, told in enumerate(likely(events)):
            off = max(abs(float(exact[place, token]) - value) for token, value in told.items())
            assert off <= TOLERANCE * max(1.0, float(own[place].abs().max())), (adapter, row, place, off)
    assert serving.blocks.available == serving.blocks.count
    assert not any(pages.used.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_move_the_logits_so_that_another_row_s_adapter_would_show(name: str) -> None:
    one = served(name)
    for row in range(len(one.prompts)):
        base = one.logits(None, row, [9])
        for adapter in ADAPTERS:
            if adapter == "projector" and not one.prompts[row].pictures:
                continue
            assert float((one.logits(adapter, row, [9]) - base).abs().max()) >= 0.1, (adapter, row)
