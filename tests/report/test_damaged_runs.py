"""Files that are no finished run's are refused in one sentence."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefreeze.errors import UserError
from cachefreeze.report.html_report import write_report
from cachefreeze.report.run_results import RunResults


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
