"""A host's way to speak: what it is shown before it answers, and what it writes when it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from tarsia.adapter import Host
from tarsia.core.errors import ConfigError, DataError
from tarsia.data import Message, Sample, Template

_SOMETHING: Final = "?"  # stands where an answer will: what comes before it is the prompt


def question(sample: Sample) -> tuple[Message, ...]:
    """The messages before the last answer; all of them where the last is not the assistant's."""
    return sample.messages[:-1] if sample.messages[-1].role == "assistant" else sample.messages


def reference(sample: Sample) -> str:
    """The last answer. Raises DataError where the conversation does not end with the assistant's turn."""
    last = sample.messages[-1]
    if last.role != "assistant":
        raise DataError(
            f"Row {sample.row} of {sample.source} has no answer to compare with.",
            given=f"its last message is the {last.role}'s",
            allowed="an assistant's text at the end",
        )
    return last.text


@contextmanager
def examined(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class Chat:
    """Prompts and answers as a host's processor spells them.

    ``ends`` are the ids that end a turn: the token that the template writes after an answer, and what the
    model's generation configuration and its tokenizer call the end. Raises DataError for a template that
    can not be trusted (see ``Template``) and ConfigError where nothing can end a turn.
    """

    def __init__(self, host: Host) -> None:
        self.model: Any = host.model
        self.processor: Any = host.processor
        self.resolution = host.resolution
        self.template = Template(host.processor, host.variables)
        self.tokenizer: Any = host.processor.tokenizer
        if self.tokenizer.pad_token_id is None:
            raise DataError("The tokenizer has no padding token.", given=host.name, do="set tokenizer.pad_token")
        special = {i: t.content for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        self._special, self._controls = frozenset(special), (*special.values(), self.template.marker)
        self._known: dict[str, tuple[int, ...]] = {}
        declared = getattr(self.model.generation_config, "eos_token_id", None)
        found = [*(declared if isinstance(declared, list) else [declared]), self.tokenizer.eos_token_id]
        trial = Sample((Message("user", (_SOMETHING,)),), (), "the template's trial", 0)
        self.ends = frozenset([*(i for i in found if i is not None), self.answer(trial, "yes")[-1]])

    def prompt(self, sample: Sample) -> str:
        """The sample's question as the template spells it, up to where the assistant begins to speak."""
        return self._said(sample, _SOMETHING)[0]

    def answer(self, sample: Sample, text: str) -> tuple[int, ...]:
        """Ids that the assistant would write to say ``text`` to the sample's question, its end of turn included.

        The end is the first special token that the template writes after the answer, or else the tokenizer's
        end of sequence. Raises DataError where an id would hold both prompt and answer.
        """
        before, said = self._said(sample, text)
        prefix, own, whole = self._ids(before), self._ids(said), self._ids(before + said)
        if whole[: len(prefix)] == prefix:
            ids = whole[len(prefix) :]
        elif whole[-len(own) :] == own:
            ids = own  # the prompt's last blanks are cut into other tokens once a text follows
        else:
            raise DataError(
                f"Row {sample.row} of {sample.source}: a token holds both the prompt and the answer.",
                given=repr((before + said)[-120:]),
                do="let the template's generation prompt end without white space",
            )
        stop = next((i for i, token in enumerate(ids) if token in self._special), None)
        if stop is not None:
            return tuple(ids[: stop + 1])
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                "Neither the chat template nor the tokenizer has an end of turn.",
                given=repr(said),
                do="let the template write a special token after an answer",
            )
        return (*ids, self.tokenizer.eos_token_id)

    def choices(self, sample: Sample, answers: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of every answer, and of the sample's own reference as the last.

        What an answer looks like is rendered once and kept; the row's reference is rendered in its own
        place, and DataError raised where the template writes the same answer otherwise there.
        """
        own = reference(sample)
        for text in answers:
            if text not in self._known:
                self._known[text] = self.answer(sample, text)
        here = self.answer(sample, own)
        if self._known.setdefault(own, here) != here:
            raise DataError(
                "The chat template writes one answer in two ways.",
                given=f"{own!r} in row {sample.row} of {sample.source}",
                do="make the template write an answer whatever the question was",
            )
        return [*(self._known[text] for text in answers), here]

    def inputs(self, samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, Tensor]:
        """The processor's inputs for ``texts``, padded on the left, on the model's device and in its dtype.

        All samples must have as many pictures: then every processor takes a list of pictures for each row.
        """
        pictures = [[picture.load(self.resolution) for picture in sample.pictures] for sample in samples]
        if len({len(row) for row in pictures}) > 1:
            raise ValueError("rows of one batch must have as many pictures")
        begun = bool(self.tokenizer.bos_token) and texts[0].startswith(self.tokenizer.bos_token)
        found = self.processor(
            text=list(texts),
            images=pictures if pictures[0] else None,
            padding=True,
            padding_side="left",
            add_special_tokens=not begun,  # as the encoder of training does
            return_tensors="pt",
        )
        model = self.model
        return {k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype) for k, v in found.items()}

    def batches(self, samples: Sequence[Sample], size: int) -> Iterator[tuple[list[int], list[str]]]:
        """Row numbers and prompts, batch by batch: rows of as many pictures together, by length."""
        texts = [self.prompt(sample) for sample in samples]
        order = sorted(range(len(samples)), key=lambda i: (len(samples[i].pictures), len(texts[i])))
        while order:
            count = len(samples[order[0]].pictures)
            rows = [i for i in order[:size] if len(samples[i].pictures) == count]
            order = order[len(rows) :]
            yield rows, [texts[i] for i in rows]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids up to the first end of turn, without special tokens and outer blanks."""
        stop = next((i for i, token in enumerate(ids) if token in self.ends), len(ids))
        text: str = self.tokenizer.decode(ids[:stop], skip_special_tokens=True)
        return text.strip()

    def _said(self, sample: Sample, text: str) -> tuple[str, str]:
        """The prompt, and what the template then writes where the assistant says ``text``."""
        for spoken in (*(message.text for message in question(sample)), text):
            if found := next((control for control in self._controls if control in spoken), None):
                raise DataError(
                    f"Row {sample.row} of {sample.source}: a text holds a control token of this model.",
                    given=found,
                    do="take it out or spell it otherwise; a picture's place is a part, not a token",
                )
        answered = replace(sample, messages=(*question(sample), Message("assistant", (text,))))
        rendered = self.template.render(answered)
        start, end = rendered.spans[-1]
        return rendered.text[:start], rendered.text[start:end]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
