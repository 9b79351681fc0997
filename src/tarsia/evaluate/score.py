"""How likely each of several answers is: the sum of its tokens' log-probabilities, its end of turn included.

``plain`` is the definition: prompt and answer in one pass. ``packed`` is fast: the prompt is read once, and all
of a row's answers follow it side by side in one sequence, each seeing the prompt and itself alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from tarsia.core.errors import AnatomyError

Ids = Sequence[int]

_LOGITS: Final = 2**25  # logits held at a time
_TOLERANCE: Final = 1e-3  # of a log-probability in float32
# What marks an answer's tokens among token types, where it is not 0: in PaliGemma 0 is the prefix, all of which
# sees all of itself.
_ANSWER_TYPE: Final = {"paligemma": 1}


def obstacle(model: Any) -> str | None:
    """Why the answers can not be packed for this model, from its configuration; None where they can."""
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    parameters = inspect.signature(model.forward).parameters
    if text._attn_implementation not in ("eager", "sdpa"):
        return f"attention by {text._attn_implementation} takes no mask for each token"
    if "position_ids" not in parameters:
        return "the model takes no positions"
    if "mrope_section" in rope:
        return "positions have several dimensions"
    if getattr(text, "cross_attention_layers", None):
        return "pictures are attended to across"
    if getattr(text, "sliding_window", None) or set(getattr(text, "layer_types", None) or ()) - {"full_attention"}:
        return "some layers see a window"
    if {"token_type_ids", "mm_token_type_ids"} & set(parameters):
        return "the mask depends on token types"
    return None


def packed(model: Any, inputs: Mapping[str, Tensor], answers: Sequence[Sequence[Ids]]) -> list[Tensor]:
    """For each row of ``inputs`` (padded on the left), float64 [answers of that row]: log-probabilities."""
    seen = inputs["attention_mask"].bool()  # [rows, P]
    lengths = seen.sum(1)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    positions = (seen.long().cumsum(1) - 1).clamp(min=0)
    read = model(**inputs, position_ids=positions, use_cache=True, **keep)
    first = read.logits[:, -1].float().log_softmax(-1)  # [rows, vocabulary]
    ids, owner, step, target = _side_by_side(answers, inputs["input_ids"].device)
    scores = [torch.stack([first[row, a[0]].double() for a in mine]) for row, mine in enumerate(answers)]
    if not ids.shape[1]:
        return scores
    visible = _visible(seen, owner)
    mask = torch.zeros(visible.shape, dtype=read.logits.dtype, device=visible.device)
    mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)
    logits = model(
        input_ids=ids,
        attention_mask=mask[:, None],
        position_ids=lengths[:, None] + step,
        past_key_values=read.past_key_values,
        use_cache=True,
    ).logits  # [rows, S, vocabulary]
    found = -F.cross_entropy(logits.float().transpose(1, 2), target, reduction="none").double()
    real = owner >= 0
    for row, score in enumerate(scores):
        score.index_add_(0, owner[row][real[row]], found[row][real[row]])
    return scores


def _side_by_side(answers: Sequence[Sequence[Ids]], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All but the last token of each row's answers in one sequence: ids, number of the answer (-1: padding),
    place in the answer, and the token to predict; each int64 [rows, S]."""
    table = [
        [(a[t], number, t, a[t + 1]) for number, a in enumerate(mine) for t in range(len(a) - 1)] for mine in answers
    ]
    width = max(map(len, table))
    padded = [row + [(0, -1, 0, 0)] * (width - len(row)) for row in table]
    whole = torch.tensor(padded, dtype=torch.int64, device=device).reshape(len(table), width, 4)
    ids, owner, step, target = whole.unbind(-1)
    return ids, owner, step, target


def _visible(seen: Tensor, owner: Tensor) -> Tensor:
    """What each token of the answers sees, bool [rows, S, P + S]: the prompt, and its own answer up to itself."""
    own = (owner[:, :, None] == owner[:, None, :]).tril()
    return torch.cat([seen[:, None, :].expand(-1, owner.shape[1], -1), own], -1)


def plain(model: Any, inputs: Mapping[str, Tensor], answers: Sequence[Ids]) -> Tensor:
    """Float64 [answers]: log-probabilities after one prompt, which is every row of ``inputs``, once an answer.

    Raises AnatomyError where what comes later changes what was predicted before it.
    """
    ids = inputs["input_ids"]  # [answers, P], no padding
    longest = max(map(len, answers))
    tail = torch.tensor([[*a, *[0] * (longest - len(a))] for a in answers], device=ids.device)
    real = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers], device=ids.device)
    longer = dict(inputs) | {"input_ids": torch.cat([ids, tail], 1)}
    longer["attention_mask"] = torch.cat([inputs["attention_mask"], real.to(inputs["attention_mask"].dtype)], 1)
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            kind = torch.full_like(tail, _ANSWER_TYPE.get(model.config.model_type, 0), dtype=inputs[key].dtype)
            longer[key] = torch.cat([inputs[key], kind], 1)
    if "cross_attention_mask" in inputs:
        last = inputs["cross_attention_mask"][:, -1:]
        longer["cross_attention_mask"] = torch.cat(
            [inputs["cross_attention_mask"], last.expand(-1, longest, -1, -1)], 1
        )
    logits = model(**longer, use_cache=False).logits[:, ids.shape[1] - 1 : -1].float()  # [answers, longest, vocabulary]
    first = logits[:, 0].log_softmax(-1)
    if float((first - first[0]).abs().max()) > tolerance(model):
        raise AnatomyError(
            "The model sees the answer before it gives it, so answers can not be scored.",
            given=type(model).__name__,
            do="measure free answers alone",
        )
    found = F.cross_entropy(logits.transpose(1, 2), tail, reduction="none").double()
    return -(found * real).sum(1)


def tolerance(model: Any) -> float:
    """How far two log-probabilities of the same token may lie apart by rounding."""
    coarser: float = torch.finfo(model.dtype).eps / torch.finfo(torch.float32).eps
    return _TOLERANCE * math.sqrt(coarser)


def room(model: Any, positions: int) -> int:
    """How many rows of ``positions`` logits fit into a batch, at least one."""
    return int(max(1, _LOGITS // (positions * model.config.get_text_config().vocab_size)))
