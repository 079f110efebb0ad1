"""Runs beside each other, and the scripts that set them so."""

import dataclasses
import re
from pathlib import Path

import pytest

from cachefreeze.errors import UserError
from cachefreeze.report.compare import comparison_lines, comparison_page, differing_settings
from cachefreeze.report.html_report import write_report
from cachefreeze.report.run_results import RunResults
from tests.report.harness import Page, Script, drawn, is_hollow, three_runs
from tests.support.run_files import make_run


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


def test_runs_of_the_same_name_are_told_apart_by_their_folders(
    cached: RunResults, tmp_path: Path
) -> None:
    two = [dataclasses.replace(cached, folder=tmp_path / part / "run") for part in "ab"]
    assert [line.split()[0] for line in comparison_lines(two)[1:3]] == ["a/run", "b/run"]
