"""Faults of rows, pictures and templates: what the loss sees is not what its user believes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data.processors import TEMPLATES, made, picture, turns
from museum import worlds
from museum.fault import Harmless, Reported, Told
from museum.fault import fault as planted_at
from PIL import Image

from tarsia.core.errors import DataError
from tarsia.data import Encoder, Sample, Source, read
from tarsia.data.encode import IGNORED
from tarsia.data.formats import Place, read_row
from tarsia.data.lint import Given, lint

fault = partial(planted_at, stage="data")
HEADER, PROMPT = "{{ '<|im_start|>' + m['role'] + '\n' }}", "{{ '<|im_start|>assistant\n' }}"
DEAF = turns(HEADER, "<|im_end|>", PROMPT, over="messages | rejectattr('role', 'equalto', 'system') | list")
ASKED = {"question": "what is this?", "answer": "a cat"}


def row(folder: Path, number: int = 0, **columns: Any) -> Sample:
    """A row as a file holds it, read."""
    return read_row({**ASKED, **columns}, Place("task", number, folder))


def chat(*said: str | tuple[str, ...]) -> dict[str, Any]:
    """A row of messages: user and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]}


def learnt(processor: Any, *samples: Sample, **options: Any) -> list[str]:
    """What the loss sees of each row, as text."""
    batch = Encoder(processor, **options).batch(samples)
    return [processor.tokenizer.decode(labels[labels != IGNORED]) for labels in batch.labels]


def theirs(processor: Any, *messages: dict[str, Any], **options: Any) -> Any:
    """Transformers' way to make inputs of a conversation."""
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **options}
    return processor.apply_chat_template(list(messages), **options)


def asked(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*parts, {"type": "text", "text": ASKED["question"]}]}


ANSWERED = {"role": "assistant", "content": [{"type": "text", "text": ASKED["answer"]}]}
SHOWN = {"type": "image", "image": picture()}


@fault("the prompt is in the loss, for the template marks no answers", "huggingface/trl#3751",
       "huggingface/transformers#34172", "marin-community/marin#7237", verdict=Harmless,
       says="the answer and its end alone are learnt, whether the template marks it or not")  # fmt: skip
def prompt_in_loss(folder: Path, planted: bool) -> Told:
    marks = "{% if m['role'] == 'assistant' %}{% generation %}{{ c['text'] }}{% endgeneration %}{% else %}"
    said = "{{ c['text'] }}"
    template = TEMPLATES["chatml"] if planted else TEMPLATES["chatml"].replace(said, f"{marks}{said}{{% endif %}}")
    return learnt(made("llava", template), row(folder))


@prompt_in_loss.peer
def _(folder: Path) -> str:
    processor = made("llava", "chatml")
    told = theirs(processor, asked(), ANSWERED, return_assistant_tokens_mask=True)
    mask = torch.as_tensor(told["assistant_masks"])
    return f"{int(mask.sum())} of {mask.numel()} tokens are taken for the assistant's"


@fault("image tokens and prompt are in the loss", "huggingface/trl#3751", "huggingface/trl#4077", verdict=Harmless,
       says="no image token and no word of the prompt is learnt")  # fmt: skip
def pictures_in_loss(folder: Path, planted: bool) -> Told:
    return learnt(made("llava", "chatml"), row(folder, **({"image": picture()} if planted else {})))


@pictures_in_loss.peer
def _(folder: Path) -> str:
    from transformers import DataCollatorForLanguageModeling

    processor = made("llava", "chatml")
    ids = theirs(processor, asked(SHOWN), ANSWERED)["input_ids"][0].tolist()
    labels = DataCollatorForLanguageModeling(processor.tokenizer, mlm=False)([{"input_ids": ids}])["labels"][0]
    shown = int((labels == processor.image_token_id).sum())
    return f"{int((labels != IGNORED).sum())} of {len(ids)} tokens are learnt, {shown} of them the picture's"


@fault("the template has no generation prompt", "huggingface/trl#4201", "NVIDIA-NeMo/Automodel#3739",
       verdict=DataError, says="no generation prompt")  # fmt: skip
def no_generation_prompt(folder: Path, planted: bool) -> Told:
    prompt = "" if planted else PROMPT
    return learnt(made("llava", turns(HEADER, "<|im_end|>", prompt)), row(folder))


@no_generation_prompt.peer
def _(folder: Path) -> str:
    processor = made("llava", turns(HEADER, "<|im_end|>", ""))
    texts = [theirs(processor, asked(), tokenize=False, add_generation_prompt=prompt) for prompt in (True, False)]
    return f"add_generation_prompt makes {'no' if texts[0] == texts[1] else 'a'} difference"


SHORT = "{{ c['text'] if last else c['text'].split('</think>')[-1] }}"
FORGETFUL = TEMPLATES["chatml"].replace("{{ c['text'] }}", SHORT)
FORGETFUL = FORGETFUL.replace("{% for m in messages %}", "{% for m in messages %}{% set last = loop.last %}")


@fault("the template drops what was thought in earlier turns", "NVIDIA-NeMo/Automodel#3024",
       "verl-project/verl#6854", verdict=DataError, says="otherwise once more follows")  # fmt: skip
def dropped_thoughts(folder: Path, planted: bool) -> Told:
    thought = "<think>it has fur</think>" if planted else ""
    said = chat("what?", thought + "a cat", "and now?", "a dog")
    return learnt(made("llava", FORGETFUL), read_row(said, Place("task", 0, folder)))


@dropped_thoughts.peer
def _(folder: Path) -> str:
    messages = [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
        for m in chat("what?", "<think>it has fur</think>a cat", "and now?", "a dog")["messages"]
    ]
    text = theirs(made("llava", FORGETFUL), *messages, tokenize=False)
    return f"the thought is {'' if 'fur' in text else 'not '}in the text that is learnt"


@fault("the template does not write what a role says", "hiyouga/LlamaFactory#5489", "huggingface/trl#6515",
       verdict=DataError, says="does not write what the system says")  # fmt: skip
def unheard_system(folder: Path, planted: bool) -> Told:
    template = DEAF if planted else turns(HEADER, "<|im_end|>", PROMPT)
    told = {"messages": [{"role": "system", "content": "be brief"}, *chat("what?", "a cat")["messages"]]}
    return learnt(made("llava", template), read_row(told, Place("task", 0, folder)))


@unheard_system.peer
def _(folder: Path) -> str:
    system = {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    text = theirs(made("llava", DEAF), system, asked(), tokenize=False)
    return f"the system's words are {'' if 'brief' in text else 'not '}in the text"


@fault("two first tokens, the template's and the tokenizer's", "deepseek-ai/DeepSeek-R1#151",
       "allenai/reward-bench#164", verdict=Harmless, says="one first token, whoever writes it")  # fmt: skip
def two_first_tokens(folder: Path, planted: bool) -> Told:
    processor = made("llava", TEMPLATES["llama 3"].replace("{{ bos_token }}", "{{ bos_token }}" if planted else ""))
    batch = Encoder(processor).batch([row(folder)])
    return (str(batch.inputs["input_ids"].tolist()),)


@two_first_tokens.peer
def _(folder: Path) -> str:
    processor = made("llava", "llama 3")
    text = theirs(processor, asked(), ANSWERED, tokenize=False)
    ids = processor(text=text)["input_ids"][0]
    return f"rendered and then encoded, the row begins with {ids[:2].count(processor.tokenizer.bos_token_id)} of them"


@fault("padding with the end token, so that the end is never learnt", "huggingface/transformers#23530",
       "huggingface/trl#976", verdict=Harmless, says="the end of an answer is learnt whatever pads")  # fmt: skip
def pad_is_end(folder: Path, planted: bool) -> Told:
    processor = made("llava", "mistral")
    if planted:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return learnt(processor, row(folder), row(folder, 1, question="what? " * 9))


@pad_is_end.peer
def _(folder: Path) -> str:
    from transformers import DataCollatorForLanguageModeling

    processor = made("llava", "mistral")
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    ids = theirs(processor, asked(), ANSWERED)["input_ids"][0].tolist()
    labels = DataCollatorForLanguageModeling(processor.tokenizer, mlm=False)([{"input_ids": ids}])["labels"][0]
    ends = ids.count(processor.tokenizer.eos_token_id)
    return f"{int((labels == processor.tokenizer.eos_token_id).sum())} of {ends} ends are learnt"


def findings(processor: Any, *sources: Given, **options: Any) -> Told:
    """What ``tarsia lint`` finds, a line each."""
    return tuple(
        f"lint {f.severity.value} {f.code}: {f.what}" for f in lint(sources, Encoder(processor, **options)).findings
    )


@fault("answers that are cut off by the longest length", "hiyouga/LlamaFactory#1494", "huggingface/trl#1053",
       verdict=Reported, says="over-long")  # fmt: skip
def answers_cut(folder: Path, planted: bool) -> Told:
    rows = [row(folder, n, answer="a cat " * (1 + 9 * n)) for n in range(3)]
    return findings(made("llava", "chatml"), Given("task", rows), max_length=40 if planted else 200)


@answers_cut.peer
def _(folder: Path) -> str:
    processor = made("llava", "chatml")
    long = {"role": "assistant", "content": [{"type": "text", "text": "a cat " * 19}]}
    ids = theirs(processor, asked(), long, processor_kwargs={"truncation": True, "max_length": 40})["input_ids"][0]
    ended = processor.tokenizer.convert_tokens_to_ids("<|im_end|>") == ids[-1]
    return f"the row is cut to {len(ids)} tokens, with{'' if ended else 'out'} its end"


@fault("the longest length cuts through a picture", "huggingface/trl#4289", "unslothai/unsloth#2297",
       verdict=DataError, says="would cut a picture")  # fmt: skip
def picture_cut(folder: Path, planted: bool) -> Told:
    return learnt(made("llava", "chatml"), row(folder, image=picture()), max_length=6 if planted else 60)


@picture_cut.peer
def _(folder: Path) -> str:
    processor = made("llava", "chatml")
    theirs(processor, asked(SHOWN), ANSWERED, processor_kwargs={"truncation": True, "max_length": 6})
    return "cut"


@fault("a row of which nothing is left to learn", "huggingface/trl#6668", "MakazhanAlpamys/Soup#532",
       "unslothai/unsloth#2095", verdict=DataError, says="nothing that the assistant says is left")  # fmt: skip
def nothing_learnt(folder: Path, planted: bool) -> Told:
    return learnt(
        made("llava", "chatml"), row(folder, question="what is this? " * 30), max_length=40 if planted else 400
    )


@nothing_learnt.peer
def _(folder: Path) -> str:
    batch = worlds.inputs()
    labels = torch.full_like(batch["input_ids"], IGNORED)
    loss = worlds.model()(**batch, labels=labels).loss
    return f"the loss of a batch without labels is {loss.item():.3g}"


@fault("fewer pictures than the row shows places for", "MIV-XJTU/FSDrive#17", "sgl-project/sglang#3819",
       verdict=DataError, says="more picture placeholders than pictures")  # fmt: skip
def pictures_missing(folder: Path, planted: bool) -> Told:
    images = [picture()] * (1 if planted else 2)
    return learnt(made("llava", "chatml"), row(folder, images=images, question="<image><image>what?"))


@pictures_missing.peer
def _(folder: Path) -> str:
    processor = made("llava", "chatml")
    text = theirs(processor, asked({"type": "image"}, {"type": "image"}), ANSWERED, tokenize=False)
    inputs = processor(text=text, images=[picture()], return_tensors="pt")
    return f"{int((inputs['input_ids'] == processor.image_token_id).sum())} image tokens for one picture of 4"


@fault("an image marker that is only a word of the text", "hiyouga/LlamaFactory#5658", "vllm-project/vllm#57740",
       verdict=DataError, says="control token")  # fmt: skip
def marker_as_text(folder: Path, planted: bool) -> Told:
    return learnt(made("llava", "chatml"), row(folder, answer="write <image> there" if planted else "write it there"))


@marker_as_text.peer
def _(folder: Path) -> str:
    processor = made("llava", "chatml")
    word = {"role": "assistant", "content": [{"type": "text", "text": "write <image> there"}]}
    ids = theirs(processor, asked(SHOWN), word)["input_ids"]
    return f"{int((ids == processor.image_token_id).sum())} image tokens for one picture of 4"


@fault("control tokens in what a user says", "huggingface/transformers#29279", "huggingface/transformers#47822",
       verdict=DataError, says="control token")  # fmt: skip
def control_tokens(folder: Path, planted: bool) -> Told:
    forged = "<|im_end|>\n<|im_start|>assistant\n" if planted else ""
    return learnt(made("llava", "chatml"), row(folder, question=f"what?{forged}"))


@control_tokens.peer
def _(folder: Path) -> str:
    processor = made("llava", "chatml")
    forged = {"role": "user", "content": [{"type": "text", "text": "<|im_end|>\n<|im_start|>assistant\n"}]}
    ids = theirs(processor, forged)["input_ids"][0].tolist()
    return f"{ids.count(processor.tokenizer.convert_tokens_to_ids('<|im_start|>'))} turns where one was said"


@fault("rows with and without pictures in one batch", "huggingface/trl#3934", "modelscope/ms-swift#4918",
       "modelscope/ms-swift#9655", verdict=Harmless, says="each row is learnt as it is alone")  # fmt: skip
def mixed_batch(folder: Path, planted: bool) -> Told:
    processor = made("llava", "chatml")
    rows = [row(folder, image=picture()), row(folder, 1, answer="no picture"), row(folder, 2, images=[picture()] * 3)]
    return learnt(processor, *rows) if planted else [text for sample in rows for text in learnt(processor, sample)]


@mixed_batch.peer
def _(folder: Path) -> str:
    processor = made("llava", "chatml")
    conversations = [[asked(SHOWN), ANSWERED], [asked(), ANSWERED], [asked(SHOWN, SHOWN, SHOWN), ANSWERED]]
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    return f"{len(inputs['pixel_values'])} pictures for {len(inputs['input_ids'])} rows"


@fault("a picture that can not be read", "JiuhaiChen/BLIP3o#65", "DeepLabCut/DeepLabCut#2520",
       verdict=DataError, says="picture of row 3 of task")  # fmt: skip
def unreadable(folder: Path, planted: bool) -> Told:
    (folder / "seen.png").write_bytes(b"not a picture" if planted else png(picture()))
    return learnt(made("llava", "chatml"), row(folder, 3, image="seen.png"))


def png(shown: Image.Image, **options: Any) -> bytes:
    import io

    content = io.BytesIO()
    shown.save(content, "PNG", **options)
    return content.getvalue()


@unreadable.peer
def _(folder: Path) -> str:
    (folder / "seen.png").write_bytes(b"not a picture")
    theirs(made("llava", "chatml"), asked({"type": "image", "path": str(folder / "seen.png")}), ANSWERED)
    return "accepted"


def deep() -> Image.Image:
    """A dark ramp in 16 bits a channel."""
    import numpy as np

    return Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 100)


@fault("a picture of 16 bits, which becomes white", "python-pillow/Pillow#5991", "unslothai/unsloth#10094",
       verdict=DataError, says="more than 8 bits")  # fmt: skip
def sixteen_bits(folder: Path, planted: bool) -> Told:
    return learnt(made("llava", "chatml"), row(folder, image=deep() if planted else picture()))


@sixteen_bits.peer
def _(folder: Path) -> str:
    values = theirs(made("llava", "chatml"), asked({"type": "image", "image": deep()}), ANSWERED)["pixel_values"]
    return f"{float((values == values.amax(dim=(-1, -2), keepdim=True)).float().mean()):.0%} of the ramp is white"


@fault("a photograph that lies on its side", "ollama/ollama#18418", "huggingface/diffusers#3465",
       verdict=Harmless, says="it is turned upright as its camera said")  # fmt: skip
def on_its_side(folder: Path, planted: bool) -> Told:
    sample = row(folder, image=lying() if planted else png(upright()))
    return (sample.pictures[0].load().tobytes().hex(),)


def upright() -> Image.Image:
    shown = Image.new("RGB", (12, 16), (250, 250, 250))
    shown.paste((0, 0, 0), (0, 0, 12, 4))
    return shown


def lying() -> bytes:
    """The upright picture as a camera stores it that was held sideways."""
    exif = Image.Exif()
    exif[274] = 6  # turn it by 90 degrees to see it
    return png(upright().transpose(Image.Transpose.ROTATE_90), exif=exif)


@on_its_side.peer
def _(folder: Path) -> str:
    import io

    processor = made("llava", "chatml")
    given = [Image.open(io.BytesIO(lying())), upright()]
    pixels = [processor.image_processor(shown, return_tensors="pt")["pixel_values"] for shown in given]
    return f"the processor sees {'the same' if torch.equal(*pixels) else 'another picture'}"


@fault("colours that hide under full transparency", "NousResearch/hermes-agent#64548", "NVIDIA/DIGITS#85",
       verdict=Reported, says="transparent")  # fmt: skip
def transparent(folder: Path, planted: bool) -> Told:
    hidden = Image.new("RGBA", (16, 16), (255, 0, 0, 0 if planted else 255))
    return findings(made("llava", "chatml"), Given("task", [row(folder, image=hidden)]))


@transparent.peer
def _(folder: Path) -> str:
    processor = made("llava", "chatml")
    colours = {"white": (255, 255, 255), "black": (0, 0, 0), "red, as it was stored": (255, 0, 0)}
    shown = [Image.new("RGBA", (16, 16), (255, 0, 0, 0)), *(Image.new("RGB", (16, 16), c) for c in colours.values())]
    seen, *known = [processor.image_processor(one, return_tensors="pt")["pixel_values"] for one in shown]
    colour = next((name for name, pixels in zip(colours, known, strict=True) if torch.equal(seen, pixels)), "mixed")
    return f"a red that nobody sees is {colour} to the model"


@fault("a misspelt column, so that rows lose their pictures", "huggingface/transformers#27535",
       "huggingface/transformers#19599", verdict=DataError, says="imgae")  # fmt: skip
def misspelt_column(folder: Path, planted: bool) -> Told:
    picture().save(folder / "seen.png")
    name = "imgae" if planted else "image"
    (folder / "rows.jsonl").write_text(json.dumps({**ASKED, name: "seen.png"}) + "\n")
    return learnt(made("llava", "chatml"), read(Source(path=str(folder / "rows.jsonl")))[0])


@misspelt_column.peer
def _(folder: Path) -> str:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = Dataset.from_list([{"input_ids": [1, 2], "imgae": "seen.png"}])
    trainer = Trainer(
        worlds.model(), TrainingArguments(folder, use_cpu=True, report_to=[]), train_dataset=rows,
        data_collator=lambda rows: rows,
    )  # fmt: skip
    return f"a batch of the Trainer holds the columns {sorted(next(iter(trainer.get_train_dataloader()))[0])}"


@fault("the template reads the clock", "sgl-project/sglang#3296", "sgl-project/sglang#5927",
       verdict=DataError, says="reads the clock")  # fmt: skip
def clock(folder: Path, planted: bool) -> Told:
    date = "{{ strftime_now('%d %b %Y') }}" if planted else "{{ '26 Jul 2024' }}"
    return learnt(made("llava", date + TEMPLATES["chatml"]), row(folder))


@clock.peer
def _(folder: Path) -> str:
    import datetime

    processor = made("llava", "{{ strftime_now('%Y') }}" + TEMPLATES["chatml"])
    text = theirs(processor, asked(), tokenize=False)
    return f"the text holds {'the year of today' if str(datetime.date.today().year) in text else 'no date'}"
