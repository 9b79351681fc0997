"""From messages and files of pictures to prompts: a row's ids, and each picture as the model is given it."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from tarsia.adapter import Host
from tarsia.core.errors import DataError, ServeError
from tarsia.data import PICTURE, Message, Placeholder, Sample
from tarsia.data import Picture as Shown
from tarsia.evaluate.chat import Chat
from tarsia.serve import shown
from tarsia.serve.bounds import BOUNDS, PICTURES, Bounds
from tarsia.serve.request import Picture, Prompt

_ROLES: Final = ("system", "user", "assistant")
_TYPES: Final = "token_type_ids"
_OPEN, _CLOSE = "\ue0f1", "\ue0f2"  # private use: no template and no processor looks for them
_TRIAL: Final = ((64, 48), (40, 80), (56, 56))  # width and height of the pictures that a base is tried with
_HEAD: Final = "Row 0 of the request: "


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may hold. ``tokens`` of a prompt: None, as many as the model has positions. ``bytes`` of its
    pictures' inputs, all together; ``kept`` is how many of these are kept for when the same file comes again."""

    pictures: int = PICTURES
    tokens: int | None = None
    bytes: int = 1 << 30
    kept: int = 1 << 28
    bounds: Bounds = BOUNDS


@dataclass(frozen=True, eq=False)
class Made:
    """Pictures that the model is given together, one as a rule: what is written for each, and how many of the tokens
    that stand for pictures that is, all together."""

    picture: Picture
    written: tuple[str, ...]
    places: int

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self.picture.inputs.values())


class Reader:
    """Makes prompts for ``host``. May be called from several threads.

    A picture's inputs are the processor's for it alone, so that they follow from the file and are made once. Its ids
    are what the processor writes for it, put into the row's text, which the tokenizer then cuts. That this is what
    the processor makes of a whole row is tried out at the beginning, on rows with 0 to 3 pictures of several sizes;
    where a family shows several pictures otherwise than one, they are one ``Picture`` of the prompt together. Raises
    ServeError for a base whose rows can not be made so, and as ``Chat`` does.
    """

    def __init__(self, host: Host, limits: Limits | None = None) -> None:
        self._chat = Chat(host)
        self._limits = limits or Limits()
        self._resolution = host.resolution
        text: Any = host.model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.tokens = self._limits.tokens or int(getattr(text, "max_position_embeddings", None) or 1 << 30)
        self._processor: Any = host.processor
        self._image = int(host.model.config.image_token_id)  # type: ignore[union-attr, arg-type]
        self._tokenizer = _plain(self._chat.tokenizer.backend_tokenizer)
        self._longest = max(map(len, self._tokenizer.get_vocab()))
        self._own = threading.local()
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, Made] = OrderedDict()
        self._held = self.hits = self.misses = 0
        self._types: dict[bool, tuple[str, ...]] = {}
        self._together = False
        self._try(host.name)

    @property
    def held(self) -> int:
        """Bytes of all pictures' inputs that are kept."""
        return self._held

    def __call__(self, messages: Sequence[Mapping[str, Any]], pictures: Sequence[bytes]) -> Prompt:
        """As ``read``."""
        return self.read(messages, pictures)

    def read(self, messages: Sequence[Mapping[str, Any]], pictures: Sequence[bytes]) -> Prompt:
        """The prompt of a conversation up to where the assistant begins to speak.

        ``messages`` are ``{"role", "content"}``, the content a text or parts ``{"type": "text", "text"}`` and
        ``{"type": "image"}``; ``pictures`` are the images' files in order. Raises ServeError: too_long, with how many
        tokens there are and may be, or invalid.
        """
        sample = _sample(messages, len(pictures))
        if len(pictures) > self._limits.pictures:
            raise ServeError(
                "invalid", "There are too many pictures.", given=len(pictures), allowed=self._limits.pictures
            )
        text = self._text(sample)
        groups = [[i] for i in range(len(pictures))] if self._apart(len(pictures)) else [[*range(len(pictures))]]
        found = self._all(pictures, groups)
        ids = self._ids(text, found)
        if (given := ids.count(self._image)) != (places := sum(made.places for made in found)):
            raise ServeError(
                "internal", "The prompt and its pictures differ.", given=f"{given} places, pictures that fill {places}"
            )
        if len(ids) > self.tokens:
            raise self._too_long(len(ids), places)
        return Prompt(ids, tuple(made.picture for made in found), self._marks(ids, bool(pictures)))

    def _all(self, pictures: Sequence[bytes], groups: Sequence[Sequence[int]]) -> list[Made]:
        """All that a request shows, each made once: as far as that is no more than a request may hold."""
        found, held = list[Made](), dict[bytes, int]()
        for group in groups:
            found.append(made := self._made(pictures, group))
            held[made.picture.key] = made.bytes
            if (places := sum(each.places for each in found)) > self.tokens:
                raise self._too_long(places, places)
            if (count := sum(held.values())) > self._limits.bytes:
                raise ServeError(
                    "too_long",
                    "The pictures are larger, all together, than one request's may be.",
                    given=f"{count} bytes as the model is given them, or more",
                    allowed=f"{self._limits.bytes} bytes",
                    do="show fewer or smaller pictures",
                )
        return found

    def _apart(self, count: int) -> bool:
        return count < 2 or not self._together

    def _text(self, sample: Sample) -> str:
        """What the template writes, one marker a picture."""
        try:
            text = self._chat.prompt(sample)
            text.encode()
        except DataError as error:
            what = error.what.removeprefix(_HEAD)
            what = f"{what[:1].upper()}{what[1:]}"
            raise ServeError("invalid", what, given=error.given, allowed=error.allowed, do=error.do) from None
        except UnicodeEncodeError:
            raise ServeError(
                "invalid", "A text holds half a character.", allowed="Unicode without surrogates"
            ) from None
        if len(text) > self.tokens * self._longest:  # not worth the cutting
            raise self._too_long(-(-len(text) // self._longest), 0)
        return text

    def _too_long(self, tokens: int, places: int) -> ServeError:
        return ServeError(
            "too_long",
            "The conversation is longer than this model reads.",
            given=f"{tokens} tokens or more, {places} of them for pictures",
            allowed=f"{self.tokens} tokens",
            do="shorten it, or show fewer or smaller pictures",
        )

    def _ids(self, text: str, found: Sequence[Made]) -> tuple[int, ...]:
        parts = text.split(self._chat.template.marker)
        written = [one for made in found for one in made.written]
        if len(parts) != len(written) + 1:
            raise ServeError("internal", "The template did not write one marker a picture.", given=text[:120])
        whole = "".join(piece for pair in zip(parts, [*written, ""], strict=True) for piece in pair)
        return tuple(self._tokenizer.encode(whole, add_special_tokens=not self._begun(text)).ids)

    def _begun(self, text: str) -> bool:
        # As the encoder of training does: a template that writes the first token itself wants no second one.
        first = self._chat.tokenizer.bos_token
        return bool(first) and text.startswith(first)

    def _marks(self, ids: tuple[int, ...], shows: bool) -> dict[str, Tensor]:
        """Which tokens stand for pictures, int64 [1, tokens], under the names that the processor has for it."""
        pictures = torch.tensor([ids]) == self._image
        return {name: pictures.long() for name in self._types.get(shows, ())}

    def _made(self, files: Sequence[bytes], group: Sequence[int]) -> Made:
        """The pictures of ``group`` as the model is given them: kept, or made."""
        resolution = b"" if self._resolution is None else self._resolution.to_bytes(8, "big")
        key = hashlib.sha256(resolution + b"".join(shown.digest(files[i]) for i in group)).digest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                self.hits += 1
                return self._kept[key]
            self.misses += 1
        numbers = ", ".join(str(i + 1) for i in group)
        pictures = [shown.decoded(files[i], i + 1, self._limits.bounds, self._resolution) for i in group]
        try:
            made = self._processed(pictures)
        except (ValueError, ZeroDivisionError) as error:
            raise ServeError(
                "invalid",
                f"The processor does not take picture {numbers}.",
                given=str(error)[:200],
                do="send another file",
            ) from None
        self._keep(key, made)
        return made

    def _keep(self, key: bytes, made: Made) -> None:
        with self._lock:
            if made.bytes > self._limits.kept or key in self._kept:
                return
            self._kept[key] = made
            self._held += made.bytes
            while self._held > self._limits.kept:
                self._held -= self._kept.popitem(last=False)[1].bytes

    def _processed(self, pictures: Sequence[Image.Image]) -> Made:
        """What the processor makes of a text that is nothing but these pictures."""
        processor = self._processor_here()
        heard: list[str] = processor.tokenizer.heard
        heard.clear()
        marker = self._chat.template.marker
        found = dict(
            processor(
                text=["".join(f"{_OPEN}{marker}{_CLOSE}" for _ in pictures)],
                images=[list(pictures)],
                add_special_tokens=False,
                return_tensors="pt",
            )
        )
        written = tuple(part.partition(_CLOSE)[0] for part in heard[-1].split(_OPEN)[1:])
        places = int((found["input_ids"] == self._image).sum())
        inputs = {name: value for name, value in found.items() if not _along(name)}
        if strange := [name for name, value in inputs.items() if not isinstance(value, Tensor)]:
            raise ServeError("internal", "The processor gives something that is no tensor.", given=", ".join(strange))
        return Made(Picture(_key(inputs), inputs), written, places)

    def _processor_here(self) -> Any:
        """The processor with a tokenizer that is this thread's alone: padding and cutting are states of it."""
        if not hasattr(self._own, "processor"):
            self._own.processor = copy.copy(self._processor)
            self._own.processor.tokenizer = _Listener(copy.deepcopy(self._chat.tokenizer))
        return self._own.processor

    def _try(self, name: str) -> None:
        """Hold what is made in parts to what the processor makes of whole rows."""
        drawn = [_noise(size, seed) for seed, size in enumerate(_TRIAL)]
        said = Message("assistant", ("c",), learnt=False)
        rows = [
            [Message("user", ("a b.",))],
            [Message("user", (PICTURE, "a b?"))],
            [Message("user", ("a ", PICTURE)), said, Message("user", ("b\n\n", PICTURE))],
            [Message("user", (PICTURE, PICTURE, " a ", PICTURE))],
        ]
        for talk in rows:
            n = sum(message.n_pictures for message in talk)
            reason = self._differs(talk, drawn[:n])
            if reason and n > 1 and not self._together:
                self._together = True
                reason = self._differs(talk, drawn[:n])
            if reason:
                raise ServeError(
                    "invalid",
                    "Rows for this base can not be made picture by picture.",
                    given=f"{name}: {reason} differ with {n} pictures",
                    do="serve another base; this one's processor is not understood",
                )

    def _differs(self, talk: Sequence[Message], pictures: Sequence[Image.Image]) -> str:
        """What a row in parts has otherwise than the processor's whole row; "" for nothing."""
        text = self._text(_of(talk, len(pictures)))
        processor = self._processor_here()
        whole = dict(
            processor(
                text=[text],
                images=[list(pictures)] if pictures else None,
                add_special_tokens=not self._begun(text),
                return_tensors="pt",
            )
        )
        groups = [[picture] for picture in pictures] if self._apart(len(pictures)) else [pictures]
        found = [self._processed(group) for group in groups]
        ids = self._ids(text, found)
        if [*ids] != whole["input_ids"][0].tolist():
            return "ids"
        self._types[bool(pictures)] = tuple(sorted(name for name in whole if name.endswith(_TYPES)))
        marks = self._marks(ids, bool(pictures))
        if any(not torch.equal(value, whole[name]) for name, value in marks.items()):
            return "token types"
        inputs = {name: value for name, value in whole.items() if not _along(name)}
        names = set(inputs).union(*(made.picture.inputs for made in found))
        if wrong := [n for n in names if not _joins([made.picture.inputs.get(n) for made in found], inputs.get(n))]:
            return ", ".join(wrong)
        return ""


class _Listener:
    """Stands in for a tokenizer in a processor: keeps the texts that it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.heard: list[str] = []

    def __call__(self, text: list[str], **options: Any) -> Any:
        self.heard.extend(text)
        return self._tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _along(name: str) -> bool:
    """Whether an input of this name goes along the ids; all others are the pictures'."""
    return name in ("input_ids", "attention_mask") or name.endswith(_TYPES)


def _joins(parts: Sequence[Tensor | None], whole: Tensor | None) -> bool:
    """Whether ``whole`` is the parts end to end, along the rows or along the pictures of one row.

    Where they are of unequal size, zeros fill the smaller ones: the model is told by another input what is filled.
    """
    held = [part for part in parts if part is not None]
    if whole is None or len(held) != len(parts):
        return False
    if not held or len({part.ndim for part in held}) > 1:
        return not held
    axes = [0, 1] if all(len(part) == 1 for part in held) and whole.ndim > 1 else [0]
    return any(torch.equal(_end_to_end(held, axis), whole) for axis in axes)


def _end_to_end(parts: Sequence[Tensor], axis: int) -> Tensor:
    size = [max(lengths) for lengths in zip(*(part.shape for part in parts), strict=True)]
    filled = []
    for part in parts:
        wanted = [*size[:axis], part.shape[axis], *size[axis + 1 :]]
        made = part.new_zeros(wanted)
        made[tuple(slice(length) for length in part.shape)] = part
        filled.append(made)
    return torch.cat(filled, axis)


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that neither pads nor cuts, whatever is asked of the other."""
    made = Tokenizer.from_str(tokenizer.to_str())
    made.no_padding()
    made.no_truncation()
    return made


def _key(inputs: Mapping[str, Tensor]) -> bytes:
    made = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        made.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        made.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return made.digest()


def _noise(size: tuple[int, int], seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _sample(messages: Sequence[Mapping[str, Any]], pictures: int) -> Sample:
    """The conversation as the data layer has it. Raises ServeError where it is none that can be answered."""
    if not messages:
        raise ServeError("invalid", "There are no messages.")
    talk = [_message(i, message) for i, message in enumerate(messages)]
    if talk[-1].role != "user":
        raise ServeError(
            "invalid", "Nobody asks anything.", given=f"the last message is the {talk[-1].role}'s", allowed="the user's"
        )
    asked = sum(message.n_pictures for message in talk)
    if asked != pictures:
        raise ServeError("invalid", "Pictures and their places differ.", given=f"{pictures} pictures, {asked} places")
    return _of(talk, pictures)


def _of(talk: Sequence[Message], pictures: int) -> Sample:
    # The files are decoded elsewhere, for each alone: here only their places count.
    return Sample(tuple(talk), (Shown(b"", "", "the request", 0),) * pictures, "the request", 0)


def _message(number: int, message: Mapping[str, Any]) -> Message:
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise ServeError(
            "invalid", f"Message {number} is of an unknown role.", given=repr(role)[:80], allowed=", ".join(_ROLES)
        )
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise ServeError("invalid", f"Message {number} has no content.", allowed="a text, or a list of parts")
    return Message(role, tuple(_part(number, part) for part in content), learnt=role != "assistant")


def _part(number: int, part: object) -> str | Placeholder:
    if isinstance(part, Mapping):
        if part.get("type") == "image":
            return PICTURE
        if part.get("type") == "text" and isinstance(text := part.get("text"), str):
            return text
    raise ServeError("invalid", f"A part of message {number} is neither a text nor an image.", given=repr(part)[:80])
