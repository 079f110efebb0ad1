"""metrics.csv and TensorBoard's events say what metrics.jsonl says, also of a run that went on."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachefreeze.report.metrics import Metrics
from cachefreeze.run_folder import RunFolder
from cachefreeze.train import main

from .conftest import Run
from .interrupter import Interrupter

Fails = Callable[..., str]
OPTIONS = ["--arch", "wrn10_1", "-b", "32", "-j", "0", "--precision", "fp32", "--t0", "0.3"]
OPTIONS += ["--epochs", "3", "--schedule", "linear", "--no-cache", "--dataset", "imagefolder"]
UNITS = ("stem", "group1_block1", "group2_block1", "group3_block1", "head")


def options(images: Path, folder: Path) -> list[str]:
    return [*OPTIONS, "--data-dir", str(images), "--image-size", "32", "--output-dir", str(folder)]


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("metrics") / "run"
    assert main(options(images, folder)) == 0
    return Run.load(folder)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file, strict=True))


def as_text(line: dict[str, Any]) -> dict[str, str]:
    rates = {f"lr_{unit}": repr(rate) for unit, rate in zip(UNITS, line["lr"], strict=True)}
    return {name: str(value) for name, value in line.items() if name != "lr"} | rates


def test_the_table_has_a_line_an_epoch_and_a_column_a_number(finished: Run) -> None:
    rows = table(finished.folder)
    assert rows == [as_text(line) for line in finished.metrics]
    assert len(rows) == 3
    columns = list(rows[0])
    assert columns[:5] == ["epoch", "step", "train_loss", "val_loss", "val_accuracy"]
    assert columns[5:10] == [f"lr_{unit}" for unit in UNITS]


def test_an_interrupted_run_has_every_epoch_once(
    images: Path, tmp_path: Path, interrupt: Interrupter, finished: Run
) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    folder = tmp_path / "run"
    interrupt(8)
    assert main([*options(images, folder), "--tensorboard"]) == 130
    assert [row["epoch"] for row in table(folder)] == ["1"]
    # What a killed process had written after its last checkpoint.
    for name in ("metrics.jsonl", "metrics.csv"):
        with (folder / name).open("a") as file:
            file.write((folder / name).read_text().splitlines()[-1] + "\n")
    interrupt.no_more()
    assert main(["--resume", str(folder)]) == 0
    run = Run.load(folder)
    assert table(folder) == [as_text(line) for line in run.metrics]
    assert [line["epoch"] for line in run.metrics] == [1, 2, 3]
    assert run.summary["weights_sha256"] == finished.summary["weights_sha256"]
    assert scalars(folder)["run/train_loss"] == points(run, "train_loss")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_columns_that_an_older_version_did_not_write_stay_empty(tmp_path: Path) -> None:
    run_folder = RunFolder(tmp_path)
    metrics = Metrics(run_folder, ["a", 'b, "quoted"'], tensorboard=False)
    old = {"epoch": 1, "step": 5, "lr": [0.1, 0.2], "source": "pixels"}
    new = old | {"epoch": 2, "store_bytes": 7}
    metrics.rewrite([old])
    metrics.add([old, new])
    metrics.add([old, new, new | {"epoch": 3}])
    rows = table(tmp_path)
    header = ["epoch", "step", "lr_a", 'lr_b, "quoted"', "source", "store_bytes"]
    assert [list(row) for row in rows] == [header] * 3
    assert [row["store_bytes"] for row in rows] == ["", "7", "7"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert lines_of(tmp_path) == [old, new, new | {"epoch": 3}]


def test_nothing_that_came_before_a_fresh_start_stays(tmp_path: Path) -> None:
    metrics = Metrics(RunFolder(tmp_path), ["a"], tensorboard=False)
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


def points(run: Run, name: str) -> list[tuple[int, float]]:
    return [(line["step"], pytest.approx(line[name])) for line in run.metrics]


def test_tensorboard_shows_what_the_metrics_say(
    images: Path, tmp_path: Path, finished: Run
) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    assert main([*options(images, tmp_path / "run"), "--tensorboard"]) == 0
    run, found = Run.load(tmp_path / "run"), scalars(tmp_path / "run")
    for name in ("train_loss", "val_loss", "val_accuracy", "images_per_second", "frozen_units"):
        assert found[f"run/{name}"] == points(run, name)
    assert found["run/boundary"] == points(run, "boundary")
    assert found["seconds/train"] == points(run, "train_seconds")
    assert found["seconds/validate"] == points(run, "validate_seconds")
    assert found["seconds/materialize"] == points(run, "materialize_seconds")
    assert found["seconds/all"] == points(run, "seconds")
    for unit, name in enumerate(UNITS):
        rates = [(line["step"], pytest.approx(line["lr"][unit])) for line in run.metrics]
        assert found[f"rate/{name}"] == rates
    assert "run/source" not in found, "a word is no scalar"
    assert run.summary["weights_sha256"] == finished.summary["weights_sha256"]


def test_events_that_a_killed_process_left_are_shown_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    lines = [{"epoch": n, "step": 5 * n, "lr": [0.1 * n], "loss": float(n)} for n in (1, 2, 3)]
    killed = Metrics(RunFolder(tmp_path), ["a"], tensorboard=True)
    for count in (1, 2):
        killed.add(lines[:count])
    killed.close()
    # The checkpoint is of the first epoch: the second comes again, with another result.
    again = Metrics(RunFolder(tmp_path, resume=True), ["a"], tensorboard=True)
    again.rewrite(lines[:1])
    lines[1]["loss"] = 2.5
    for count in (2, 3):
        again.add(lines[:count])
    again.close()
    assert scalars(tmp_path)["run/loss"] == [(5, 1.0), (10, 2.5), (15, 3.0)]


def test_events_begin_with_the_run_even_if_they_are_wanted_later(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    lines = [{"epoch": n, "step": 5 * n, "lr": [0.1 * n]} for n in (1, 2)]
    metrics = Metrics(RunFolder(tmp_path), ["a"], tensorboard=True)
    metrics.rewrite(lines[:1])
    metrics.add(lines)
    metrics.close()
    assert [step for step, _ in scalars(tmp_path)["rate/a"]] == [5, 10]


def test_without_tensorboard_it_says_how_to_get_it_before_anything_is_done(
    images: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    sentence = fails(*options(images, tmp_path / "run"), "--tensorboard")
    assert "pip install 'cachefreeze[tensorboard]'" in sentence
    assert not (tmp_path / "run").exists()
