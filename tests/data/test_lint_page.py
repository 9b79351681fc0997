"""The page: what rows say is text in it and nothing else, and it fetches nothing."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from data.lint_worlds import World, clean

from tarsia.core.errors import ConfigError
from tarsia.data.lint.page import page, write_page

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\" \x1b[31m"


class Seen(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(world: World, title: str = "recipe.yaml") -> Seen:
    seen = Seen()
    seen.feed(page(world.lint(), title))
    return seen


def hostile() -> World:
    """Hostile texts wherever a row's or a file's words come to the page: texts, answers, names of files and columns."""
    world = clean()
    for at, each in enumerate(world.train):
        each["question"] = f"{HOSTILE} what is this?"
        each["answer"] = f"{HOSTILE} {at % 4}"
    world.train[1][HOSTILE] = "a column"
    world.train[2]["image"] = HOSTILE
    world.held[0] = dict(world.train[5])
    return world


def test_rows_are_text_and_nothing_else() -> None:
    seen = parsed(hostile(), HOSTILE)
    assert {tag for tag, _ in seen.tags} <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "div", "span", "table", "tr", "th",
        "td", "svg", "rect", "b", "i", "em", "a", "p", "section", "figure", "img",
    }  # fmt: skip
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert seen.text.count("<script>alert('x')</script>") > 8  # as text
    assert "\x1b" not in seen.text and "␛" in seen.text


def test_nothing_is_fetched() -> None:
    seen = parsed(hostile())
    links = [value for _, found in seen.tags for name, value in found.items() if name in ("src", "href")]
    assert links and all(link and link.startswith(("data:image/png;base64,", "#")) for link in links)
    policy = next(found["content"] for tag, found in seen.tags if found.get("http-equiv"))
    assert policy and policy.startswith("default-src 'none'")
    anchors = {found["id"] for _, found in seen.tags if "id" in found}
    assert {link[1:] for link in links if link and link.startswith("#")} <= anchors


def test_what_is_learnt_is_marked() -> None:
    world = clean()  # its rows are read again for the page
    text = page(world.lint(), "recipe.yaml")
    assert re.search(
        r'<span class="text learnt">a cat</span><span class="control learnt">&lt;\|im_end\|&gt;</span>', text
    )
    assert '<span class="picture">[picture 1: 4 tokens]</span>' in text
    assert "Nothing was found." in text


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    findings = clean().lint()
    write_page(findings, tmp_path / "page.html", "recipe.yaml")
    assert os.listdir(tmp_path) == ["page.html"]
    with pytest.raises(ConfigError):
        write_page(findings, tmp_path / "no" / "page.html", "recipe.yaml")
