"""Templates that could run without end are refused before they run, published ones are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data.processors import TEMPLATES, made
from data.published import PUBLISHED

import tarsia
from tarsia.core.errors import DataError
from tarsia.data.bounds import check_bounded
from tarsia.data.chat import Template

BOMBS = {
    "ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "ranges in a macro": "{% macro f() %}{% for a in range(9999) %}{% endfor %}{% endmacro %}"
    "{% for b in range(9999) %}{{ f() }}{% endfor %}",
    "a range in a list": "{% for a in range(9)|list %}{% for b in range(9)|list %}{% endfor %}{% endfor %}",
    "five loops": "{% for a in m %}" * 5 + "{% endfor %}" * 5,
    "itself twice": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "itself with itself": "{% macro f(x) %}{% for y in [x, x] %}{{ f(y) }}{% endfor %}{% endmacro %}{{ f(1) }}",
    "two of them": "{% macro f() %}{{ g() }}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a power": "{{ 10 ** 10 ** 8 }}",
    "a product": "{{ 'a' * messages[0].content }}",
    "a large product": "{{ 2 * 999999999 }}",
    "a format": "{{ '%999999d' % 1 }}{{ x % y }}",
    "a wide centre": "{{ 'a' | center(9999) }}",
    "a wide method": "{{ 'a'.ljust(9999) }}",
    "doubled": "{% for m in messages %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled, a name": "{% for m in messages %}{% set x = x + x %}{% endfor %}",
    "recursive": "{% for m in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
    "deep": "(" * 5000,
    "deep in": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long": "a" * 300_000,
    "no template": "{% for %}",
    "a large number": "{{ " + "9" * 5000 + " }}",
}


@pytest.mark.parametrize("name", [n for n in BOMBS if n != "deep"])
def test_a_bomb_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"could run without end|is not one"):
        check_bounded(BOMBS[name])


@pytest.mark.parametrize("template", [*TEMPLATES.values(), *(p.marked for p in PUBLISHED.values()), BOMBS["deep"]])
def test_a_template_that_ends_is_let_through(template: str) -> None:
    check_bounded(template)


def test_what_published_templates_do_is_let_through() -> None:
    for template in (
        "{% macro f(x) %}{% for k, v in x.items() %}{{ k }}{{ f(v) }}{% endfor %}{% endmacro %}{{ f(tools) }}",
        "{% macro f(x) %}{{ f(x['items']) }}{% endmacro %}{{ f(tools) }}",
        "{% macro g(x) %}{{ x }}{% endmacro %}{% macro f() %}{{ g(1) }}{% endmacro %}{{ f() }}",
        "{% for i in range(messages | length) %}{{ loop.index0 % 2 }}{% if i > 3 %}{% break %}{% endif %}{% endfor %}",
        "{% for m in messages %}{% set ns.x = ns.x + [m] %}{% endfor %}",
        "{% set x = x.split('</think>')[-1].lstrip('\\n') %}",
    ):
        check_bounded(template)


def test_the_embedded_base_has_a_template_that_ends() -> None:
    folder = Path(tarsia.__file__).parent / "base" / "mini-1"
    found = [json.loads(p.read_text()).get("chat_template") for p in folder.glob("*.json") if "chat" in p.name]
    found += [p.read_text() for p in folder.glob("*.jinja")]
    assert any(found)
    for template in filter(None, found):
        check_bounded(template)


def test_of_named_templates_the_one_that_is_used_is_looked_at() -> None:
    processor = made("llava", "chatml")
    good = processor.chat_template
    processor.chat_template = {"default": good, "other": "{% for a in m %}" * 5 + "{% endfor %}" * 5}
    assert Template(processor).closing
    processor.chat_template = {"default": BOMBS["ranges"] + good}
    with pytest.raises(DataError, match="could run without end"):
        Template(processor)
    processor.chat_template = {"default": "{{ strftime_now('%d') }}" + good}
    with pytest.raises(DataError, match="reads the clock"):
        Template(processor)
    assert Template(processor, {"strftime_now": "26 Jul 2024"}).closing
    processor.chat_template = {"other": good}
    with pytest.raises(DataError, match="none that is the default"):
        Template(processor)
