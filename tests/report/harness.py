"""Reads report.html as a reader sees it, and shapes out of its pictures."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from cachefreeze.report.html_report import write_report
from cachefreeze.report.run_results import RunResults
from cachefreeze.report.summary_text import (
    closing_words,
)
from tests.support.run_files import make_run, rewrite

ROOT = Path(__file__).parents[2]


TITLES = {
    "rates": "Rate of every unit",
    "seconds": "Seconds of every epoch",
    "frontier": "Frozen units, and where rows come from",
    "learning": "Accuracy and loss",
    "kept": "Memory of kept rows",
    "predicted": "Predicted beside measured",
}


Script = Callable[..., int]


class Page(HTMLParser):
    """What is in a page.

    Attributes:
        text: the page itself.
        words: what a reader sees of it, pictures left out, a space between elements and for a
            line's end.
        figures: title of each, the `aria-label` of its picture or None, and its caption.
        links: whatever might be fetched.
        scripts: how many.
        ids: of all elements.
    """

    LOADING = ("src", "srcset", "href", "xlink:href", "action", "data", "poster")

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.words = ""
        self.figures: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.scripts = 0
        self.ids: list[str] = []
        self._open: list[str] = []
        self.text = page.decode()
        self.feed(self.text)
        assert self._open == [], "every element is closed"
        self.words = re.sub(r"\s+", " ", self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.links += [v for k, v in attrs if k in self.LOADING and v and not v.startswith("#")]
        self.scripts += tag == "script" or any(name.startswith("on") for name in attributes)
        self.ids += [attributes["id"]] if attributes.get("id") else []
        if tag == "figure":
            self.figures.append({"title": "", "label": None, "caption": ""})
        if tag == "svg" and "figure" in self._open:
            self.figures[-1]["label"] = attributes["aria-label"]
            assert attributes["role"] == "img"
        if tag not in ("meta",):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self.words += " " if tag in ("td", "th", "dd", "dt", "p", "b", "span") else ""

    def handle_data(self, data: str) -> None:
        inside = set(self._open)
        if not inside & {"svg", "style"}:
            self.words += data
        for tag, key in (("h3", "title"), ("figcaption", "caption")):
            if tag in inside:
                self.figures[-1][key] = (self.figures[-1][key] or "") + data

    @property
    def drawn(self) -> list[str | None]:
        return [each["title"] for each in self.figures if each["label"]]


def drawn(run: RunResults) -> Page:
    """The page of a run, after something in its files was changed."""
    return Page(write_report(rewrite(run)).read_bytes())


def told_by(run: RunResults) -> list[str]:
    return closing_words(run.summary, run.args, run.folder, "python", exact=True)


def sixty_units(folder: Path) -> RunResults:
    names = [f"denseblock{1 + n // 20}_layer{1 + n % 20}" for n in range(60)]
    names[0] = "<script>alert(1)</script>"
    names[3] = "cost_$1$"  # one of those that there is room for
    run = make_run(folder, names=names)
    run.args["network"] = "<b>bold</b>"
    run.summary["cache"]["messages"] = ["<script>alert(2)</script>"]
    return run


SVG = "{http://www.w3.org/2000/svg}"


def group(svg: str, name: str) -> ElementTree.Element:
    found = ElementTree.fromstring(svg).find(f".//{SVG}g[@id='{name}']")
    assert found is not None, f"{name} is not drawn"
    return found


def corners(svg: str, name: str) -> np.ndarray:
    """The points of a shape, (n, 2)."""
    path = group(svg, name).find(f".//{SVG}path")
    assert path is not None
    numbers = re.findall(r"-?[\d.]+", path.attrib["d"])
    return np.array(numbers, float).reshape(-1, 2)


def is_hollow(svg: str, name: str) -> bool:
    path = group(svg, name).find(f".//{SVG}path")
    assert path is not None
    return "fill: none" in path.attrib["style"]


def levels(svg: str, name: str) -> list[float]:
    return sorted(set(corners(svg, name)[:, 1].round(3)), reverse=True)


def three_runs(folder: Path) -> list[RunResults]:
    runs = [make_run(folder / "without", cache=False), make_run(folder / "cached")]
    other = make_run(folder / "seed")
    other.args["seed"] = 1
    other.summary["weights_sha256"] = "f" * 64
    return [*runs, RunResults.load(rewrite(other))]
