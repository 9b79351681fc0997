"""The pages in docs/lab are what the command wrote: each registered chapter's, number for number."""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from tarsia.labs.chapters import CHAPTERS
from tarsia.labs.frame import page, places, result

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "lab"
REDRAW = "run `tarsia lab {} --redraw --out docs/lab`"


@pytest.fixture(params=list(CHAPTERS))
def chapter(request):
    return CHAPTERS[request.param]


def recorded(chapter):
    path = page.files(chapter, PAGES)["result"]
    assert path.is_file(), f"run `tarsia lab {chapter.name} --out docs/lab`"
    return result.read(path)


def test_the_page_says_what_its_result_says(chapter):
    found = recorded(chapter)
    place = page.files(chapter, PAGES)
    assert place["page"].read_text(encoding="utf8") == page.page(chapter, found), REDRAW.format(chapter.name)
    assert place["result"].read_text(encoding="utf8") == found.as_json(chapter), REDRAW.format(chapter.name)


def test_the_picture_is_drawn_from_the_result(chapter):
    """Pixel for pixel, but for what another build of the libraries below matplotlib rounds otherwise."""
    drawn = matplotlib.image.imread(io.BytesIO(page.picture(chapter, recorded(chapter))))
    kept = matplotlib.image.imread(page.files(chapter, PAGES)["picture"])
    assert drawn.shape == kept.shape, REDRAW.format(chapter.name)
    assert np.abs(drawn - kept).mean() < 1e-3, REDRAW.format(chapter.name)
    assert kept.std() > 0.05


def test_a_number_of_the_claim_stands_in_the_page(chapter):
    """Whichever number of the claim is another, the page is, and past its limits the verdict."""
    found = recorded(chapter)
    shown = page.page(chapter, found)
    for bound in chapter.bounds:
        content = json.loads(found.as_json(chapter))
        if bound.uses in found.lacking:
            continue
        content["rows"][bound.row][bound.column] = -98.765
        other = result.Result.from_json(json.dumps(content))
        assert "-98.765" in page.page(chapter, other) != shown
        if not bound.low <= -98.765 <= bound.high:
            assert other.verdict(chapter) == "FAIL"
        content["rows"][bound.row][bound.column] = 1e30
        assert bound.high >= 1e30 or result.Result.from_json(json.dumps(content)).verdict(chapter) == "FAIL"


def test_every_chapter_is_told_whole(chapter):
    assert chapter.question.endswith("?") and chapter.claim.endswith(".")
    assert any(letter.isdigit() for letter in chapter.claim), "a claim has a number"
    assert chapter.bounds and len({bound.what for bound in chapter.bounds}) == len(chapter.bounds)
    assert any(bound.uses is None for bound in chapter.bounds)
    assert {*chapter.needs, *chapter.uses} <= set(places.PLACES)
    assert all(bound.uses is None or bound.uses in chapter.uses for bound in chapter.bounds)


def test_the_list_is_what_the_command_writes():
    assert (PAGES / page.LIST).read_text(encoding="utf8") == page.listing(CHAPTERS, PAGES)


def test_nothing_else_lies_there():
    known = {path.name for chapter in CHAPTERS.values() for path in page.files(chapter, PAGES).values()}
    assert {path.name for path in PAGES.iterdir() if not path.name.startswith(".")} == known | {page.LIST}


def test_the_readme_links_the_list():
    assert "(docs/lab/README.md)" in (ROOT / "README.md").read_text(encoding="utf8")
