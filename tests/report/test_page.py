"""report.html, the lines of a run, and comparisons: read as text and as HTML, and looked at in a
browser where there is one."""

import dataclasses
import io
import itertools
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from cachefreeze.errors import UserError
from cachefreeze.report import figures
from cachefreeze.report.compare import comparison_lines, comparison_page, differing_settings
from cachefreeze.report.html_report import WORDS, report, write_report
from cachefreeze.report.run_results import RunResults
from cachefreeze.report.summary_text import (
    RESULT,
    closing_words,
    duration,
    epoch_line,
    fill_line,
    forecast_line,
    opening_words,
    plan_words,
)
from cachefreeze.report.time_breakdown import Way, spent, ways
from tests.support.browser import PROGRAM, Browser
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


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Runs a script as the command line does; returns its exit code."""

    def run(path: str, *words: object) -> int:
        monkeypatch.setattr(sys, "argv", [path, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        assert isinstance(end.value.code, int)
        return end.value.code

    return run


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


@pytest.fixture
def cached(tmp_path: Path) -> RunResults:
    return make_run(tmp_path / "cached")


def test_every_figure_is_drawn_and_says_what_it_shows(cached: RunResults) -> None:
    page = drawn(cached)
    assert page.drawn == list(TITLES.values())
    assert [name for name in TITLES if f'id="{name}-figure_1"' in page.text] == list(TITLES)
    for each in page.figures:
        assert each["label"]
        assert each["caption"]


def test_the_page_says_the_numbers_of_its_run(cached: RunResults) -> None:
    words, summary = drawn(cached).words, cached.summary
    assert words.count("92.50% of the validation images are right") == 1
    assert "99.44% in the best epoch" in words
    assert f"{duration(summary['wall_seconds'])} is the time of the run" in words
    assert "7/8 units are frozen in the end" in words
    assert "10,200 of 10,782 rows came from it" in words
    for line in cached.metrics:
        assert (
            f"{line['epoch']} {line['step']} {line['train_loss']:.4f} {line['val_loss']:.4f} "
            f"{line['val_accuracy']:.2%} {line['frozen_units']}/8 {line['rows_served']:,} "
            f"{line['rows_computed']:,} {line['seconds']:.1f} {line['images_per_second']:,.0f} "
        ) in words
    for name, rate, step in zip(
        summary["units"], summary["initial_rates"], summary["freeze_steps"], strict=True
    ):
        assert f"{name} {rate:.3g} {'never' if name == 'head' else step} " in words
    for fill in summary["cache"]["fills"]:
        assert f"{fill['step']} {fill['unit']} {fill['rows']:,} 0.3 s " in words
    assert 'data_set"' not in words
    assert '"cubic"' in words


def test_what_was_run_is_told_as_the_run_told_it(cached: RunResults) -> None:
    page = drawn(cached).text
    for line in opening_words(cached.args, cached.summary["units"], **cached.summary["about"]):
        assert f"<code>{line[10:]}</code>" in page
    assert "python -m cachefreeze.train --arch wrn" in page


def test_what_the_cache_said_is_in_the_page(cached: RunResults) -> None:
    said = "dropout in `a` & batch norms limit the cache to 12 %"
    cached.summary["cache"]["messages"] = [said]
    assert f"<code>{escape(said)}</code>" in drawn(cached).text


def test_a_page_asks_for_nothing_and_runs_nothing(cached: RunResults) -> None:
    page = drawn(cached)
    assert page.links == []
    assert page.scripts == 0
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.text
    assert "@import" not in page.text
    assert not re.search(r"url\((?!#)", page.text)


def test_ids_of_figures_do_not_run_into_each_other(cached: RunResults) -> None:
    page = drawn(cached)
    assert len(set(page.ids)) == len(page.ids)
    for target in re.findall(r'(?:url\(|href=")#([^)"]+)', page.text):
        assert target in page.ids


def test_colours_are_those_of_the_page_light_or_dark(cached: RunResults) -> None:
    text = drawn(cached).text
    for name, (light, dark) in figures.COLOURS.items():
        assert f"--{name}:{light}" in text.split("@media")[0]
        assert f"--{name}:{dark}" in text.split("@media")[1]
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert re.sub(r"var\(--[a-z]+, #[0-9a-f]{6}\)", "", drawings).count("color:") == 0
    assert not re.search(r"[ :]#[0-9a-f]{3,6}\b", re.sub(r"var\(.*?\)", "", drawings))


def test_colours_can_be_told_from_each_other_and_from_the_page() -> None:
    """Also by who sees no red or no green: the projections of Vienot, Brettel and Mollon (1999)."""
    for which in (0, 1):
        paper = luminance(linear(figures.COLOURS["paper"][which]))
        for name in ("ink", "muted"):
            assert contrast(luminance(linear(figures.COLOURS[name][which])), paper) >= 4.5
        for seen in (np.eye(3), PROTAN, DEUTAN):
            stacked = [seen @ linear(figures.COLOURS[part][which]) for part in figures.PARTS]
            for one, other in itertools.pairwise(stacked):
                assert np.abs(perceived(one) - perceived(other)).max() > 0.12


PROTAN = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
DEUTAN = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def perceived(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 1) ** (1 / 2.4)


def luminance(values: np.ndarray) -> float:
    return float(values @ [0.2126, 0.7152, 0.0722])


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"cache": False}, ["kept"]),
        ({"cache": False, "forecast": False}, ["kept", "predicted"]),
        ({"cache": False, "freeze": False}, ["frontier", "kept"]),
        ({"freeze": False, "epochs": 1}, ["frontier", "kept"]),
        ({"epochs": 1}, []),
    ],
)
def test_a_figure_that_would_say_nothing_is_left_out_with_a_sentence(
    tmp_path: Path, options: dict[str, Any], left_out: list[str]
) -> None:
    page = drawn(make_run(tmp_path / "run", **options))
    assert [each["title"] for each in page.figures] == list(TITLES.values())
    absent = [each for each in page.figures if not each["label"]]
    assert [each["title"] for each in absent] == [TITLES[which] for which in left_out]
    assert all((each["caption"] or "").startswith("Left out: ") for each in absent)


def test_a_resumed_run_says_after_which_step(cached: RunResults) -> None:
    assert "until it went on" not in drawn(cached).words
    cached.summary["resumed_at"] = [57, 1103]
    words = drawn(cached).words
    assert "after step 57, 1,103" in words
    assert "between an interruption and its resumption" in words


@pytest.mark.parametrize("cache", [True, False])
def test_the_parts_of_a_runs_time_are_all_of_it(tmp_path: Path, cache: bool) -> None:
    run = make_run(tmp_path / "run", cache=cache)
    parts, whole = spent(run.summary), run.summary["wall_seconds"]
    assert sum(parts.values()) == pytest.approx(whole)
    assert parts["the rest"] == pytest.approx(1.35)
    assert ("filling the cache" in parts) == cache
    shown = [f"{name} {duration(seconds)} " for name, seconds in parts.items()]
    assert f"{''.join(shown)}the time of the run {duration(whole)}" in re.sub(
        r"\s+", " ", drawn(run).words
    )
    told = f"time      {duration(whole)}: " + ", ".join(each.strip() for each in shown)
    assert told in told_by(run)


def test_freezing_only_is_this_time_and_what_the_cache_saved_less_filling(
    cached: RunResults,
) -> None:
    cached.summary.update(wall_seconds=30.0, fill_seconds=2.0)
    cached.summary["cache"]["seconds_saved"] = 5.0
    own, only, none, limit = ways(cached.summary)
    assert (own.name, only.name, none.name) == ("this run", "freezing only", "no freezing")
    assert (limit.name, limit.seconds) == ("limit", 28.2)
    assert (own.seconds, own.known, own.predicted) == (30.0, "measured", 29.9)
    assert (only.seconds, only.known, only.predicted) == (33.0, "estimated", 33.3)
    assert (none.seconds, none.known) == (39.1, "predicted")
    assert only.by(own) == pytest.approx(33 / 30)
    assert none.by(own) == pytest.approx(39.1 / 30)
    words = drawn(cached).words
    assert "1.10x as fast as freezing only (estimated)" in words
    assert "1.30x as fast as no freezing (predicted)" in words
    beside = "freezing only 33.0 s (estimated), no freezing 39.1 s (predicted), limit 28.2 s"
    assert f"          {beside} (predicted)" in told_by(cached)
    assert "plan      29.9 s predicted, 30.0 s taken (+0%)" in told_by(cached)


def test_each_way_to_train_is_set_beside_its_own_prediction(tmp_path: Path) -> None:
    only = make_run(tmp_path / "only", cache=False).summary
    none = make_run(tmp_path / "none", cache=False, freeze=False).summary
    assert [way.name for way in ways(only)] == [
        "this run",
        "no freezing",
        "with the cache",
        "limit",
    ]
    assert ways(only)[0].predicted == 33.3
    assert ways(none)[0].predicted == 39.1


def test_where_nothing_is_known_it_says_how_to_come_by_it(tmp_path: Path) -> None:
    page = drawn(make_run(tmp_path / "run", cache=False, forecast=False))
    assert "No other times are known. scripts/write_report.py shows" in page.words
    assert "predicted</th>" not in page.text


def told_by(run: RunResults) -> list[str]:
    return closing_words(run.summary, run.args, run.folder, "python", exact=True)


def test_a_cache_that_costs_more_than_it_saves_says_how_much(cached: RunResults) -> None:
    cached.summary["cache"]["seconds_saved"] = cached.summary["fill_seconds"] - 1.5
    words = drawn(cached).words
    assert "The cache cost 1.5 s more than it saved (estimated)" in words
    assert not re.search(r"[^\d]-\d", words.split("What was run")[0])
    lines = "\n".join(told_by(cached))
    assert "cache     cost 1.5 s more than it saved (estimated)" in lines
    assert "--no-cache\n      the same weights\n" in lines
    cached.summary["cache"]["seconds_saved"] += 2.5
    lines = "\n".join(told_by(cached))
    assert "cache     saved 1.0 s (estimated), filling included; 10,200 of 10,782 rows" in lines
    assert "--no-cache\n      the same weights, in more time\n" in lines


@pytest.mark.parametrize("messages", [[], ["dropout stands in the way"]])
def test_a_cache_that_served_nothing_says_why(cached: RunResults, messages: list[str]) -> None:
    cached.summary["cache"] |= {"rows_served": 0, "rows_kept": 0, "messages": messages}
    (line,) = (line for line in told_by(cached) if line.startswith("cache"))
    assert ("warnings above" in line) == bool(messages)
    assert ("a smaller --t0" in line) == (not messages)
    assert not any("--no-cache" in line or "cache_stats" in line for line in told_by(cached))
    assert "No row came from the cache." in drawn(cached).words


def test_what_is_told_of_a_quiet_run_are_all_facts_and_no_hints(cached: RunResults) -> None:
    lines = told_by(cached)
    hints = lines.index("what to type next:")
    assert [line for line in lines if line.startswith(RESULT)] == lines[1 : hints - 1]
    assert {line.split()[0] for line in lines[1 : hints - 1]} >= {"cache", "plan", "time", "run"}
    kept = "          8,985 rows in data/cache, 16.9 MB in memory: an image has a row for each unit"
    assert any(line.startswith(kept) for line in lines)


def test_an_epoch_and_a_filling_are_a_line_each(cached: RunResults) -> None:
    names = cached.summary["units"]
    assert epoch_line(cached.metrics[0], 12, names) == (
        "epoch  1/12  loss 2.0000  val  10.00%  frozen 0/8      625 img/s"
    )
    assert epoch_line(cached.metrics[-1], 12, names) == (
        "epoch 12/12  loss 0.0139  val  92.50%  frozen 7/8    2,942 img/s  95% cached"
    )
    fill = {"step": 1570, "unit": "group1_block1", "rows": 1797, "seconds": 0.31}
    assert fill_line(fill) == "  step 1,570: kept 1,797 rows after group1_block1 in 0.3 s"


def test_a_plan_says_when_units_freeze_and_four_times() -> None:
    forecast = {"without_freezing": 150.0, "freezing_only": 120.0, "cached": 110.0, "limit": 100.0}
    lines = plan_words(["stem", "body", "head"], [0, 1157, 2300], 2300, 23, forecast, 8)
    assert lines == [
        "unit    freezes at step  epoch  share of the run",
        "stem                  0      1              0.0%",
        "body              1,157     51             50.3%",
        "head  trains to the end",
        "",
        "predicted                               time  share of freezing only",
        "no freezing                       2 min 30 s                  125.0%",
        "freezing only                     2 min 00 s                  100.0%",
        "with the cache                    1 min 50 s                   91.7%",
        "limit: frozen units cost nothing  1 min 40 s                   83.3%",
        "",
        "efficiency 0.50: the share of the saving at the limit",
        "predicted from 8 steps",
    ]
    assert forecast_line(forecast).endswith("1 min 40 s at the limit, efficiency 0.50")
    assert plan_words(["stem", "head"], [50, 100], 100, 10, None) == [
        "unit    freezes at step  epoch  share of the run",
        "stem                 50      6             50.0%",
        "head  trains to the end",
    ]
    dear = forecast | {"cached": 125.0}
    assert "the cache costs 5.0 s more than it saves" in plan_words([], [], 1, 1, dear)
    nothing = forecast | {"cached": 120.0, "limit": 120.0}
    assert "efficiency" not in forecast_line(nothing)


def test_the_first_use_of_a_word_leads_to_what_it_means(cached: RunResults) -> None:
    body, words = drawn(cached).text.split("<body>")[1].split("<h2>Words</h2>")
    # What was typed, headings, and pictures are not the page's sentences.
    body = re.sub(r"<(pre|code|svg|h\d|details)\b.*?</\1>", "", body, flags=re.DOTALL)
    for word in WORDS:
        anchor = f"word-{word.replace(' ', '-')}"
        assert f'<dt id="{anchor}">' in words
        if word == "with the cache":  # another way to train, where this run had none
            continue
        before, link, _ = body.partition(f'<a href="#{anchor}">')
        assert link, f"nothing leads to {word}"
        said = re.sub(r"<[^>]*>", "", before)
        assert not re.search(rf"\b{word}", said, re.IGNORECASE), word


def test_runs_that_were_measured_stand_beside_it(cached: RunResults, tmp_path: Path) -> None:
    only = make_run(tmp_path / "only", cache=False)
    none = make_run(tmp_path / "none", cache=False, freeze=False)
    write_report(cached.folder, {"freezing only": only.folder, "no freezing": none.folder})
    page = Page((cached.folder / "report.html").read_bytes())
    assert "estimated" not in page.words.split("The cache saved")[0]
    ratio = only.summary["wall_seconds"] / cached.summary["wall_seconds"]
    assert f"{ratio:.2f}x as fast as freezing only (measured)" in page.words
    bars = re.search(r"<svg[^>]*Bars of .*?</svg>", page.text, re.DOTALL)
    assert bars
    for number in (1, 2):
        assert not is_hollow(bars[0], f"predicted-{number}-measured"), "it was measured"
    estimated = re.search(r"<svg[^>]*Bars of .*?</svg>", drawn(cached).text, re.DOTALL)
    assert estimated
    assert is_hollow(estimated[0], "predicted-1-estimated")
    with pytest.raises(UserError, match="no run with freezing only"):
        write_report(cached.folder, {"freezing only": none.folder})
    short = make_run(tmp_path / "short", cache=False, freeze=False, epochs=1)
    with pytest.raises(UserError, match="was run with epochs 1"):
        write_report(cached.folder, {"no freezing": short.folder})


def sixty_units(folder: Path) -> RunResults:
    names = [f"denseblock{1 + n // 20}_layer{1 + n % 20}" for n in range(60)]
    names[0] = "<script>alert(1)</script>"
    names[3] = "cost_$1$"  # one of those that there is room for
    run = make_run(folder, names=names)
    run.args["network"] = "<b>bold</b>"
    run.summary["cache"]["messages"] = ["<script>alert(2)</script>"]
    return run


def test_sixty_units_with_names_that_mean_harm(tmp_path: Path) -> None:
    page = drawn(sixty_units(tmp_path / "run"))
    assert page.scripts == 0
    assert page.drawn == list(TITLES.values())
    assert "<b>bold</b>" not in page.text
    assert ">cost_$1$</text>" in page.text


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


def test_bars_are_as_high_as_their_seconds_and_stand_on_each_other() -> None:
    parts = {"training": [4.0, 1.0], "filling": [0.0, 0.0], "validation": [1.0, 1.0]}
    svg = figures.seconds(parts)
    floor, one, four = levels(svg, "seconds-training")
    assert floor - four == pytest.approx(4 * (floor - one), rel=1e-3)
    second = floor - one
    assert levels(svg, "seconds-validation") == pytest.approx(
        [floor - second * top for top in (1, 2, 4, 5)], rel=1e-3
    )
    assert "seconds-filling" not in svg, "what took no time is not named"


def test_a_freeze_is_marked_where_it_happens() -> None:
    curves = [[(0.0, 0.2), (1.0, 0.0)], [(0.0, 0.1), (3.0, 0.0)], [(0.0, 0.1), (4.0, 0.0)]]
    svg = figures.rates(curves, ["stem", "body", "head"], [1.0, 3.0, None], 4.0)
    places = []
    for number in (0, 1):
        mark = group(svg, f"rates-freeze-{number}").find(f".//{SVG}use")
        assert mark is not None
        places.append(float(mark.attrib["x"]))
        assert places[-1] == pytest.approx(corners(svg, f"rates-rate-{number}")[:, 0].max(), 1e-4)
    left, right = (
        corners(svg, "rates-rate-2")[:, 0].min(),
        corners(svg, "rates-rate-2")[:, 0].max(),
    )
    assert (places[0] - left) / (right - left) == pytest.approx(1 / 4, rel=1e-3)
    assert (places[1] - left) / (right - left) == pytest.approx(3 / 4, rel=1e-3)
    assert "rates-freeze-2" not in svg


def test_curves_are_the_rates_that_the_run_had(
    cached: RunResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    real = figures.rates

    def watched(curves: Any, names: Any, freezes: Any, end: float) -> str:
        seen.update(curves=curves, freezes=freezes)
        return real(curves, names, freezes, end)

    monkeypatch.setattr(figures, "rates", watched)
    report(cached, {})
    for unit, curve in enumerate(seen["curves"]):
        times, values = zip(*curve, strict=True)
        assert values[0] == cached.summary["initial_rates"][unit]
        freeze = cached.summary["freeze_steps"][unit] / 23
        assert (times[-1], values[-1]) == (pytest.approx(freeze), 0.0)
        assert list(times) == sorted(times)
        for line in cached.metrics[:-1]:
            there = np.interp(line["epoch"], times, values, right=0.0)
            assert there == pytest.approx(line["lr"][unit], abs=1e-9)
    steps = cached.summary["freeze_steps"][:-1]
    assert seen["freezes"] == pytest.approx([*(step / 23 for step in steps), None])


def test_units_freeze_within_an_epoch_and_rows_are_shared_out_below() -> None:
    svg = figures.frontier([1.5, 3.0], 4, [0.0, 0.0, 0.5, 1.0])
    frozen, served = corners(svg, "frontier-frozen"), corners(svg, "frontier-served")
    trained = corners(svg, "frontier-training")
    left, width = trained[:, 0].min(), np.ptp(trained[:, 0])
    assert np.ptp(trained[:, 1]) == pytest.approx(2 * np.ptp(frozen[:, 1])), "two of four"
    rises = frozen[frozen[:, 1] < frozen[:, 1].max() - 1e-3]
    assert (rises[:, 0].min() - left) / width == pytest.approx(1.5 / 4, rel=1e-3)
    above = served[served[:, 1] < served[:, 1].max() - 1e-3]
    assert (above[:, 0].min() - left) / width == pytest.approx(2 / 4, rel=1e-3)
    floor, half, whole = levels(svg, "frontier-served")
    assert floor - whole == pytest.approx(2 * (floor - half), rel=1e-3)


def test_kept_bytes_are_to_scale() -> None:
    svg = figures.kept([0.0, 60e6, 30e6])
    floor, less, more = levels(svg, "kept-bytes")
    assert floor - more == pytest.approx(2 * (floor - less), rel=1e-3)
    assert ">60 MB</text>" in svg


def test_predicted_and_measured_bars_are_to_one_scale() -> None:
    own, none = Way("this run", 5.0, "measured", 10.0), Way("no freezing", 20.0, "predicted", 20.0)
    svg = figures.predicted([own, none])
    long, short = (
        np.ptp(corners(svg, f"predicted-0-{which}")[:, 0]) for which in ("predicted", "measured")
    )
    assert long == pytest.approx(2 * short, rel=1e-3)
    assert svg.count('id="predicted-1-') == 1
    assert ">estimated</text>" not in svg
    svg = figures.predicted([own, Way("freezing only", 6.0, "estimated", None)])
    assert is_hollow(svg, "predicted-1-estimated")
    assert not is_hollow(svg, "predicted-0-measured")
    assert ">estimated</text>" in svg


def test_a_loss_of_zero_can_be_drawn() -> None:
    assert 'id="learning-accuracy"' in figures.learning([1.0, 0.0], [2.0, 0.0], [0.5, 1.0])


def test_the_same_run_gives_the_same_page_whatever_matplotlib_is_told(cached: RunResults) -> None:
    import matplotlib

    page = report(cached, {})
    with matplotlib.rc_context({"text.color": "red", "axes.labelpad": 40, "xtick.major.size": 20}):
        assert report(cached, {}) == page
        assert matplotlib.rcParams["text.color"] == "red"


def damaged_json(folder: Path) -> None:
    (folder / "summary.json").write_text('{"epochs": 4')


def no_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("")


def text_for_a_number(folder: Path) -> None:
    content = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(content | {"val_accuracy": "<b>"}))


def not_a_number(folder: Path) -> None:
    content = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(content | {"wall_seconds": float("nan")}))


def other_units(folder: Path) -> None:
    content = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(content | {"units": ["stem"]}))


def unfinished(folder: Path) -> None:
    (folder / "summary.json").unlink()


def no_run(folder: Path) -> None:
    (folder / "args.json").unlink()


def of_an_older_version(folder: Path) -> None:
    content = json.loads((folder / "summary.json").read_text())
    del content["schema"]
    (folder / "summary.json").write_text(json.dumps(content))


def half_a_forecast(folder: Path) -> None:
    content = json.loads((folder / "summary.json").read_text())
    del content["forecast"]["limit"]
    (folder / "summary.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("hurt", "named"),
    [
        (damaged_json, "summary.json is damaged"),
        (no_metrics, "metrics.jsonl does not belong to the run"),
        (text_for_a_number, "val_accuracy is '<b>', and should be a number"),
        (not_a_number, "wall_seconds is nan, and should be a number"),
        (other_units, "metrics.jsonl does not belong to the run"),
        (unfinished, "is not finished: go on with it first (--resume"),
        (no_run, "holds no run"),
        (of_an_older_version, "another version of cachefreeze made this run, so show it with that"),
        (half_a_forecast, "forecast.limit is None, and should be a number"),
    ],
)
def test_files_that_are_not_a_runs_are_one_sentence(
    cached: RunResults, hurt: Callable[[Path], None], named: str
) -> None:
    hurt(cached.folder)
    with pytest.raises(UserError, match=re.escape(named)) as raised:
        write_report(cached.folder)
    assert "\n" not in str(raised.value)
    assert not (cached.folder / "report.html").exists()


def three_runs(folder: Path) -> list[RunResults]:
    runs = [make_run(folder / "without", cache=False), make_run(folder / "cached")]
    other = make_run(folder / "seed")
    other.args["seed"] = 1
    other.summary["weights_sha256"] = "f" * 64
    return [*runs, RunResults.load(rewrite(other))]


def test_a_comparison_shows_times_weights_and_what_differs(tmp_path: Path) -> None:
    runs = three_runs(tmp_path)
    lines = comparison_lines(runs)
    assert [line.split()[0] for line in lines[:4]] == ["run", "without", "cached", "seed"]
    assert [line.split()[-2] for line in lines[1:4]] == ["A", "A", "B"]
    wall = [run.summary["wall_seconds"] for run in runs]
    for line, seconds in zip(lines[1:4], wall, strict=True):
        assert f" {wall[0] / seconds:.2f}x " in line
    differing = {name: values for name, *values in differing_settings(runs)}
    assert differing == {"cache": ["false", "true", "true"], "seed": ["-", "-", "1"]}
    page = Page(comparison_page(runs))
    for line in lines[1:4]:
        assert re.sub(r"\s+", " ", line) in re.sub(r"\s+", " ", page.words)
    assert page.drawn == ["Accuracy against time"]
    assert page.scripts == 0
    assert page.links == []
    assert comparison_lines(runs[1:2])[-1] == "all settings are the same"


def test_compare_runs_prints_a_table_and_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: Script
) -> None:
    without, cached, _ = runs = three_runs(tmp_path)
    page = tmp_path / "both.html"
    assert script("scripts/compare_runs.py", without.folder, cached.folder, "--html", page) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [*comparison_lines(runs[:2]), "", str(page)]
    assert Page(page.read_bytes()).drawn == ["Accuracy against time"]
    for words, named in (
        ((cached.folder, tmp_path), "holds no run"),
        ((cached.folder, cached.folder / "." / ""), "is named twice: name each run once"),
        ((cached.folder, tmp_path / "seed" / ".." / "cached"), "is named twice"),
        ((cached.folder, "--html", tmp_path), "cannot be written (Is a directory)"),
    ):
        assert script("scripts/compare_runs.py", *words) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1
        assert named in told[0]


def test_write_report_sets_measured_runs_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: Script
) -> None:
    without, cached, _ = three_runs(tmp_path)
    words = (cached.folder, "--freezing-only", without.folder)
    assert script("scripts/write_report.py", *words) == 0
    path = cached.folder / "report.html"
    assert capsys.readouterr().out == f"{path}\n"
    assert "as fast as freezing only (measured)" in Page(path.read_bytes()).words
    assert script("scripts/write_report.py", tmp_path) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_pictures_can_be_taken_out_of_a_report(
    cached: RunResults, tmp_path: Path, script: Script
) -> None:
    folder = tmp_path / "figures"
    assert script("scripts/doc_figures.py", "run", cached.folder, folder, *TITLES) == 0
    for name in TITLES:
        root = ElementTree.parse(tmp_path / "figures" / f"{name}.svg").getroot()
        assert root.tag == f"{SVG}svg"
        assert "--paper:" in (root[0].text or "")
    assert script("scripts/doc_figures.py", "run", cached.folder, tmp_path, "store") == 2


def test_runs_of_the_same_name_are_told_apart_by_their_folders(
    cached: RunResults, tmp_path: Path
) -> None:
    two = [dataclasses.replace(cached, folder=tmp_path / part / "run") for part in "ab"]
    assert [line.split()[0] for line in comparison_lines(two)[1:3]] == ["a/run", "b/run"]


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
