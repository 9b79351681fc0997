"""From logits to tokens: what each answer draws is its own, whoever else is in the batch."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tarsia.core.errors import ServeError
from tarsia.serve.constrain import Constraint
from tarsia.serve.request import Sampling

MOST_LOGPROBS: Final = 20
MOST_STOPS: Final = 16
LONGEST_STOP: Final = 256
"""Characters of one stop string: as many may have to be held back."""
MOST_CHOICES: Final = 128
_WORD: Final = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token and, where they were asked for, its log-probability and those of the likeliest, likeliest first.

    They are the model's own with the adapter that acts: ``log_softmax`` of the logits as they are, before the
    constraint, the bias, the penalties and the temperature, as OpenAI and vLLM tell them.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def derived(seed: int, choice: int) -> int:
    """The seed of an answer's ``choice``-th version, from 0: the first has the request's own.

    A request for one answer with the derived seed gives what that choice was.
    """
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{choice}".encode()).digest()[:8], "little") >> 1


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that follows from the two alone: Philox keyed by ``seed``, at place ``step``.

    Philox is a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """
    generator = np.random.Philox(key=seed & _WORD, counter=step << 64)
    return float(np.random.Generator(generator).random())


class Drawer:
    """One answer that is being written: its seed, how far it is, what it said, what it may say.

    ``vocabulary`` is how many logits there are. ``seed`` is the one that this ``choice`` is drawn with: where the
    request gave none, one was drawn. Raises ServeError (invalid) for a Sampling that makes no sense.
    """

    def __init__(
        self, sampling: Sampling, vocabulary: int, *, choice: int = 0, constraint: Constraint | None = None
    ) -> None:
        check(sampling, vocabulary)
        if (sampling.schema is None) != (constraint is None):
            raise ValueError("a constraint goes with a schema")
        self.sampling = sampling
        self.constraint = constraint
        self.seed = derived(secrets.randbits(62) if sampling.seed is None else sampling.seed, choice)
        self.step = 0
        self.said: Counter[int] = Counter()
        self._penal = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._bias = _spread(sampling.bias)

    @property
    def finished(self) -> bool:
        """Whether the constraint lets nothing follow."""
        return self.constraint is not None and self.constraint.finished

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token, whatever else, and tells nothing of it."""
        return not (
            self.sampling.temperature
            or self._penal
            or self._bias is not None
            or self.constraint is not None
            or self.sampling.logprobs is not None
        )

    def one(self, logits: Tensor) -> Drawn:
        """The next token for ``logits``, float32 [vocabulary] on the CPU, all finite."""
        weights = self._weights(logits)
        token = int(weights.argmax()) if not self.sampling.temperature else self._random(weights)
        if self.sampling.logprobs is None:
            drawn = Drawn(token)
        else:
            drawn = _told(logits, token, self.sampling.logprobs)
        self.take(token)
        return drawn

    def take(self, token: int) -> None:
        """Go on after ``token``, which the answer now has. Raises ServeError where the constraint forbids it."""
        if self.constraint is not None:
            self.constraint.accept(token)
        if self._penal:
            self.said[token] += 1
        self.step += 1

    def _weights(self, logits: Tensor) -> Tensor:
        """Logits with penalties and bias, float64 [vocabulary]; minus infinity where nothing is allowed."""
        weights = logits.double()
        if self._penal and self.said:
            tokens, counts = _spread(self.said) or (None, None)
            assert tokens is not None and counts is not None
            weights[tokens] -= self.sampling.frequency_penalty * counts + self.sampling.presence_penalty
        if self._bias is not None:
            weights[self._bias[0]] += self._bias[1]
        if self.constraint is not None:
            allowed = self.constraint.mask()
            if not allowed.any():
                raise ServeError(
                    "internal", "Nothing is left to say under the schema.", given=f"after {self.step} tokens"
                )
            weights.masked_fill_(~allowed, -math.inf)
        return weights

    def _random(self, weights: Tensor) -> int:
        """By inversion: the first token at which the sum of probabilities passes a number drawn from [0, 1)."""
        scaled = (weights - weights.max()) / self.sampling.temperature
        if 0 < self.sampling.top_k < len(scaled):
            scaled[scaled < scaled.topk(self.sampling.top_k).values[-1]] = -math.inf
        shares = scaled.softmax(-1)
        if self.sampling.top_p < 1:
            shares = torch.where(shares >= least(shares, self.sampling.top_p), shares, 0.0)
        line = shares.cumsum(-1)
        place = int(torch.searchsorted(line, uniform(self.seed, self.step) * line[-1], right=True))
        return place if place < len(line) else int(shares.nonzero()[-1])  # rounding, at the very end


def draw(logits: Tensor, drawers: Sequence[Drawer]) -> list[Drawn | ServeError]:
    """The next token of each answer, from ``logits``, float32 [rows, vocabulary]; row i is ``drawers[i]``'s.

    A row whose logits are not all finite, or whose constraint breaks, is answered by the error that it ends with; its
    drawer stays as it was. What a row draws depends on its own logits, seed and step alone.
    """
    if len(logits) != len(drawers):
        raise ValueError(f"{len(logits)} rows for {len(drawers)} answers")
    if not drawers:
        return []
    low, high = logits.amin(-1), logits.amax(-1)  # a NaN is passed on by both; faster than aminmax
    whole = (low.isfinite() & high.isfinite()).tolist()
    out: list[Drawn | ServeError] = [_broken(drawer) for drawer in drawers]
    plain = [i for i, drawer in enumerate(drawers) if whole[i] and drawer.plain]
    if plain:
        best = (logits if len(plain) == len(drawers) else logits[plain]).argmax(-1).tolist()
        for i, token in zip(plain, best, strict=True):
            drawers[i].take(token)
            out[i] = Drawn(token)
    others = [i for i, drawer in enumerate(drawers) if whole[i] and not drawer.plain]
    if others:
        for i, row in zip(others, logits[others].cpu(), strict=True):
            try:
                out[i] = drawers[i].one(row)
            except ServeError as error:
                out[i] = error
    return out


def least(shares: Tensor, top_p: float) -> Tensor:
    """The smallest probability in the nucleus: of the likeliest tokens that together have ``top_p`` or more.

    Holtzman et al. 2019, arXiv:1904.09751, eq. 2; tokens as likely as the last of them belong to it too.
    """
    # Tokens below this have less than half of what may be left out, all together: no need to sort them.
    some = shares[shares >= (1 - top_p) / len(shares) / 2]
    likeliest = torch.from_numpy(np.sort(some.numpy())).flip(0)  # NumPy sorts by vectors, torch does not
    reached = likeliest.cumsum(-1) >= top_p
    # Rounding may leave the sum of all just under top_p: then all belong.
    return likeliest[reached.byte().argmax()] if bool(reached.any()) else likeliest[-1]


def check(sampling: Sampling, vocabulary: int) -> None:
    """Raises ServeError (invalid) where ``sampling`` asks for something that makes no sense or goes too far."""
    finite = math.isfinite
    bounds: tuple[tuple[str, bool, object, str], ...] = (
        ("max_tokens", sampling.max_tokens is None or sampling.max_tokens >= 1, sampling.max_tokens, "1 or more"),
        ("temperature", finite(sampling.temperature) and sampling.temperature >= 0, sampling.temperature, "0 or more"),
        ("top_p", 0 < sampling.top_p <= 1, sampling.top_p, "more than 0, at most 1"),
        ("top_k", sampling.top_k >= 0, sampling.top_k, "0 (all) or more"),
        ("seed", sampling.seed is None or -(2**63) <= sampling.seed < 2**63, sampling.seed, "64 bits with their sign"),
        ("choices", 1 <= sampling.choices <= MOST_CHOICES, sampling.choices, f"1 to {MOST_CHOICES}"),
        ("logprobs", 0 <= (sampling.logprobs or 0) <= MOST_LOGPROBS, sampling.logprobs, f"0 to {MOST_LOGPROBS}"),
        ("presence_penalty", abs(sampling.presence_penalty) <= 2, sampling.presence_penalty, "-2 to 2"),
        ("frequency_penalty", abs(sampling.frequency_penalty) <= 2, sampling.frequency_penalty, "-2 to 2"),
        ("stop", len(sampling.stop) <= MOST_STOPS, len(sampling.stop), f"at most {MOST_STOPS} strings"),
        ("stop", all(0 < len(s) <= LONGEST_STOP for s in sampling.stop), "", f"1 to {LONGEST_STOP} characters each"),
        ("bias", all(0 <= t < vocabulary for t in sampling.bias), "", f"token ids, 0 to {vocabulary - 1}"),
        ("bias", all(finite(b) and abs(b) <= 100 for b in sampling.bias.values()), "", "-100 to 100"),
        ("ignore_end", not sampling.ignore_end or sampling.schema is None, "a schema too", "one of the two"),
    )
    for name, right, given, allowed in bounds:
        if not right:
            raise ServeError("invalid", f"{name} can not be that.", given=given or None, allowed=allowed)


def _spread(numbers: Mapping[int, float]) -> tuple[Tensor, Tensor] | None:
    """Tokens, int64, and their numbers, float64."""
    if not numbers:
        return None
    return torch.tensor(list(numbers)), torch.tensor(list(numbers.values()), dtype=torch.float64)


def _told(logits: Tensor, token: int, count: int) -> Drawn:
    logprobs = logits.double().log_softmax(-1)
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    top = sorted(zip(tokens.tolist(), values.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    return Drawn(token, float(logprobs[token]), tuple(top))


def _broken(drawer: Drawer) -> ServeError:
    return ServeError(
        "internal",
        "The model gave logits that are not numbers.",
        given=f"after {drawer.step} tokens of the answer",
        do="have the adapter looked at; nothing more is said with it",
    )
