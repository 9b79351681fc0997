"""The engine's pass held to the model's own, on this base, before anything is served."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tarsia.adapter import Host
from tarsia.adapter.proof import TOLERANCE
from tarsia.core.errors import ServeError
from tarsia.data import PICTURE, Message, Picture, Sample
from tarsia.evaluate.chat import Chat
from tarsia.serve.front import Front, Read
from tarsia.serve.line import Line, Part
from tarsia.serve.read import Reader
from tarsia.serve.request import Prompt

_TEXT: Final = 23  # tokens of a row without pictures
_SIZES: Final = ((64, 48), (40, 72))


@dataclass(frozen=True, eq=False)
class Trial:
    """A row, and the same as the model's own inputs."""

    prompt: Prompt
    inputs: Mapping[str, Tensor]


def texts(host: Host) -> list[Trial]:
    """Rows of arbitrary ids, without a picture."""
    width = int(host.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    apart = {getattr(host.model.config, name, None) for name in ("image_token_id", "video_token_id")}
    known = [token for token in range(width) if token not in apart]
    rows = []
    for row in range(2):
        draw = np.random.Generator(np.random.Philox(key=row))
        ids = tuple(int(known[i]) for i in draw.integers(0, len(known), _TEXT + 6 * row))
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        rows.append(Trial(Prompt(ids), inputs))
    return rows


def seen(host: Host, reader: Reader) -> list[Trial]:
    """A row with one picture and a row with two, as people would ask."""
    chat, files, rows = Chat(host), _pictures(), []
    for count in (1, 2):
        parts = [PICTURE for _ in range(count)]
        sample = Sample(
            (Message("user", (*parts, "What is this?")),),
            tuple(Picture(file, f"picture {i}", "the trial", 0) for i, file in enumerate(files[:count])),
            "the trial",
            0,
        )
        content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": "What is this?"}]
        prompt = reader.read([{"role": "user", "content": content}], files[:count])
        rows.append(Trial(prompt, chat.inputs([sample], [chat.prompt(sample)])))
    return rows


def _pictures() -> list[bytes]:
    """Two pictures of other sizes and other contents, as files."""
    files = []
    for number, (width, height) in enumerate(_SIZES):
        draw = np.random.Generator(np.random.Philox(key=number))
        made = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(made, "PNG")
        files.append(made.getvalue())
    return files


@torch.inference_mode()
def tried(host: Host, front: Front, line: Line, trials: Sequence[Trial]) -> float:
    """Read the rows together in two passes, write one more token of each, and compare with the model's own logits.

    Returns the largest difference as a share of the largest logit. Raises ServeError where it is beyond what two
    orders of the same sums can make.
    """
    dtype = str(host.model.get_input_embeddings().weight.dtype).removeprefix("torch.")  # type: ignore[operator]
    room = max(len(trial.prompt.ids) for trial in trials) // line.size + 2
    if room > line.count:
        raise ServeError(
            "invalid",
            "The memory for keys and values is too small to try the base in.",
            given=f"{line.bytes:,} bytes",
            allowed=f"at least {-(-line.bytes * room // line.count):,}",
            do="give it more (--cache-bytes)",
        )
    worst = 0.0
    for at in range(0, len(trials), max(1, line.count // room)):
        some = trials[at : at + max(1, line.count // room)]
        reads = [front.read(trial.prompt, None) for trial in some]
        rows = [range(i * room, (i + 1) * room) for i in range(len(some))]
        cuts = [0 if read.shape is not None else 1 + i % (len(read.embeds) - 2) for i, read in enumerate(reads)]
        first = [part(t.prompt, r, b, 0, cut) for t, r, b, cut in zip(some, reads, rows, cuts, strict=True) if cut]
        if first:
            line.run(first)
        rest = [part(t.prompt, r, b, cut, None) for t, r, b, cut in zip(some, reads, rows, cuts, strict=True)]
        read_ = line.run(rest)
        said = read_.argmax(-1).tolist()
        written = line.run([next_(t, r, b, s) for t, r, b, s in zip(some, reads, rows, said, strict=True)])
        for i, trial in enumerate(some):
            with line.board.alone(None):
                own = _own(host, trial, said[i])
            peak = max(float(own.abs().max()), 1e-30)
            off = (torch.stack([read_[i], written[i]]) - own[-2:]).abs().max()
            worst = max(worst, float(off) / peak)
    if not worst <= TOLERANCE.get(dtype, 0.0):
        raise ServeError(
            "invalid",
            "This base answers otherwise here than it does by itself, so it is not served.",
            given=f"logits {worst:.2g} of the largest off, {type(host.model).__name__} in {dtype}",
            allowed=f"{TOLERANCE.get(dtype, 0.0):g}",
            do="serve another base, or tell us of this one",
        )
    return worst


def part(prompt: Prompt, read: Read, blocks: Sequence[int], start: int, stop: int | None) -> Part:
    """The tokens of a row from ``start`` on, up to ``stop`` (None: its end)."""
    own = slice(start, len(prompt.ids) if stop is None else stop)
    places, deep = read.deeper(own)
    return Part(
        page=None,
        blocks=blocks,
        before=start,
        ids=prompt.ids[own],
        embeds=read.embeds[own],
        positions=read.positions[:, own],
        shape=read.shape,
        places=places,
        deep=deep,
        wanted=stop is None,
    )


def next_(trial: Trial, read: Read, blocks: Sequence[int], token: int) -> Part:
    """One token after a row."""
    at = torch.full((len(read.positions), 1), read.next, device=read.positions.device)
    return Part(None, blocks, len(trial.prompt.ids), [token], None, at)


def _own(host: Host, trial: Trial, token: int) -> Tensor:
    """The model's logits [tokens + 1, vocabulary] for the row and one token after it."""
    model: Any = host.model
    more = {"input_ids": token, "attention_mask": 1}
    along = trial.inputs["input_ids"].shape
    call = {}
    for name, value in trial.inputs.items():
        value = value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        if value.shape[:2] == along and value.ndim == 2 and not value.is_floating_point():
            value = torch.cat([value, value.new_full((1, 1), more.get(name, _plain(host)))], 1)
        call[name] = value
    logits: Tensor = model(**call, use_cache=False).logits
    return logits[0].float()


def _plain(host: Host) -> int:
    """The type of a token that is no picture's and sees nothing after itself."""
    return next((site.causal for site in host.sites if site.causal is not None), 0)
