"""Real processors of several families, made without any file: tiny tokenizers, small pictures.

``FAMILIES[name]()`` makes a processor without a chat template; ``TEMPLATES[name]`` writes the
processor's image token where MARK stands. ``EXPANSION[name]`` is what one 16 x 16 picture becomes.
"""

from __future__ import annotations

import importlib
from typing import Any

import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CONTROLS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<turn>", "</turn>")
CORPUS = [
    "USER: what is this? ASSISTANT: a cat and a dog.\n\n", "system\nuser\nassistant\nmodel\n The answer is 4.\n",
    "<think>\nit has fur\n</think>\n\na bird, a ship and an airplane", "[INST] which colour? [/INST] red and green",
]  # fmt: skip


def bytes_tokenizer(
    extra: tuple[str, ...], trim: bool = False, bos: bool = True, **named: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in Qwen (``trim`` False) and Llama 3 (True); ``bos``: whether it adds <s> itself."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[*CONTROLS, *extra],
        show_progress=False,
    )
    made.train_from_iterator(CORPUS * 4, trainer)
    first = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    steps = [processors.ByteLevel(trim_offsets=trim), *([first] if bos else [])]
    made.post_processor = processors.Sequence(steps)
    return _fast(made, named)


def pieces_tokenizer(extra: tuple[str, ...], **named: str) -> PreTrainedTokenizerFast:
    """BPE over whole words with ``▁`` for spaces and bytes for unknown characters, as in Llama 2."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *CONTROLS, *extra]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*special, *(f"<0x{b:02X}>" for b in range(256))], show_progress=False
    )
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.train_from_iterator(CORPUS * 4, trainer)
    made.pre_tokenizer = None
    state = made.to_str()
    fresh = Tokenizer.from_str(_unspecial(state))
    fresh.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fresh.token_to_id("<s>"))]
    )
    return _fast(fresh, named)


def _unspecial(state: str) -> str:
    """Byte tokens were given to the trainer as special ones; they are ordinary."""
    import json

    tree = json.loads(state)
    tree["added_tokens"] = [t for t in tree["added_tokens"] if not t["content"].startswith("<0x")]
    return json.dumps(tree)


def _fast(made: Tokenizer, named: dict[str, str]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=named
    )


def _pictures(module: str, name: str, **options: Any) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}"), name)(
        **options
    )


def _without_video(name: str) -> Any:
    """The processor's class, taking no video processor: those need torchvision even when nothing is filmed."""
    base = getattr(transformers, name)

    class Still(base):
        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> object:
            return (
                None
                if argument_name == "video_processor"
                else super().check_argument_for_proper_class(argument_name, argument)
            )

    return Still


CLIP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
PINPOINTS = {"image_grid_pinpoints": [[16, 32], [32, 16]]}


def llava(make: Any = bytes_tokenizer, **options: Any) -> Any:
    tokenizer = make(("<image>",), image_token="<image>", **options)
    return transformers.LlavaProcessor(
        _pictures("clip", "CLIPImageProcessorPil", **CLIP), tokenizer,
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def llava_next() -> Any:
    tokenizer = bytes_tokenizer(("<image>",), image_token="<image>")
    return transformers.LlavaNextProcessor(
        _pictures("llava_next", "LlavaNextImageProcessorPil", **CLIP, **PINPOINTS), tokenizer,
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def onevision() -> Any:
    tokenizer = bytes_tokenizer(("<image>", "<video>"), image_token="<image>", video_token="<video>")
    pictures = _pictures(
        "llava_onevision", "LlavaOnevisionImageProcessorPil", size={"height": 16, "width": 16}, **PINPOINTS
    )
    return _without_video("LlavaOnevisionProcessor")(
        pictures, tokenizer, None, num_image_tokens=4, vision_feature_select_strategy="full"
    )


def qwen() -> Any:
    tokenizer = bytes_tokenizer(("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"), bos=False)
    pictures = _pictures("qwen2_vl", "Qwen2VLImageProcessorPil", min_pixels=64, max_pixels=1024, patch_size=4)
    return _without_video("Qwen2VLProcessor")(pictures, tokenizer, None)


def idefics() -> Any:
    tokenizer = bytes_tokenizer(
        ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"), trim=True
    )
    pictures = _pictures(
        "idefics3", "Idefics3ImageProcessorPil", size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    return transformers.Idefics3Processor(pictures, tokenizer, image_seq_len=4)


def gemma() -> Any:
    tokenizer = bytes_tokenizer(
        ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>",
    )  # fmt: skip
    pictures = _pictures("gemma3", "Gemma3ImageProcessorPil", size={"height": 16, "width": 16})
    return transformers.Gemma3Processor(pictures, tokenizer, image_seq_length=4)


def internvl() -> Any:
    tokenizer = bytes_tokenizer(
        ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"), bos=False,
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    pictures = _pictures("got_ocr2", "GotOcr2ImageProcessorPil", size={"height": 16, "width": 16})
    return _without_video("InternVLProcessor")(pictures, tokenizer, None, image_seq_length=4)


def mllama(**options: Any) -> Any:
    pictures = _pictures("mllama", "MllamaImageProcessorPil", size={"height": 16, "width": 16}, max_image_tiles=2)
    return transformers.MllamaProcessor(
        pictures, bytes_tokenizer(("<|image|>", "<|python_tag|>"), trim=True, **options)
    )


def paligemma() -> Any:
    pictures = _pictures("siglip", "SiglipImageProcessorPil", size={"height": 16, "width": 16})
    pictures.image_seq_length = 4
    tokenizer = bytes_tokenizer(("<image>",), image_token="<image>")
    return transformers.PaliGemmaProcessor(pictures, tokenizer)


FAMILIES = {
    "llava": llava, "llava_next": llava_next, "onevision": onevision, "qwen": qwen, "idefics": idefics,
    "gemma": gemma, "internvl": internvl, "mllama": mllama,
}  # fmt: skip
EXPANSION = {
    "llava": "<image>" * 4, "qwen": "<|image_pad|>" * 4,
    "gemma": "\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n",
    "internvl": "<img>" + "<IMG_CONTEXT>" * 4 + "</img>", "mllama": "<|image|>",
}  # fmt: skip


def _said(filters: str = "") -> str:
    """What a template writes for a message's parts."""
    part = "{% if c['type'] == 'image' %}MARK{% else %}{{ c['text']" + filters + " }}{% endif %}"
    return "{% for c in m['content'] %}" + part + "{% endfor %}"


PARTS = _said()


def turns(before: str, after: str, prompt: str, said: str = PARTS, over: str = "messages") -> str:
    """A template that writes ``before``, what is said and ``after`` for each message; both are Jinja."""
    each = "{% for m in " + over + " %}" + before + said + after + "{% endfor %}"
    return each + "{% if add_generation_prompt %}" + prompt + "{% endif %}"


def _only(kind: str) -> str:
    return "{% for c in m['content'] | selectattr('type', 'equalto', '" + kind + "') %}"


_TRIM = _said(" | trim")
_NAME = "{{ m['role'].upper() + ': ' }}"
_CHATML = turns("{{ '<|im_start|>' + m['role'] + '\n' }}", "{{ '<|im_end|>\n' }}", "{{ '<|im_start|>assistant\n' }}")
_BY_ROLE = "{% if m['role'] == 'assistant' %}"
TEMPLATES = {
    # llava-hf/llava-1.5: pictures first, a space after every text, no end of turn.
    "vicuna": turns(
        _NAME + _only("image") + "{{ 'MARK\n' }}{% endfor %}" + _only("text") + "{{ c['text'] + ' ' }}{% endfor %}",
        "",
        "ASSISTANT:",
        said="",
    ),
    "vicuna with end": turns(_NAME, _BY_ROLE + "{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}", "ASSISTANT:"),
    "chatml": _CHATML,
    "default system": "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + _CHATML,
    "llama 3": "{{ bos_token }}"
    + turns(
        "{{ '<|head|>' + m['role'] + '<|/head|>\n\n' }}", "<|im_end|>", "{{ '<|head|>assistant<|/head|>\n\n' }}", _TRIM
    ),
    "gemma": "{{ bos_token }}"
    + turns(
        "{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}",
        "{{ '</turn>\n' }}",
        "{{ '<turn>model\n' }}",
        _TRIM,
    ),
    "mistral": "{{ bos_token }}"
    + turns(
        _BY_ROLE + "{{ ' ' }}{% else %}{{ '[INST] ' }}{% endif %}",
        _BY_ROLE + "{{ eos_token }}{% else %}{{ ' [/INST]' }}{% endif %}",
        "",
    ),
}
# What closes an answer, and whether the template strips what is said.
CLOSING = {
    "vicuna": " ", "vicuna with end": "</s>", "chatml": "<|im_end|>", "default system": "<|im_end|>",
    "llama 3": "<|im_end|>", "gemma": "</turn>", "mistral": "</s>",
}  # fmt: skip
OPENING = {"vicuna": " ", "vicuna with end": " ", "mistral": " "}
STRIPS = ("llama 3", "gemma")


def made(family: str = "llava", template: str = "chatml", **options: Any) -> Any:
    """A processor of ``family`` that has the named template, or the template given."""
    processor = FAMILIES[family](**options)
    processor.chat_template = TEMPLATES.get(template, template).replace("MARK", processor.image_token)
    return processor


def picture(side: int = 16, shade: int = 0) -> Image.Image:
    """A square picture, not of one colour."""
    drawn = Image.new("RGB", (side, side), (shade * 37 % 256, 40, 200))
    drawn.putpixel((shade % side, side // 2), (255, 255, 0))
    return drawn
