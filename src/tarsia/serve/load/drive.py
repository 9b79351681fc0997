"""A load that ends: so many requests and so many seconds at most, at a rate or by so many askers who wait in turn."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from tarsia.core.errors import ConfigError
from tarsia.serve.load.asked import Question
from tarsia.serve.load.client import Answered, Client

MOST: Final = {"requests": 100_000, "seconds": 3600, "concurrency": 512, "rate": 1000, "max_tokens": 4096}
"""What no load goes beyond."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much, and how.

    ``rate``: so many requests a second, at random moments, whether or not earlier ones are answered (never more than
    ``MOST["concurrency"]`` at once); None: ``concurrency`` askers, each of whom asks again when answered.
    After ``seconds`` nothing more is asked; what is not answered ``grace`` seconds later is given up, as "unanswered".
    """

    requests: int = 200
    seconds: float = 60.0
    concurrency: int = 8
    rate: float | None = None
    max_tokens: int = 32
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                raise ConfigError(f"A load is bounded: {name} is not.", given=value, allowed=f"above 0, at most {most}")

    @property
    def at_once(self) -> int:
        """Requests that can be under way at once."""
        return self.concurrency if self.rate is None else MOST["concurrency"]


class Drive:
    """One load: what was answered so far, and what is under way."""

    def __init__(self, client: Client, questions: Iterator[Question], limits: Limits) -> None:
        self.client, self.questions, self.limits = client, questions, limits
        self.answered: list[Answered] = []
        self.running: dict[asyncio.Task[None], tuple[Question, float]] = {}
        self.asked = 0
        self.broken: BaseException | None = None

    async def run(self, show: Callable[[int, int], None] = lambda answered, running: None) -> list[Answered]:
        """Do it. ``show`` is told how many are answered and how many under way. Given in the order of asking."""
        self.client.began += self.client.now()  # the clock starts here
        over = asyncio.get_running_loop().time() + self.limits.seconds
        arrive = self._one_by_one(over) if self.limits.rate is None else self._by_rate(over, self.limits.rate)
        telling = asyncio.create_task(self._tell(show))
        try:
            await arrive
            if self.running:
                await asyncio.wait(self.running, timeout=self.limits.grace)
        finally:
            telling.cancel()
            await self._give_up()
        if self.broken is not None:  # a fault of ours: what fails between us and the server is told in its answer
            raise self.broken
        return sorted(self.answered, key=lambda one: one.question.number)

    async def _tell(self, show: Callable[[int, int], None]) -> None:
        while True:
            show(len(self.answered), len(self.running))
            await asyncio.sleep(0.5)

    async def _one_by_one(self, over: float) -> None:
        """Somebody asks as soon as somebody else is answered."""
        clock = asyncio.get_running_loop().time
        while self.asked < self.limits.requests and clock() < over and self.broken is None:
            while len(self.running) < self.limits.concurrency and self.asked < self.limits.requests:
                self._ask()
            await asyncio.wait(self.running, timeout=over - clock(), return_when=asyncio.FIRST_COMPLETED)

    async def _by_rate(self, over: float, rate: float) -> None:
        """Requests come as in a Poisson process."""
        drawn, clock = random.Random(rate), asyncio.get_running_loop().time
        due = clock()
        while self.asked < self.limits.requests and due < over and self.broken is None:
            await asyncio.sleep(max(0.0, due - clock()))
            while len(self.running) >= self.limits.at_once:
                await asyncio.wait(self.running, return_when=asyncio.FIRST_COMPLETED, timeout=max(0.0, over - clock()))
                if clock() >= over:
                    return
            self._ask()
            due += drawn.expovariate(rate)

    def _ask(self) -> None:
        question = next(self.questions)
        self.asked += 1
        task = asyncio.create_task(self._answer(question))
        self.running[task] = (question, self.client.now())
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self.running.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            self.broken = task.exception()

    async def _answer(self, question: Question) -> None:
        self.answered.append(await self.client.ask(question))

    async def _give_up(self) -> None:
        left = dict(self.running)
        for task in left:
            task.cancel()
        outs = await asyncio.gather(*left, return_exceptions=True)
        for (question, began), out in zip(left.values(), outs, strict=True):
            if isinstance(out, asyncio.CancelledError):
                told = f"given up {self.limits.grace:g} s after the load's end"
                self.answered.append(Answered(question, began, self.client.now(), error="unanswered", told=told))


@dataclass(frozen=True, slots=True)
class Wrong:
    """An answer under load that is not what the same question gets when nothing else is asked."""

    under_load: Answered
    alone: Answered


async def check(
    client: Client, answered: list[Answered], limits: Limits, show: Callable[[int, int], None] = lambda done, of: None
) -> tuple[int, list[Wrong]]:
    """Ask each different question that was answered once more, alone, and compare all its answers, letter for letter.

    At most as long as the load itself, beginning with the most different adapters. Returns how many were compared.
    """
    clock = asyncio.get_running_loop().time
    over = clock() + limits.seconds
    by: dict[tuple[str, int | None, str], list[Answered]] = {}
    for one in answered:
        if not one.error:
            by.setdefault(one.question.same, []).append(one)
    turn: dict[str, int] = {}
    order = []
    for same, held in by.items():
        turn[same[0]] = turn.get(same[0], 0) + 1
        order.append((turn[same[0]], held))
    wrong, compared = [], 0
    for i, (_, held) in enumerate(sorted(order, key=lambda pair: pair[0])):
        if clock() >= over:
            break
        show(i, len(order))
        alone = await client.ask(replace(held[0].question))
        compared += 1
        wrong += [Wrong(one, alone) for one in held if (one.text, one.reason) != (alone.text, alone.reason)]
    return compared, wrong
