"""A request while it is served, and each of its answers as a row of the line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch

from tarsia.core import lead
from tarsia.serve.blocks import Blocks, chain
from tarsia.serve.front import Read
from tarsia.serve.line import Line, Part
from tarsia.serve.request import Event, Request
from tarsia.serve.sample import Drawn
from tarsia.serve.voice import Voice

if TYPE_CHECKING:
    from tarsia.serve.pages import Page, Ticket

_BASE = b"the base"


class Job:
    """A request with its rows, one for each choice.

    ``ticket`` is what its adapter was asked for with: None as long as it was not, and for the bare base.
    """

    def __init__(self, request: Request, wanted: int, voice: Voice) -> None:
        self.request, self.wanted, self.voice = request, wanted, voice
        self.ticket: Ticket | None = None
        self.id = request.id
        self.read: Read | None = None
        self.begun = False
        self.picture_hits = 0
        self.rows = [Row(self, choice) for choice in range(request.sampling.choices)]

    @property
    def ready(self) -> bool:
        """Whether its adapter is there."""
        return self.request.adapter is None or (self.ticket is not None and self.ticket.page is not None)

    @property
    def page(self) -> Page | None:
        """Its adapter; None for the base."""
        return None if self.ticket is None else self.ticket.page

    def started(self, cached: int) -> Event:
        """That it has begun, with which version of which adapter."""
        page, adapter = self.page, None
        if page is not None:
            adapter = {"name": page.name, "version": page.version, "hash": page.digest.hex(), "source": page.source}
        data: dict[str, Any] = {
            "adapter": adapter,
            "prompt_tokens": len(self.request.prompt.ids),
            "cached_tokens": cached,
        }
        data["picture_hits"] = self.picture_hits
        return Event(self.id, "started", data)


class Row:
    """One answer: what of its prompt is read, what it has said, and which blocks hold its keys and values."""

    def __init__(self, job: Job, choice: int) -> None:
        self.job, self.choice = job, choice
        self.tenant, self.weight = job.request.tenant, job.request.weight
        self.drawer = job.voice.drawer(job.request.sampling, choice)
        self._telling = job.voice.telling(job.request.sampling, self.drawer)
        self.blocks: list[int] = []
        self.said: list[int] = []
        self.done = 0
        self.cached = 0
        self.over = False
        self.postponed = False
        """Whether its blocks were taken for another's, once or more."""
        self._keys: list[bytes] = []
        self._known = 0
        self._paid = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.job.request.prompt.ids)

    @property
    def ahead(self) -> int:
        """Positions of what its adapter lays before every prompt."""
        return 0 if self.job.page is None else lead.length(self.job.page.lead)

    @property
    def most(self) -> int:
        """Tokens that it may come to."""
        return self.ahead + self.length + self.job.wanted

    @property
    def reach(self) -> int:
        """Positions that it must have room for as soon as it begins: all that it has, and one token."""
        return self.ahead + self.length + max(1, len(self.said))

    @property
    def unread(self) -> int:
        """Tokens that are not read yet: of the prompt, and of what it had said when its blocks were taken."""
        return max(0, self.ahead + self.length + max(0, len(self.said) - 1) - self.done)

    @property
    def next(self) -> int:
        """Tokens of those that one part may have: it is of the prompt, or of what was said."""
        prompt = self.ahead + self.length - self.done
        return prompt if prompt > 0 else self.unread

    @property
    def writes(self) -> bool:
        """Whether all is read but the last that it said."""
        return not self.unread

    @property
    def whole(self) -> bool:
        """Whether its prompt must be read in one pass: where tokens attend to later ones."""
        return self.job.read is not None and self.job.read.shape is not None

    @property
    def may_begin(self) -> bool:
        """Whether what it has in common with the first of its request's answers is there to be shared."""
        first = self.job.rows[0]
        return self is first or first.over or (first.done > 0 and first.writes)

    def begin(self, blocks: Blocks, line: Line) -> None:
        """Take blocks for what there is; those of a prompt, or its beginning, that was read before are found."""
        read, page = self._read, self.job.page
        if read.shape is None:
            ids = [*self.job.request.prompt.ids, *self.said[:-1]]
            self._keys = self._chain(ids, blocks)
            # a prompt's last token is read whatever was read before: for what follows it
            found = blocks.find(self._keys[: (self.ahead + len(ids) - (not self.said)) // blocks.size])
            if len(found) * blocks.size < self.ahead:
                blocks.give(found)
                found = []
            self.blocks = found
        self._known = len(self.blocks)
        self.done = len(self.blocks) * blocks.size
        taken = blocks.take(blocks.needed(self.reach) - len(self.blocks))
        if taken is None:
            raise AssertionError("it was asked for before whether there are as many blocks")
        self.blocks += taken
        if page is not None and self.ahead and not self.done:
            line.lead(self.blocks, page.lead)
            self.done = self.ahead
        if not self.postponed:
            self.cached = max(0, self.done - self.ahead)
            self._paid = self.done

    def grow(self, blocks: Blocks) -> bool:
        """Have the block of its next token; False where there is none."""
        missing = blocks.needed(self.done + 1) - len(self.blocks)
        taken = blocks.take(missing) if missing > 0 else []
        self.blocks += taken or []
        return taken is not None

    def part(self, count: int) -> Part:
        """The next ``count`` tokens that a pass reads: of the prompt, or of what was said."""
        read, page = self._read, self.job.page
        start = self.done - self.ahead
        first = start - self.length
        if first >= 0:
            at = torch.arange(first, first + count, device=read.positions.device) + read.next + self.ahead
            at = at.expand(len(read.positions), -1)
            return Part(page, self.blocks, self.done, self.said[first:][:count], None, at, wanted=self.writes)
        own = slice(start, start + count)
        places, deep = read.deeper(own)
        return Part(
            page=page,
            blocks=self.blocks,
            before=self.done,
            ids=self.job.request.prompt.ids[own],
            embeds=read.embeds[own],
            positions=read.positions[:, own] + self.ahead,
            shape=read.shape,
            places=places,
            deep=deep,
            wanted=own.stop == self.length and not self.said,
        )

    def advance(self, count: int, blocks: Blocks) -> int:
        """``count`` more tokens are read: how many of them for the first time. Full blocks can be found by others."""
        self.done += count
        full = min(self.done // blocks.size, len(self._keys))
        for i in range(self._known, full):
            blocks.know(self.blocks[i], self._keys[i])
        self._known = max(full, self._known)
        new = max(0, self.done - self._paid)
        self._paid += new
        return new

    def say(self, drawn: Drawn) -> list[Event]:
        """Take the next token: what is told of it."""
        self.said.append(drawn.token)
        told = self._telling.add(drawn.token)
        self.over = told.over or len(self.said) >= self.job.wanted
        text = told.text + (self._telling.flush() if self.over and not told.over else "")
        data: dict[str, Any] = {
            "choice": self.choice,
            "text": text,
            "ids": [drawn.token],
            "logprobs": self._likely(drawn),
        }
        events = [Event(self.job.id, "text", data)]
        if self.over:
            reason = "stop" if told.over else "length"
            end = {"choice": self.choice, "reason": reason, "completion_tokens": len(self.said)}
            events.append(Event(self.job.id, "done", end))
        return events

    def leave(self, blocks: Blocks) -> None:
        """Give the blocks back, with what can be found in them of the answer too."""
        if self._keys and self.said and not self.unread:
            keys = self._chain([*self.job.request.prompt.ids, *self.said[:-1]], blocks)
            for block, key in zip(self.blocks, keys[: self.done // blocks.size], strict=False):
                blocks.know(block, key)
        blocks.give(self.blocks)
        self.blocks = []

    def _chain(self, ids: Sequence[int], blocks: Blocks) -> list[bytes]:
        """The keys of the blocks of the prompt, with more after it or not.

        A tenant finds what it has read itself, nobody else's: the time of an answer would tell of others' prompts.
        """
        page, prompt = self.job.page, self.job.request.prompt
        root = sha256(self.tenant.encode()).digest() + (_BASE if page is None else page.digest)
        owners = [*self._read.pictures.tolist(), *[-1] * (len(ids) - len(prompt.ids))]
        return chain(root, ids, owners, [picture.key for picture in prompt.pictures], blocks.size, self.ahead)

    def _likely(self, drawn: Drawn) -> Sequence[Mapping[str, Any]] | None:
        if self.job.request.sampling.logprobs is None or drawn.logprob is None:
            return None
        spell = self.job.voice.spell
        top = [{**spell(token), "logprob": value} for token, value in drawn.top]
        return [{**spell(drawn.token), "logprob": drawn.logprob, "top": top}]

    @property
    def _read(self) -> Read:
        read = self.job.read
        if read is None:
            raise AssertionError("a row is begun only once its prompt is read")
        return read
