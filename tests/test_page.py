"""report.html and comparisons: read as HTML, and looked at in a browser where there is one."""

import dataclasses
import io
import itertools
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from cachefreeze import figures
from cachefreeze.account import COST, SAVED, WHOLE, spent, ways
from cachefreeze.compare import comparison_lines, comparison_page, differing_settings
from cachefreeze.errors import UserError
from cachefreeze.markup import FORMATS
from cachefreeze.page import WORDS, report, write_report
from cachefreeze.planner import efficiency
from cachefreeze.record import Record
from cachefreeze.report import RESULT, closing_words, opening_words
from cachefreeze.train import main

from .browser import PROGRAM, Browser
from .conftest import write_images
from .interrupter import Interrupter

ROOT = Path(__file__).parents[1]
TITLES = {
    "rates": "Rate of every unit",
    "seconds": "Seconds of every epoch",
    "frontier": "Frozen units, and where rows come from",
    "learning": "Accuracy and loss",
    "store": "Size of the store",
    "predicted": "Predicted beside actual",
}
EPOCHS = 4


class Runs:
    """Real runs on the small images, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        write_images(self.images / "train", 50, seed=1)
        write_images(self.images / "val", 11, seed=2)

    def argv(self, name: str, *options: object) -> list[str]:
        words = ["--arch", "wrn10_1", "--epochs", EPOCHS, "--t0", 0.2, "--schedule", "linear"]
        words += ["-b", 32, "-j", 0, "--precision", "fp32", "--cache-policy", "eager"]
        words += ["--dataset", "imagefolder", "--data-dir", self.images, "--image-size", 32]
        words += ["--cache-dir", self.folder / "cache", "--output-dir", self.folder / name]
        return [str(word) for word in (*words, *options)]

    def __call__(self, name: str, *options: object) -> Path:
        folder = self.folder / name
        if not folder.exists():
            assert main(self.argv(name, *options)) == 0
        return folder

    def cached(self) -> Path:
        return self("cached", "--cache-max-gb", 0.05)

    def without(self) -> Path:
        return self("without", "--no-cache")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


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
        numbers: of every `data` element its attributes and its text.
        loose: what is written outside of numbers, names, and pictures.
        figures: title of each, the `aria-label` of its picture or None, and its caption.
        links: whatever might be fetched.
        scripts: how many.
    """

    LOADING = ("src", "srcset", "href", "xlink:href", "action", "data", "poster")

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.numbers: list[tuple[dict[str, str | None], str]] = []
        self.loose: list[str] = []
        self.figures: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.scripts = 0
        self.ids: list[str] = []
        self._open: list[str] = []
        self.text = page.decode()
        self.feed(self.text)
        assert self._open == [], "every element is closed"

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
        if tag == "data":
            self.numbers.append((attributes, ""))
        if tag not in ("meta",):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = set(self._open)
        if "data" in inside:
            attributes, text = self.numbers[-1]
            self.numbers[-1] = attributes, text + data
        elif not inside & {"code", "pre", "svg", "style", "title", "h1", "th"}:
            self.loose.append(data)
        if "h3" in inside:
            self.figures[-1]["title"] = (self.figures[-1]["title"] or "") + data
        if "figcaption" in inside:
            self.figures[-1]["caption"] = (self.figures[-1]["caption"] or "") + data

    @property
    def drawn(self) -> list[str | None]:
        return [each["title"] for each in self.figures if each["label"]]


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_bytes())


def check_numbers(page: Page) -> None:
    """Every number in a page is one of the files that it names, written as numbers are."""
    assert page.numbers
    for attributes, text in page.numbers:
        value = file_value(attributes["data-run"], attributes["data-from"])
        if "data-by" in attributes:
            value /= file_value(attributes["data-by-run"], attributes["data-by"])
        assert float(attributes["value"] or "nan") == value
        assert text == FORMATS[attributes["data-as"] or ""](value)
    for text in page.loose:  # "4/5": how many there are is the length of a list
        assert not re.search(r"\d", re.sub(r"^/\d+$", "", text)), text


def file_value(folder: str | None, places: str | None) -> float:
    """Read from the files here, not by the code that made the page: `a + b - c`."""
    assert folder is not None
    assert places is not None
    total = 0.0
    for sign, place in re.findall(r"(^|[+-]) ?(\S+)", places):
        total += -number_at(folder, place) if sign == "-" else number_at(folder, place)
    return total


def number_at(folder: str, place: str) -> float:
    name, *keys = place.split(".")
    path = Path(folder) / {"summary": "summary.json", "metrics": "metrics.jsonl"}[name]
    content = path.read_text()
    value: Any = (
        [json.loads(line) for line in content.splitlines()]
        if name == "metrics"
        else json.loads(content)
    )
    for key in keys:
        value = value[int(key) if isinstance(value, list) else key]
    return float(value)


def test_a_run_leaves_a_page_with_every_figure_and_says_where(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs("announced")
    assert capsys.readouterr().out.splitlines()[-1] == f"report    {folder / 'report.html'}"
    page = read(runs.cached())
    assert page.drawn == list(TITLES.values())
    for each in page.figures:
        assert each["label"]
        assert each["caption"]


def test_every_number_in_the_page_is_one_of_its_run(runs: Runs) -> None:
    for folder in (runs.cached(), runs.without()):
        check_numbers(read(folder))
    shown = {each["data-from"] for each, _ in read(runs.cached()).numbers}
    expected = {"val_accuracy", "best_val_accuracy", "wall_seconds", "train_seconds"}
    assert {f"summary.{name}" for name in expected} <= shown
    for way in ways(Record.load(runs.cached()).summary):
        assert {way.best, way.predicted} <= shown
    assert {f"metrics.{epoch}.val_accuracy" for epoch in range(EPOCHS)} <= shown


def test_what_was_run_is_told_as_the_run_told_it(runs: Runs) -> None:
    record = Record.load(runs.cached())
    page = read(runs.cached()).text
    for line in opening_words(record.args, record.summary["units"], **record.summary["about"]):
        assert f"<code>{line[10:]}</code>" in page
    assert "--arch wrn10_1 --epochs 4" in page


def test_a_page_asks_for_nothing_and_runs_nothing(runs: Runs) -> None:
    page = read(runs.cached())
    assert page.links == []
    assert page.scripts == 0
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.text
    assert "@import" not in page.text
    assert not re.search(r"url\((?!#)", page.text)


def test_ids_of_figures_do_not_run_into_each_other(runs: Runs) -> None:
    page = read(runs.cached())
    assert len(set(page.ids)) == len(page.ids)
    for target in re.findall(r'(?:url\(|href=")#([^)"]+)', page.text):
        assert target in page.ids


def test_colours_are_those_of_the_page_light_or_dark(runs: Runs) -> None:
    text = read(runs.cached()).text
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
            stacked = [seen @ linear(figures.COLOURS[figures.PARTS[p]][which]) for p in PARTS]
            for one, other in itertools.pairwise(stacked):
                assert np.abs(perceived(one) - perceived(other)).max() > 0.12


PARTS = [name for name in figures.PARTS if name != "training"]
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


def copied(folder: Path, to: Path, change: Callable[[Record], None]) -> Path:
    """A run's files with a change."""
    record = Record.load(folder)
    change(record)
    to.mkdir()
    (to / "args.json").write_text(json.dumps(record.args))
    (to / "summary.json").write_text(json.dumps(record.summary))
    (to / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in record.metrics))
    return to


def as_of_an_older_version(record: Record) -> None:
    for name in ("about", "numerics", "freeze_steps", "initial_rates"):
        del record.summary[name]
    del record.summary["cache"]["max_bytes"]
    del record.args["report"]
    for line in record.metrics:
        for name in ("prefix_seconds", "read_seconds", "store_bytes"):
            del line[name]


def as_of_a_gpu(record: Record) -> None:
    record.summary["numerics"]["device"] = "mps"
    record.summary["plan"]["actual"] |= dict.fromkeys(("freezing_only", "limit", "efficiency"))
    for line in record.metrics:
        line["prefix_seconds"] = line["read_seconds"] = 0.0


@pytest.mark.parametrize("change", [as_of_an_older_version, as_of_a_gpu])
def test_parts_that_were_not_measured_are_not_made_up(
    runs: Runs, tmp_path: Path, change: Callable[[Record], None]
) -> None:
    folder = copied(runs.cached(), tmp_path / "run", change)
    write_report(folder)
    page = read(folder)
    assert page.drawn == list(TITLES.values())
    check_numbers(page)
    (seconds,) = (each for each in page.figures if each["title"] == TITLES["seconds"])
    assert "parts of a training step were not timed" in (seconds["caption"] or "")
    assert 'id="seconds-training"' in page.text
    assert 'id="seconds-suffix"' not in page.text


@pytest.mark.parametrize(
    ("name", "options", "left_out"),
    [
        ("without", ["--no-cache"], ["store", "predicted"]),
        ("unfrozen", ["--no-freeze", "--no-cache", "--epochs", 1], None),
        ("first", ["--freeze-first", 2, "--epochs", 2], []),
    ],
)
def test_a_figure_that_would_say_nothing_is_left_out_with_a_sentence(
    runs: Runs, name: str, options: list[object], left_out: list[str] | None
) -> None:
    left_out = ["frontier", "store", "predicted"] if left_out is None else left_out
    page = read(runs(name, *options))
    check_numbers(page)
    assert [each["title"] for each in page.figures] == list(TITLES.values())
    absent = [each for each in page.figures if not each["label"]]
    assert [each["title"] for each in absent] == [TITLES[which] for which in left_out]
    assert all((each["caption"] or "").startswith("Left out: ") for each in absent)


def test_a_resumed_run_counts_what_came_before(runs: Runs, interrupt: Interrupter) -> None:
    # In the third epoch of five steps.
    interrupt(13)
    assert main(runs.argv("resumed", "--no-cache")) == 130
    interrupt.no_more()
    assert not (runs.folder / "resumed" / "report.html").exists()
    assert main(["--resume", str(runs.folder / "resumed")]) == 0
    page = read(runs.folder / "resumed")
    check_numbers(page)
    assert "summary.resumed_at.0" in {each["data-from"] for each, _ in page.numbers}
    record = Record.load(runs.folder / "resumed")
    for line in record.metrics:
        assert 0 < line["prefix_seconds"] < line["train_seconds"]
    counted = sum(line["prefix_seconds"] for line in record.metrics)
    assert counted < record.summary["cache"]["compute_seconds"]


def test_an_epoch_says_what_it_took_from_the_store_and_how_large_that_is(runs: Runs) -> None:
    cached, without = Record.load(runs.cached()), Record.load(runs.without())
    events = cached.summary["cache"]["boundaries"]
    for line in cached.metrics:
        assert line["read_seconds"] > 0
        held = [event["bytes"] for event in events if event["step"] <= line["step"]]
        assert line["store_bytes"] == held[-1]
    assert cached.summary["cache"]["max_bytes"] == 0.05e9
    for line in without.metrics:
        assert (line["read_seconds"], line["store_bytes"]) == (0, 0)
        assert line["prefix_seconds"] > 0


def test_the_parts_of_a_runs_time_are_all_of_it(runs: Runs) -> None:
    for folder in (runs.cached(), runs.without()):
        record, page = Record.load(folder), read(folder)
        parts = spent(record.summary)
        seconds = {name: record.at(at) for name, at in parts.items()}
        assert sum(seconds.values()) == pytest.approx(record.summary["wall_seconds"])
        assert seconds["the rest"] > 0
        shown = [each["data-from"] for each, _ in page.numbers]
        first = shown.index("summary.train_seconds")
        assert shown[first : first + len(parts) + 1] == [*parts.values(), WHOLE]


def test_other_times_are_the_runs_own_but_for_freezing_and_the_cache(runs: Runs) -> None:
    record = Record.load(runs.cached())
    plan, (own, only, none, limit) = record.summary["plan"], ways(record.summary)
    assert [each.known for each in (own, only, none, limit)] == [
        "measured",
        "estimated",
        "predicted",
        "estimated",
    ]
    # By the planning's own arithmetic, which knows nothing of loading and checkpoints.
    three = [record.at(each.best) for each in (only, own, limit)]
    assert efficiency(*three) == pytest.approx(plan["actual"]["efficiency"])
    assert three[0] - three[2] == pytest.approx(
        plan["actual"]["freezing_only"] - plan["actual"]["limit"]
    )
    loading = record.summary["wall_seconds"] - plan["actual"]["seconds"]
    assert own.predicted is not None
    assert record.at(own.predicted) == pytest.approx(plan["predicted"]["seconds"] + loading)
    assert record.at(none.best) == pytest.approx(
        plan["predicted"]["no_freezing"] + loading - record.summary["profile_seconds"]
    )
    assert list(spent(Record.load(runs.without()).summary)) == [
        "training",
        "validation",
        "the rest",
    ]
    (alone,) = ways(Record.load(runs.without()).summary)[:1]
    assert (alone.known, alone.predicted) == ("measured", None)
    assert [each.known for each in ways(Record.load(runs.without()).summary)[1:]] == [""] * 3


def test_of_a_run_that_went_on_the_plan_says_nothing_of_the_whole_of_others(
    runs: Runs, tmp_path: Path
) -> None:
    def resumed(record: Record) -> None:
        cheap(record)
        record.summary["resumed_at"] = [3]

    folder = copied(runs.cached(), tmp_path / "run", resumed)
    write_report(folder)
    check_numbers(read(folder))
    own, only, *others = ways(Record.load(folder).summary)
    assert own.predicted is not None
    assert (only.known, only.predicted) == ("estimated", None)
    assert [each.known for each in others] == ["", ""]
    assert "until it went on after it was cut off" in read(folder).text
    assert not re.search(r"efficiency|more than it saves", "\n".join(told(folder)))
    assert "summary.plan.actual.efficiency" not in read(folder).text
    assert "until it went on" not in read(runs.cached()).text


def test_where_nothing_was_predicted_there_is_no_column_of_it(runs: Runs, tmp_path: Path) -> None:
    def unplanned(record: Record) -> None:
        record.summary["plan"] = None

    folder = copied(runs.cached(), tmp_path / "run", unplanned)
    write_report(folder)
    assert ">predicted</th>" not in read(folder).text
    assert ">predicted</th>" in read(runs.cached()).text


def told(folder: Path) -> list[str]:
    record = Record.load(folder)
    return closing_words(record.summary, record.args, folder, "python", exact=True)


def dear(record: Record) -> None:
    summary = record.summary
    summary["cache"]["saved_seconds"] = summary["profile_seconds"] - 1.5
    summary["wall_seconds"] += 10.0
    summary["plan"]["actual"]["efficiency"] = -1.94
    summary["plan"]["predicted"] |= {"seconds": 7.5, "freezing_only": 5.0, "limit": 4.0}
    summary["plan"]["predicted"]["efficiency"] = -2.5


def cheap(record: Record) -> None:
    record.summary["cache"]["saved_seconds"] = record.summary["profile_seconds"] + 1.0
    record.summary["plan"]["actual"]["efficiency"] = 0.5


def test_a_cache_that_costs_more_than_it_saves_says_how_much(runs: Runs, tmp_path: Path) -> None:
    folder = copied(runs.cached(), tmp_path / "dear", dear)
    write_report(folder)
    assert "more than it saved (estimated)" in read(folder).text
    costs = [text for each, text in read(folder).numbers if each["data-from"] == COST]
    assert costs == ["1.5 s"]
    check_numbers(read(folder))
    assert not re.search(r"[^\d]-\d", " ".join(text for _, text in read(folder).numbers))
    lines = "\n".join(told(folder))
    assert "cache     cost more than it saved: 1.5 s (estimated)" in lines
    assert "the cache costs 2.5 s more than it saves (predicted)" in lines
    assert "efficiency" not in lines
    folder = copied(runs.cached(), tmp_path / "cheap", cheap)
    lines = "\n".join(told(folder))
    assert "cache     saved 1.0 s (estimated)" in lines
    assert "; efficiency 0.50 (estimated)" in lines


def test_what_is_told_of_a_quiet_run_are_all_facts_and_no_hints(runs: Runs) -> None:
    lines = told(runs.cached())
    hints = lines.index("what to type next:")
    assert [line for line in lines if line.startswith(RESULT)] == lines[1 : hints - 1]
    assert {line.split()[0] for line in lines[1 : hints - 1]} >= {"cache", "plan", "time", "store"}


def test_the_first_use_of_a_word_leads_to_what_it_means(runs: Runs, tmp_path: Path) -> None:
    folder = copied(runs.cached(), tmp_path / "run", cheap)
    write_report(folder)
    body, words = read(folder).text.split("<body>")[1].split("<h2>Words</h2>")
    # What was typed, headings, and pictures are not the page's sentences.
    body = re.sub(r"<(pre|code|svg|h\d|details)\b.*?</\1>", "", body, flags=re.DOTALL)
    for word in WORDS:
        anchor = f"word-{word.replace(' ', '-')}"
        assert f'<dt id="{anchor}">' in words
        before, link, _ = body.partition(f'<a href="#{anchor}">')
        assert link, f"nothing leads to {word}"
        said = re.sub(r"<[^>]*>", "", before)
        assert not re.search(rf"\b{word.removesuffix('e')}", said, re.IGNORECASE), word


def test_runs_that_were_measured_stand_beside_it(runs: Runs, tmp_path: Path) -> None:
    folder = copied(runs.cached(), tmp_path / "run", lambda record: None)
    unfrozen = runs("unfrozen for as long", "--no-freeze", "--no-cache")
    write_report(folder, {"freezing only": runs.without(), "no freezing": unfrozen})
    page = read(folder)
    check_numbers(page)
    ratios = [each for each, _ in page.numbers if each["data-from"] == "summary.wall_seconds"]
    assert {str(runs.without()), str(unfrozen)} <= {each["data-run"] for each in ratios}
    assert not [each for each, _ in page.numbers if SAVED in (each["data-from"] or "")]
    bars = re.search(r"<svg[^>]*Bars of .*?</svg>", page.text, re.DOTALL)
    assert bars
    assert not is_hollow(bars[0], "predicted-whole-1-actual"), "it was measured"
    assert not is_hollow(bars[0], "predicted-whole-2-actual")
    assert is_hollow(bars[0], "predicted-whole-3-actual"), "the limit is estimated"
    with pytest.raises(UserError, match="no run with freezing only"):
        write_report(folder, {"freezing only": unfrozen})
    short = runs("unfrozen", "--no-freeze", "--no-cache", "--epochs", 1)
    with pytest.raises(UserError, match="was run with epochs 1"):
        write_report(folder, {"no freezing": short})


def test_sixty_units_with_names_that_mean_harm(runs: Runs, tmp_path: Path) -> None:
    folder = copied(runs.cached(), tmp_path / "run", with_sixty_units)
    write_report(folder)
    page = read(folder)
    check_numbers(page)
    assert page.scripts == 0
    assert page.drawn == list(TITLES.values())
    assert "<b>bold</b>" not in page.text
    assert ">cost_$1$</text>" in page.text


def with_sixty_units(record: Record) -> None:
    summary, units = record.summary, 60
    names = [f"denseblock{1 + n // 20}_layer{1 + n % 20}" for n in range(units)]
    names[0] = "<script>alert(1)</script>"
    names[3] = "cost_$1$"  # one of those that there is room for
    summary["units"] = names
    steps = [1 + n * summary["steps"] // units for n in range(units - 1)]
    summary["freeze_steps"] = [*steps, summary["steps"]]
    summary["initial_rates"] = [0.1] * units
    summary["frozen_units"] = units - 1
    event = summary["cache"]["boundaries"][-1]
    summary["cache"]["boundaries"] = [
        event | {"step": step, "boundary": n + 1, "unit": names[n]} for n, step in enumerate(steps)
    ]
    record.args["network"] = "<b>bold</b>"
    for line in record.metrics:
        line["lr"] = [0.01] * units


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
    svg = figures.seconds({"suffix": [4.0, 1.0], "validation": [1.0, 1.0], "reading": [0.0, 0.0]})
    floor, one, four = levels(svg, "seconds-suffix")
    assert floor - four == pytest.approx(4 * (floor - one), rel=1e-3)
    second = floor - one
    assert levels(svg, "seconds-validation") == pytest.approx(
        [floor - second * top for top in (1, 2, 4, 5)], rel=1e-3
    )
    assert "seconds-reading" not in svg, "what took no time is not named"


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


def test_curves_are_the_rates_that_the_run_had(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    real = figures.rates

    def watched(curves: Any, names: Any, freezes: Any, end: float) -> str:
        drawn.update(curves=curves, freezes=freezes)
        return real(curves, names, freezes, end)

    monkeypatch.setattr(figures, "rates", watched)
    record = Record.load(runs.cached())
    report(record, {})
    for unit, curve in enumerate(drawn["curves"]):
        times, values = zip(*curve, strict=True)
        for line in record.metrics:
            there = np.interp(line["epoch"], times, values, right=0.0)
            assert there == pytest.approx(line["lr"][unit], abs=0.01 * max(values))
    # Linear from a fifth of twenty steps on, five steps an epoch.
    assert drawn["freezes"] == pytest.approx([0.8, 1.6, 2.4, 3.2, None])


def test_the_boundary_follows_the_stores_within_an_epoch() -> None:
    svg = figures.frontier([(1.0, 1.0), (3.0, 2.0)], [(1.5, 1.0), (4.0, 1.0)], 4, 4.0)
    trained, served = corners(svg, "frontier-suffix"), corners(svg, "frontier-reading")
    width, left = trained[:, 0].max() - trained[:, 0].min(), trained[:, 0].min()
    height = trained[:, 1].max() - trained[:, 1].min()
    assert height > 0
    assert ">from the cache</text>" in svg
    assert ">from the cache</text>" not in figures.frontier([(1.0, 1.0)], [(4.0, 0.0)], 4, 4.0)
    rises = served[served[:, 1] < served[:, 1].max() - 1e-3]
    assert (rises[:, 0].min() - left) / width == pytest.approx(1.5 / 4, rel=1e-3)


def test_predicted_and_actual_bars_are_to_one_scale() -> None:
    svg = figures.predicted(
        [("this run", 10.0, 5.0, False), ("no freezing", 20.0, None, False)], []
    )
    long, short = (
        np.ptp(corners(svg, f"predicted-whole-0-{w}")[:, 0]) for w in ("predicted", "actual")
    )
    assert long == pytest.approx(2 * short, rel=1e-3)
    assert "predicted-whole-1-actual" not in svg
    assert "estimated" not in svg
    assert ">time of the run, seconds</text>" in svg
    svg = figures.predicted([("limit", 10.0, 5.0, True)], [("after stem", 2.0, 1.0, False)])
    assert is_hollow(svg, "predicted-whole-0-actual")
    assert not is_hollow(svg, "predicted-filling-0-actual")
    assert ">estimated</text>" in svg


def test_a_budget_far_above_the_store_does_not_flatten_it() -> None:
    sizes = [(0.0, 100e6)]
    assert 'id="store-budget"' in figures.store(sizes, 200e6, 4.0)
    assert 'id="store-budget"' not in figures.store(sizes, 50e9, 4.0)


def test_a_loss_of_zero_can_be_drawn() -> None:
    assert 'id="learning-accuracy"' in figures.learning([1.0, 0.0], [2.0, 0.0], [0.5, 1.0])


def test_the_same_run_gives_the_same_page(runs: Runs) -> None:
    record = Record.load(runs.cached())
    assert report(record, {}) == report(record, {})


def test_what_the_user_told_matplotlib_does_not_matter(runs: Runs) -> None:
    import matplotlib

    record = Record.load(runs.cached())
    page = report(record, {})
    with matplotlib.rc_context({"text.color": "red", "axes.labelpad": 40, "xtick.major.size": 20}):
        assert report(record, {}) == page
        assert matplotlib.rcParams["text.color"] == "red"


def test_without_matplotlib_a_run_ends_well_and_says_how_to_get_its_page(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: Script
) -> None:
    """In a process in which it cannot be imported."""
    code = "import sys; sys.modules['matplotlib'] = None; from cachefreeze.train import main; "
    argv = [*runs.argv("plain"), "--output-dir", str(tmp_path / "run"), "--epochs", "1"]
    command = [sys.executable, "-c", f"{code}sys.exit(main({argv!r}))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = done.stdout.splitlines()[-1]
    assert told.startswith(
        "report    none: reports need matplotlib: pip install matplotlib; then: "
    )
    again = told.partition("then: ")[2].split()
    assert again[1:] == ["scripts/write_report.py", str(tmp_path / "run")]
    assert script(again[1], *again[2:]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report.html'}\n"
    assert read(tmp_path / "run").drawn


def test_drawing_that_fails_takes_nothing_from_a_run(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object) -> str:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(figures, "learning", broken)
    assert main([*runs.argv("x"), "--output-dir", str(tmp_path / "run"), "--epochs", "1"]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert "report    none: it could not be drawn (ZeroDivisionError: a bug); to see why: " in told
    assert Record.load(tmp_path / "run").summary["epochs"] == 1
    assert not (tmp_path / "run" / "report.html").exists()


def test_no_report_draws_none(runs: Runs) -> None:
    assert not (runs("undrawn", "--no-report", "--epochs", 1) / "report.html").exists()


def damaged_json(record: Path) -> None:
    (record / "summary.json").write_text('{"epochs": 4')


def no_metrics(record: Path) -> None:
    (record / "metrics.jsonl").write_text("")


def text_for_a_number(record: Path) -> None:
    content = json.loads((record / "summary.json").read_text())
    (record / "summary.json").write_text(json.dumps(content | {"val_accuracy": "<b>"}))


def not_a_number(record: Path) -> None:
    content = json.loads((record / "summary.json").read_text())
    (record / "summary.json").write_text(json.dumps(content | {"wall_seconds": float("nan")}))


def other_units(record: Path) -> None:
    content = json.loads((record / "summary.json").read_text())
    (record / "summary.json").write_text(json.dumps(content | {"units": ["stem"]}))


def unfinished(record: Path) -> None:
    (record / "summary.json").unlink()


def no_run(record: Path) -> None:
    (record / "args.json").unlink()


@pytest.mark.parametrize(
    ("hurt", "named"),
    [
        (damaged_json, "summary.json is damaged"),
        (no_metrics, "metrics.jsonl is not of the run"),
        (text_for_a_number, "val_accuracy is '<b>', and should be a number"),
        (not_a_number, "wall_seconds is nan, and should be a number"),
        (other_units, "metrics.jsonl is not of the run"),
        (unfinished, "has not come to its end: go on with it first (--resume"),
        (no_run, "holds no run"),
    ],
)
def test_files_that_are_not_a_runs_are_one_sentence(
    runs: Runs, tmp_path: Path, hurt: Callable[[Path], None], named: str
) -> None:
    folder = copied(runs.cached(), tmp_path / "run", lambda record: None)
    hurt(folder)
    with pytest.raises(UserError, match=re.escape(named)):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_comparison_shows_times_weights_and_what_differs(runs: Runs) -> None:
    folders = [runs.without(), runs.cached(), runs("seed", "--seed", 1, "--no-report")]
    records = [Record.load(folder) for folder in folders]
    lines = comparison_lines(records)
    assert [line.split()[0] for line in lines[:4]] == ["run", "without", "cached", "seed"]
    letters = [line.split()[-2] for line in lines[1:4]]
    assert letters == ["A", "A", "B"]
    wall = [record.summary["wall_seconds"] for record in records]
    for line, seconds in zip(lines[1:4], wall, strict=True):
        assert f" {wall[0] / seconds:.2f}x " in line
    differing = dict(differing_settings(records))
    assert set(differing) == {"cache", "seed", "cache_max_gb"}
    assert differing["cache"] == ["false", "true", "true"]
    page = Page(comparison_page(records))
    check_numbers(page)
    assert {line.split()[-3] for line in lines[1:4]} == {"4/5"}
    assert page.text.count("</data>/5<") == 3
    assert "</data>/5<" in read(runs.cached()).text
    assert page.drawn == ["Accuracy against time"]
    assert page.scripts == 0
    assert page.links == []


def test_compare_runs_prints_a_table_and_writes_a_page(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: Script
) -> None:
    page = tmp_path / "both.html"
    assert script("scripts/compare_runs.py", runs.without(), runs.cached(), "--html", page) == 0
    records = [Record.load(folder) for folder in (runs.without(), runs.cached())]
    told = capsys.readouterr().out.splitlines()
    assert told == [*comparison_lines(records), "", str(page)]
    assert Page(page.read_bytes()).drawn == ["Accuracy against time"]
    for words, named in (
        ((runs.cached(), tmp_path), "holds no run"),
        ((runs.cached(), runs.cached() / "." / ""), "is named twice: name each run once"),
        ((runs.cached(), runs.folder / "x" / ".." / "cached"), "is named twice"),
        ((runs.cached(), "--html", tmp_path), "cannot be written (Is a directory)"),
    ):
        assert script("scripts/compare_runs.py", *words) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert named in told


def test_runs_of_the_same_name_are_told_apart_by_their_folders(runs: Runs, tmp_path: Path) -> None:
    record = Record.load(runs.cached())
    two = [dataclasses.replace(record, folder=tmp_path / part / "run") for part in "ab"]
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
    runs: Runs, browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    many = copied(runs.cached(), tmp_path / "many", with_sixty_units)
    write_report(many)
    compared = tmp_path / "compared.html"
    compared.write_bytes(comparison_page([Record.load(f) for f in (runs.cached(), runs.without())]))
    for path in (runs.cached() / "report.html", many / "report.html", compared):
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
