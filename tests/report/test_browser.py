"""Pages as a browser shows them, where there is one."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cachefreeze.report import figures
from cachefreeze.report.compare import comparison_page
from cachefreeze.report.html_report import write_report
from tests.report.harness import Page, sixty_units, three_runs
from tests.support.browser import PROGRAM, Browser
from tests.support.run_files import rewrite


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("there is no chromium here to look at pages with")
    with Browser() as opened:
        yield opened


# Of every picture: where it is, and where its texts are.
PLACES = """[...document.querySelectorAll('figure svg')].map(svg => {
    const box = element => {
        const r = element.getBoundingClientRect();
        return [r.left, r.top + scrollY, r.right, r.bottom + scrollY, element.textContent.trim()];
    };
    return {at: box(svg).slice(0, 4), texts: [...svg.querySelectorAll('text')].map(box)};
})"""


# Of the tables that everybody sees: how wide they are, what room there is, and their text.
WIDE = """[...document.querySelectorAll('main > .scroll, .stack')].map(
    each => [each.scrollWidth, each.clientWidth, each.innerText])"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_whole_and_without_complaint(
    browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    runs = three_runs(tmp_path)
    compared = tmp_path / "compared.html"
    compared.write_bytes(comparison_page(runs))
    few = write_report(runs[1].folder)
    many = write_report(rewrite(sixty_units(tmp_path / "many")))
    for path in (few, many, compared):
        browser.open(path, width, dark=dark)
        browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        if path == compared:
            head = "getComputedStyle(document.querySelector('.stack thead')).display"
            assert (browser.evaluate(head) == "none") == (width == 390)
        for wide in browser.evaluate(WIDE):
            assert wide[0] <= wide[1], f"{wide[2]!r} is cut off"
        image = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
        paper = figures.COLOURS["paper"][dark]
        assert image.getpixel((1, 1)) == tuple(int(paper[i : i + 2], 16) for i in (1, 3, 5))
        pictures = browser.evaluate(PLACES)
        assert len(pictures) == len(Page(path.read_bytes()).drawn)
        for picture in pictures:
            left, top, right, bottom = picture["at"]
            assert right - left > 300
            seen = np.array(image.crop((left, top, right, bottom)))
            inked = (seen != image.getpixel((1, 1))).any(-1).mean()
            assert inked > 0.02, "a blank picture"
            for text in picture["texts"]:
                assert left - 1 <= text[0] < text[2] <= right + 1, f"{text[4]!r} is cut off"
                assert top - 1 <= text[1] < text[3] <= bottom + 1, f"{text[4]!r} is cut off"
            assert_apart(picture["texts"])
        assert browser.complaints == []
        assert browser.requests == []


def assert_apart(texts: list[list[Any]]) -> None:
    """No two texts run into each other."""
    for number, one in enumerate(texts):
        for other in texts[:number]:
            wide = min(one[2], other[2]) - max(one[0], other[0])
            high = min(one[3], other[3]) - max(one[1], other[1])
            height = min(one[3] - one[1], other[3] - other[1])
            assert wide <= 1 or high <= 0.1 * height, f"{one[4]!r} runs into {other[4]!r}"


def test_the_browser_would_notice(browser: Browser, tmp_path: Path) -> None:
    page = '<script>console.error("no")</script><img src="gone.png"><div style="width:2000px">x'
    (tmp_path / "bad.html").write_text(page)
    browser.open(tmp_path / "bad.html", 390)
    assert len(browser.complaints) >= 2
    assert browser.requests == [(tmp_path / "gone.png").resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
