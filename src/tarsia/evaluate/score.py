"""How likely each of several answers is: the sum of its tokens' log-probabilities, its end of turn included.

``plain`` is the definition: prompt and answer in one pass. ``packed`` is fast: the prompt is read once, and all
of a row's answers follow it as one tree in one sequence: beginnings that answers share are one branch, and a
token sees the prompt and the branch that it grows from.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
    positions = (seen.long().cumsum(1) - 1).clamp(min=0)
    read = model(**inputs, position_ids=positions, use_cache=True, **only_last(model, 1))
    first = read.logits[:, -1].float().log_softmax(-1)  # [rows, vocabulary]
    trees = [tree(tuple(map(tuple, mine))) for mine in answers]
    scores = [first[row, [a[0] for a in mine]].double() for row, mine in enumerate(answers)]
    width = max(len(t.tokens) for t in trees)
    if not width:
        return scores
    visible = _visible(seen, trees)
    mask = torch.zeros(visible.shape, dtype=read.logits.dtype, device=visible.device)
    mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)
    padded = torch.tensor([[*t.tokens, *[0] * (width - len(t.tokens))] for t in trees], device=visible.device)
    depths = torch.tensor([[*t.depths, *[0] * (width - len(t.depths))] for t in trees], device=visible.device)
    logits = model(
        input_ids=padded,
        attention_mask=mask[:, None],
        position_ids=lengths[:, None] + depths,
        past_key_values=read.past_key_values,
        use_cache=True,
    ).logits  # [rows, width, vocabulary]
    for score, t, mine in zip(scores, trees, logits.float().log_softmax(-1), strict=True):
        score.index_add_(0, t.owners.to(score.device), mine[t.nodes, t.targets].double())
    return scores


@dataclass(frozen=True, slots=True)
class Tree:
    """Answers as one tree of their tokens, but for the last ones, which are only predicted.

    ``tokens`` and ``depths`` (from 0) have an entry a node; ``above`` is bool [nodes, nodes], whether a node is, or
    grows from, another. ``nodes``, ``targets`` and ``owners``, int64, have an entry for each token but the first of
    each answer: the node that predicts it, its id, and the answer's number.
    """

    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    above: Tensor
    nodes: Tensor
    targets: Tensor
    owners: Tensor


@lru_cache(maxsize=256)
def tree(answers: tuple[tuple[int, ...], ...]) -> Tree:
    """The tree of these answers."""
    places: dict[tuple[int, ...], int] = {}
    for answer in answers:
        for end in range(1, len(answer)):
            places.setdefault(answer[:end], len(places))
    above = torch.eye(len(places), dtype=torch.bool)
    for start, place in places.items():  # a branch is entered before what grows from it
        if len(start) > 1:
            above[place] |= above[places[start[:-1]]]
    read = [(places[a[:end]], a[end], number) for number, a in enumerate(answers) for end in range(1, len(a))]
    nodes, targets, owners = torch.tensor(read, dtype=torch.int64).reshape(-1, 3).unbind(1)
    return Tree(tuple(start[-1] for start in places), tuple(len(s) - 1 for s in places), above, nodes, targets, owners)


def _visible(seen: Tensor, trees: Sequence[Tree]) -> Tensor:
    """What each node sees, bool [rows, width, P + width]: the prompt, itself and what it grows from."""
    width = max(len(t.tokens) for t in trees)
    own = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    for row, t in enumerate(trees):
        own[row, : len(t.tokens), : len(t.tokens)] = t.above
    return torch.cat([seen[:, None, :].expand(-1, width, -1), own.to(seen.device)], -1)


def plain(model: Any, inputs: Mapping[str, Tensor], answers: Sequence[Ids]) -> Tensor:
    """Float64 [answers]: log-probabilities after one prompt, which is every row of ``inputs``, once an answer.

    Raises AnatomyError where what comes later changes what was predicted before it.
    """
    logits, real, targets = forced(model, inputs, answers)
    first = logits[:, 0].log_softmax(-1)
    if float((first - first[0]).abs().max()) > tolerance(model):
        raise AnatomyError(
            "The model sees the answer before it gives it, so answers can not be scored.",
            given=type(model).__name__,
            do="measure free answers alone",
        )
    found = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").double()
    return -(found * real).sum(1)


def forced(model: Any, inputs: Mapping[str, Tensor], answers: Sequence[Ids]) -> tuple[Tensor, Tensor, Tensor]:
    """What the model predicts where it is made to say ``answers[i]`` (one id or more) after row i of ``inputs``.

    ``inputs`` are padded on the left. Returns logits, float32 [rows, longest answer, vocabulary], that predict each
    token of the answers; which of them are real, bool [rows, longest]; and the tokens' ids, 0 where not.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]  # [rows, P]
    longest = max(map(len, answers))
    tail = torch.tensor([[*a, *[0] * (longest - len(a))] for a in answers], device=ids.device)
    real = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers], device=ids.device)
    longer = dict(inputs) | {"input_ids": torch.cat([ids, tail], 1)}
    longer["attention_mask"] = torch.cat([mask, real.to(mask.dtype)], 1)
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            kind = torch.full_like(tail, _ANSWER_TYPE.get(model.config.model_type, 0), dtype=inputs[key].dtype)
            longer[key] = torch.cat([inputs[key], kind], 1)
    if "cross_attention_mask" in inputs:
        last = inputs["cross_attention_mask"][:, -1:]
        longer["cross_attention_mask"] = torch.cat(
            [inputs["cross_attention_mask"], last.expand(-1, longest, -1, -1)], 1
        )
    if not bool(mask.all()) and _counts(model):
        longer["position_ids"] = (longer["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
    read = model(**longer, use_cache=False, **only_last(model, longest + 1)).logits
    return read[:, -longest - 1 : -1].float(), real.bool(), tail


def _counts(model: Any) -> bool:
    """Whether positions are one number a token, which a row that is padded on the left has to be given."""
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return "mrope_section" not in rope and "position_ids" in inspect.signature(model.forward).parameters


def only_last(model: Any, count: int) -> dict[str, int]:
    """What lets the language head see the last ``count`` positions alone, where the model can."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def tolerance(model: Any) -> float:
    """How far two log-probabilities of the same token may lie apart by rounding."""
    coarser: float = torch.finfo(model.dtype).eps / torch.finfo(torch.float32).eps
    return _TOLERANCE * math.sqrt(coarser)


def room(model: Any, positions: int) -> int:
    """How many rows of ``positions`` logits fit into a batch, at least one."""
    return int(max(1, _LOGITS // (max(1, positions) * model.config.get_text_config().vocab_size)))
