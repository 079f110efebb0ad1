"""metrics.csv and TensorBoard's events say what metrics.jsonl says, also of a run that went on."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from cachefreeze.report.metrics import Metrics
from cachefreeze.report.run_results import RunResults
from tests.support.run_files import Folder, make_run


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file, strict=True))


def test_the_table_has_a_line_an_epoch_and_a_column_a_number(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=3)
    rows = table(run.folder)
    assert list(rows[0])[:5] == ["epoch", "step", "train_loss", "val_loss", "val_accuracy"]
    assert list(rows[0])[5:13] == [f"lr_{unit}" for unit in run.summary["units"]]
    assert len(rows) == 3
    for row, line in zip(rows, run.metrics, strict=True):
        expected = {name: str(value) for name, value in line.items() if name != "lr"}
        for unit, rate in zip(run.summary["units"], line["lr"], strict=True):
            expected[f"lr_{unit}"] = repr(rate)
        assert row == expected


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_names_of_units_may_hold_commas_and_quotes(tmp_path: Path) -> None:
    metrics = Metrics(Folder(tmp_path), ["a", 'b, "quoted"'], tensorboard=False)
    lines = [{"epoch": n, "step": 5 * n, "lr": [0.1, 0.2]} for n in (1, 2, 3)]
    metrics.rewrite(lines[:1])
    for count in (2, 3):
        metrics.add(lines[:count])
    assert [list(row) for row in table(tmp_path)] == [
        ["epoch", "step", "lr_a", 'lr_b, "quoted"'],
    ] * 3
    assert [row["epoch"] for row in table(tmp_path)] == ["1", "2", "3"]
    assert lines_of(tmp_path) == lines


def test_nothing_that_came_before_a_fresh_start_stays(tmp_path: Path) -> None:
    metrics = Metrics(Folder(tmp_path), ["a"], tensorboard=False)
    line = {"epoch": 1, "step": 5, "lr": [0.1]}
    metrics.add([line])
    metrics.rewrite([])
    assert (tmp_path / "metrics.csv").read_text() == ""
    metrics.add([line])
    assert (tmp_path / "metrics.csv").read_text() == "epoch,step,lr_a\n1,5,0.1\n"


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as TensorBoard itself shows them."""
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def points(run: RunResults, name: str) -> list[tuple[int, float]]:
    return [(line["step"], pytest.approx(line[name])) for line in run.metrics]


def test_tensorboard_shows_what_the_metrics_say(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=3, tensorboard=True)
    found = scalars(run.folder)
    names = {f"run/{name}": name for name in run.metrics[0] if not name.endswith("seconds")}
    names |= {f"seconds/{part}": f"{part}_seconds" for part in ("train", "fill", "validate")}
    names |= {"seconds/saved": "saved_seconds", "seconds/all": "seconds"}
    del names["run/lr"]
    for tag, name in names.items():
        assert found[tag] == points(run, name)
    for unit, name in enumerate(run.summary["units"]):
        rates = [(line["step"], pytest.approx(line["lr"][unit])) for line in run.metrics]
        assert found[f"rate/{name}"] == rates
    assert set(found) == {*names, *(f"rate/{name}" for name in run.summary["units"])}


def test_events_that_a_killed_process_left_are_shown_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    lines = [{"epoch": n, "step": 5 * n, "lr": [0.1 * n], "loss": float(n)} for n in (1, 2, 3)]
    killed = Metrics(Folder(tmp_path), ["a"], tensorboard=True)
    for count in (1, 2):
        killed.add(lines[:count])
    killed.close()
    # The checkpoint is of the first epoch: the second comes again, with another result.
    again = Metrics(Folder(tmp_path), ["a"], tensorboard=True)
    again.rewrite(lines[:1])
    lines[1]["loss"] = 2.5
    for count in (2, 3):
        again.add(lines[:count])
    again.close()
    assert scalars(tmp_path)["run/loss"] == [(5, 1.0), (10, 2.5), (15, 3.0)]


def test_events_begin_with_the_run_even_if_they_are_wanted_later(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    lines = [{"epoch": n, "step": 5 * n, "lr": [0.1 * n]} for n in (1, 2)]
    metrics = Metrics(Folder(tmp_path), ["a"], tensorboard=True)
    metrics.rewrite(lines[:1])
    metrics.add(lines)
    metrics.close()
    assert [step for step, _ in scalars(tmp_path)["rate/a"]] == [5, 10]
