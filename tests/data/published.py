"""Chat templates of published models, written anew: the same markers, order, trimming, conditions and refusals.
Their long fixed texts (what a system says by default, how tools are introduced) are cut short.

``PUBLISHED[name]`` says where a template is from, what it writes (with {% generation %} round what the
assistant says and what closes it, as transformers marks it: that is the oracle, ``template`` is without),
and, for the other oracle, what it writes before and after an answer. Only what conversations with
pictures, tools and thoughts can reach is here: no videos, no code interpreters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from data import processors
from data.processors import CLIP, bytes_tokenizer
from transformers import LlavaProcessor


@dataclass(frozen=True)
class Published:
    """One family's template. ``strips``: answers are trimmed; ``tools``: it writes tools, calls and answers."""

    origin: str
    family: str
    marked: str
    opening: str
    closing: str
    controls: tuple[str, ...]
    strips: bool = False
    tools: bool = False
    system: bool = True
    closes: bool = True
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def template(self) -> str:
        """The template without its marks, trimmed where they trim."""
        return re.sub(r"\bgeneration\b", "if true", re.sub(r"\bendgeneration\b", "endif", self.marked))

    def processor(self, marked: bool = False) -> Any:
        """A tiny processor of the family that has this template."""
        made = FAMILIES[self.family]()
        made.tokenizer.add_tokens(list(self.controls), special_tokens=True)
        made.chat_template = self.marked if marked else self.template
        return made


def pixtral() -> Any:
    """A processor with Pixtral's token; its own class needs torchvision."""
    tokenizer = bytes_tokenizer(("[IMG]",), image_token="[IMG]")
    return LlavaProcessor(
        processors._pictures("clip", "CLIPImageProcessorPil", **CLIP), tokenizer,
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


FAMILIES = processors.FAMILIES | {"pixtral": pixtral}

# Published with its mark after the space; but the prompt ends before it, so the space is said.
VICUNA = """\
{%- for m in messages %}
    {%- if m.role != 'system' %}{{ m.role | upper + ':' }}{% endif %}
    {%- if m.role == 'assistant' %}{% generation %}
        {%- for c in m.content %}{{ ' ' + c.text + ' ' }}{% endfor %}{% endgeneration %}
    {%- else %}
        {%- if m.role != 'system' %}{{ ' ' }}{% endif %}
        {%- for c in m.content if c.type == 'image' %}{{ '<image>\\n' }}{% endfor %}
        {%- for c in m.content if c.type == 'text' %}{{ c.text + ' ' }}{% endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

MISTRAL = """\
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ '<<SYS>>\\n' + m.content[0].text + '\\n<</SYS>>\\n\\n' }}
    {%- elif m.role == 'user' %}
        {{- '[INST] ' }}
        {%- for c in m.content if c.type == 'image' %}{{ '<image>\\n' }}{% endfor %}
        {%- for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}
        {{- ' [/INST]' }}
    {%- elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content[0].text + '<\\\\s> ' }}{% endgeneration %}
    {%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}"""

ONEVISION = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + ' ' }}
    {%- for c in m.content if c.type == 'image' %}{{ '<image>' }}{% endfor %}
    {%- for c in m.content if c.type == 'text' %}
        {{- '\\n' }}
        {%- if m.role == 'assistant' %}{% generation %}{{ c.text }}{% endgeneration %}{% else %}{{ c.text }}{% endif %}
    {%- endfor %}
    {%- if m.role == 'assistant' %}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{ '<|im_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_QWEN_PART = """\
{%- macro shown(content) %}
    {%- if content is string %}{{ content }}{% else %}
        {%- for c in content %}
            {%- if c.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in c %}{{ c.text }}{% endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}"""

QWEN2 = (
    _QWEN_PART
    + """\
{%- for m in messages %}
    {%- if loop.first and m.role != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}{% generation %}{{ shown(m.content) + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}{{ shown(m.content) + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
)

_QWEN3_HEAD = (
    _QWEN_PART
    + """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ shown(messages[0].content) + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
    {{- '\\n</tools>\\n\\nReturn a json object within <tool_call></tool_call> XML tags.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + shown(messages[0].content) + '<|im_end|>\\n' }}
{%- endif %}"""
)
_QWEN3_CALLS = """\
{%- for call in m.tool_calls %}
    {%- if (loop.first and m.content) or not loop.first %}{{ '\\n' }}{% endif %}
    {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
    {{- '}\\n</tool_call>' }}
{%- endfor %}"""
_QWEN3_TOOL = """\
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + shown(m.content) + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"""

QWEN3 = (
    _QWEN3_HEAD
    + """\
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + shown(m.content) + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{ shown(m.content) }}"""
    + _QWEN3_CALLS
    + """\
{{- '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- elif m.role == 'tool' %}"""
    + _QWEN3_TOOL
    + """\
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
)

# The last question is the last user's turn; thoughts before it are dropped, and the answers to it have them.
QWEN3_THINKING = (
    _QWEN3_HEAD
    + """\
{%- set ns = namespace(last=messages | length - 1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + shown(m.content) + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set said = shown(m.content) %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
        {%- elif '</think>' in said %}
            {%- set thought = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' }}{% generation %}{{ thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}"""
    + _QWEN3_CALLS
    + """\
{{- '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
        {%- else %}{% generation %}{{ said }}"""
    + _QWEN3_CALLS
    + """\
{{- '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% endif %}
    {%- elif m.role == 'tool' %}"""
    + _QWEN3_TOOL
    + """\
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""
)

_UTTERANCES = """\
{{- FIRST }}
{%- for m in messages %}
    {{- m.role | capitalize + ':' }}
    {%- if m.content[0].type != 'image' and m.role != 'assistant' %}{{ ' ' }}{% endif %}
    {%- if m.role == 'assistant' %}{% generation %}
        {{- ' ' }}{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}
        {{- '<end_of_utterance>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {%- for c in m.content %}{{ c.text if c.type == 'text' else '<image>' }}{% endfor %}
        {{- '<end_of_utterance>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

GEMMA = """\
{{- bos_token }}
{%- set first = '' %}
{%- if messages[0].role == 'system' %}
    {%- set c = messages[0].content %}
    {%- set first = (c if c is string else c[0].text) + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') }}
    {%- if m.role == 'assistant' %}{% generation %}
        {%- for c in m.content %}{{ c.text | trim }}{% endfor %}{{ '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {%- for c in m.content %}{{ '<start_of_image>' if c.type == 'image' else c.text | trim }}{% endfor %}
        {{- '<end_of_turn>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

INTERNVL = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}{% generation %}
        {%- for c in m.content %}{{ c.text }}{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {%- for c in m.content %}{{ '<IMG_CONTEXT>\\n' if c.type == 'image' else c.text }}{% endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

MLLAMA = """\
{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- set system, own = '', false %}
{%- if messages[0].role == 'system' %}
    {%- set system, own, messages = messages[0].content | trim, true, messages[1:] %}
{%- endif %}
{%- set ns = namespace(images=false) %}
{%- for m in messages %}{% for c in m.content if c.type == 'image' %}{% set ns.images = true %}{% endfor %}{% endfor %}
{%- if own or not ns.images %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
    {%- if tools %}{{ 'Environment: ipython\\n' }}{% endif %}
    {{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- endif %}
{%- if tools %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nGiven the following functions, respond with a JSON.\\n\\n' }}
    {%- for tool in tools %}{{ (tool | tojson(indent=4)) + '\\n\\n' }}{% endfor %}
    {{- (messages[0].content | trim) + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {%- generation %}{{ '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
        {{- '<|eot_id|>' }}{% endgeneration %}
    {%- elif m.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
        {%- if m.role == 'assistant' %}{% generation %}
            {%- if m.content is string %}{{ m.content }}
            {%- else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}
            {{- '<|eot_id|>' }}{% endgeneration %}
        {%- else %}
            {%- if m.content is string %}{{ m.content }}
            {%- else %}{% for c in m.content %}{{ '<|image|>' if c.type == 'image' else c.text }}{% endfor %}{% endif %}
            {{- '<|eot_id|>' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

MISTRAL3 = """\
{%- set today = strftime_now('%Y-%m-%d') %}
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set c, messages = messages[0].content, messages[1:] %}
    {%- set system = c if c is string else c[0].text %}
{%- else %}{% set system = 'You are Mistral Small 3. The date is ' + today + '.' %}{% endif %}
{{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools and m == asked[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' }}
        {%- if m.content is string %}{{ m.content }}
        {%- else %}{% for c in m.content %}{{ '[IMG]' if c.type == 'image' else c.text }}{% endfor %}{% endif %}
        {{- '[/INST]' }}
    {%- elif m.tool_calls is defined %}
        {%- generation %}{{ '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {%- if call.id is not defined or call.id | length < 9 %}
                {{- raise_exception('Tool call IDs need length >= 9!') }}
            {%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id[-9:] + '"}' + (']' if loop.last else ', ') }}
        {%- endfor %}
        {{- eos_token }}{% endgeneration %}
    {%- elif m.role == 'assistant' %}
        {%- generation %}{{ (m.content if m.content is string else m.content[0].text) + eos_token }}{% endgeneration %}
    {%- elif m.role == 'tool' %}
        {%- if m.tool_call_id is not defined or m.tool_call_id | length < 9 %}
            {{- raise_exception('Tool call IDs need length >= 9!') }}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + (m.content | string) + ', "call_id": "' + m.tool_call_id[-9:] }}
        {{- '"}[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}"""

_IM = ("<|im_start|>", "<|im_end|>")
_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_MISTRAL = (
    "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip
_DATE = (("date_string", "26 Jul 2024"),)
# The tiny tokenizers' first token is <s>, not <|begin_of_text|> or <|im_start|>.
PUBLISHED = {
    "LLaVA-1.5": Published("llava-hf/llava-1.5-7b-hf", "llava", VICUNA, " ", " ", (), closes=False),
    "LLaVA-NeXT": Published(
        "llava-hf/llava-v1.6-mistral-7b-hf", "llava_next", MISTRAL, " ", "<\\s> ", (), closes=False
    ),
    "LLaVA-OneVision": Published(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf", "onevision", ONEVISION, "", "<|im_end|>", _IM
    ),
    "Qwen2-VL": Published("Qwen/Qwen2-VL-7B-Instruct", "qwen", QWEN2, "", "<|im_end|>", _IM),
    "Qwen2.5-VL": Published("Qwen/Qwen2.5-VL-7B-Instruct", "qwen", QWEN2, "", "<|im_end|>", _IM),
    "Qwen3-VL": Published("Qwen/Qwen3-VL-8B-Instruct", "qwen", QWEN3, "", "<|im_end|>", _IM, tools=True),
    "Qwen3-VL, thinking": Published(
        "Qwen/Qwen3-VL-8B-Thinking", "qwen", QWEN3_THINKING, "\n</think>\n\n", "<|im_end|>", _IM, tools=True
    ),
    "Idefics3": Published(
        "HuggingFaceM4/Idefics3-8B-Llama3", "idefics", _UTTERANCES.replace("FIRST", "bos_token"), " ",
        "<end_of_utterance>", (),
    ),
    "SmolVLM": Published(
        "HuggingFaceTB/SmolVLM-Instruct", "idefics", _UTTERANCES.replace("FIRST", "'<|im_start|>'"), " ",
        "<end_of_utterance>", _IM,
    ),
    "Gemma-3": Published(
        "google/gemma-3-4b-it", "gemma", GEMMA, "", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), strips=True
    ),
    "InternVL3": Published("OpenGVLab/InternVL3-1B-hf", "internvl", INTERNVL, "", "<|im_end|>", _IM),
    "Llama-3.2-Vision": Published(
        "meta-llama/Llama-3.2-11B-Vision-Instruct", "mllama", MLLAMA, "", "<|eot_id|>", _LLAMA3, tools=True,
        variables=_DATE,
    ),
    "Mistral-Small-3.1": Published(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503", "pixtral", MISTRAL3, "", "</s>", _MISTRAL, tools=True,
        variables=(("strftime_now", "2024-07-26"),),
    ),
}  # fmt: skip
