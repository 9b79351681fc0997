"""How much at once and how often: token buckets by key, seats by key, by tenant and overall."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tarsia.core.errors import TarsiaError
from tarsia.serve.http.errors import AGAIN, Refusal
from tarsia.serve.http.keys import Key
from tarsia.serve.http.settings import Limits

Clock = Callable[[], float]


class Bucket:
    """Holds what may be spent: ``minute`` a minute, at most that much saved up; debts are paid first."""

    def __init__(self, minute: int, clock: Clock = time.monotonic) -> None:
        self.minute, self._clock = minute, clock
        self._level, self._at = float(minute), clock()

    @property
    def level(self) -> float:
        """What it holds now; below 0 where more was spent than there was."""
        now = self._clock()
        self._level = min(float(self.minute), self._level + (now - self._at) * self.minute / 60)
        self._at = now
        return self._level

    def take(self, amount: float) -> float:
        """Spend it and return 0, or spend nothing and return the seconds until it could be."""
        lacking = amount - self.level
        if lacking <= 0:
            self._level -= amount
            return 0.0
        return lacking * 60 / self.minute

    def charge(self, amount: float) -> None:
        """Spend it whether it is there or not; what is below 0 comes back."""
        self._level = min(float(self.minute), self.level - amount)


@dataclass(slots=True)
class Account:
    """What one key has left."""

    requests: Bucket | None
    tokens: Bucket | None


@dataclass(eq=False, slots=True)
class Seat:
    """A request's place: tokens are set aside for it, and given back where it did not need them."""

    admission: Admission
    key: Key
    aside: int
    spent: int = 0
    left: bool = False

    def spend(self, tokens: int) -> None:
        """Tokens that were read or said for it."""
        self.spent += tokens

    def leave(self) -> None:
        """Make room for the next; to leave twice is the same."""
        if not self.left:
            self.left = True
            self.admission.release(self)


@dataclass(eq=False)
class Admission:
    """Lets requests in."""

    limits: Limits
    clock: Clock = time.monotonic
    _accounts: dict[str, Account] = field(default_factory=dict)
    _by_key: Counter[str] = field(default_factory=Counter)
    _by_tenant: Counter[str] = field(default_factory=Counter)

    @property
    def seated(self) -> int:
        """Requests that wait or run."""
        return self._by_key.total()

    def _account(self, key: Key) -> Account:
        if key.name not in self._accounts:
            self._accounts[key.name] = Account(
                *(
                    None if minute is None else Bucket(minute, self.clock)
                    for minute in (key.requests_per_minute, key.tokens_per_minute)
                )
            )
        return self._accounts[key.name]

    def count(self, key: Key) -> None:
        """One more request of a key, whatever it is. Raises Refusal (429) where it has asked too often."""
        requests = self._account(key).requests
        if requests is not None and (wait := requests.take(1)):
            raise _often("requests", requests.minute, wait)

    def most(self, key: Key, choices: int) -> int:
        """How many tokens each of the answers may have where nothing is said."""
        tokens = self._account(key).tokens
        return self.limits.tokens if tokens is None else max(1, min(self.limits.tokens, tokens.minute // choices))

    def seat(self, key: Key, tokens: int) -> Seat:
        """A place for a request whose answers may be ``tokens`` long together. Raises Refusal (429)."""
        for taken, most, whose in (
            (self.seated, self.limits.queue, "the server's"),
            (self._by_tenant[key.tenant], self.limits.tenant_queue, "the tenant's"),
            (self._by_key[key.name], key.at_once, "the key's"),
        ):
            if most is not None and taken >= most:
                error = TarsiaError(f"All of {whose} places are taken.", given=taken, allowed=most, do="come again")
                raise Refusal(429, error, code="queue_full", again=AGAIN)
        bucket = self._account(key).tokens
        if bucket is not None:
            if tokens > bucket.minute:
                raise Refusal.invalid(
                    "The answer may be longer than what this key may spend in a minute.",
                    "max_tokens",
                    given=tokens,
                    allowed=bucket.minute,
                    do="ask for less by max_tokens or n",
                )
            if wait := bucket.take(tokens):
                raise _often("tokens", bucket.minute, wait)
        self._by_key[key.name] += 1
        self._by_tenant[key.tenant] += 1
        return Seat(self, key, tokens if bucket is not None else 0)

    def release(self, seat: Seat) -> None:
        """What a seat's end comes to: see ``Seat.leave``."""
        for counter, name in ((self._by_key, seat.key.name), (self._by_tenant, seat.key.tenant)):
            counter[name] -= 1
            if not counter[name]:
                del counter[name]
        bucket = self._account(seat.key).tokens
        if bucket is not None:
            bucket.charge(seat.spent - seat.aside)


def _often(what: str, minute: int, wait: float) -> Refusal:
    error = TarsiaError(
        f"This key has spent its {what} of this minute.", allowed=f"{minute} a minute", do=f"wait {wait:.1f} s"
    )
    return Refusal(429, error, code="rate_limit_exceeded", again=wait)
