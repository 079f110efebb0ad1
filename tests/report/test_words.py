"""Lines that a run prints, and times that are told of it."""

import re
from pathlib import Path

import pytest

from cachefreeze.report.run_results import RunResults
from cachefreeze.report.summary_text import (
    RESULT,
    duration,
    epoch_line,
    fill_line,
    forecast_line,
    plan_words,
)
from cachefreeze.report.time_breakdown import spent, ways
from tests.report.harness import drawn, told_by
from tests.support.run_files import make_run


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
