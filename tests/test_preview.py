"""`--plan` tells what a run would keep, and does nothing else."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefreeze.train import main

from .conftest import Train

Fails = Callable[..., str]
SMALL = ("--arch", "wrn10_1", "-b", "32", "--precision", "fp32", "--t0", "0.2")


def plan(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    capsys.readouterr()
    assert main(["--plan", *(str(option) for option in (*SMALL, *options))]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_it_prints_the_freezes_the_plan_and_the_totals_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = plan(capsys, "--epochs", 40)
    # 1,438 rows are 45 steps an epoch, 1,800 in all; cubic: 0.2^3 of them.
    assert re.search(r"stem +15 +1 +0\.8%", out)
    assert re.search(r"head +trains to the end", out)
    assert re.search(r"boundary +codec +size +filling +saves", out)
    for name in ("no freezing", "freezing only", "with the cache, as planned", "limit"):
        assert re.search(rf"{name}.* \d.*%", out)
    assert "efficiency 0." in out
    assert list(tmp_path.iterdir()) == []


def test_its_schedule_is_the_one_that_is_trained(
    capsys: pytest.CaptureFixture[str], train: Train
) -> None:
    options = ("--epochs", 4, "--schedule", "linear")
    run = train("--arch", "wrn10_1", "--t0", 0.2, *options)
    out = plan(
        capsys, *options, "--dataset", "imagefolder", "--rows", 150, 33, "--classes", 3,
        "--image-size", 32, "--cache-policy", "eager", "--cache-dir", run.folder.parent / "none",
    )  # fmt: skip
    kept = [(int(m[1]), int(m[2])) for m in re.finditer(r"^ +(\d+) +\d+ +(\d) after", out, re.M)]
    events = run.summary["cache"]["boundaries"]
    assert kept == [(e["step"], e["boundary"]) for e in events if e["boundary"]]


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_is_planned_without_being_there(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dataset: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = plan(capsys, "--dataset", dataset, "--cache-max-gb", 1)
    assert "50,000 training and 10,000 validation images, 3x32x32" in out
    assert f"{dataset.removeprefix('cifar')} classes" in out
    # 60,000 rows of 64 kB after the stem.
    assert re.search(r"3\.9\d GB", plan(capsys, "--dataset", dataset, "--cache-policy", "eager"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_planned_without_reading_it_whole(
    capsys: pytest.CaptureFixture[str], images: Path, tmp_path: Path
) -> None:
    folder = ("--dataset", "imagefolder", "--data-dir", images, "--image-size", 32)
    out = plan(capsys, *folder, "--cache-dir", tmp_path / "cache", "--epochs", 30)
    assert "150 training and 33 validation images" in out
    assert "0 pixels" in out, "decoding them every epoch costs more than keeping them"
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_is_not_there_is_planned_by_its_shapes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shapes = ("--rows", 3000, 500, "--classes", 7, "--image-size", 24)
    options = (*shapes, "--cache-dir", tmp_path / "cache", "--epochs", 3)
    out = plan(capsys, "--dataset", "imagefolder", *options)
    assert "3,000 training and 500 validation images, 3x24x24, 7 classes" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--rows 10 10 --classes 2 --dataset imagefolder", "give all three"),
        ("--plan --rows 10 10 --dataset imagefolder", "give all three"),
        ("--plan --rows 10 10 --classes 2", "is known"),
        ("--plan --rows 0 10 --classes 2 --dataset imagefolder", "1 or more of each"),
        ("--plan --rows 10 10 --classes 1 --dataset imagefolder", "2 or more"),
        ("--plan --no-cache", "leave out --no-cache"),
        ("--plan --augment", "leave out"),
        ("--plan --dataset imagefolder", "--data-dir"),
        ("--plan --dataset imagefolder --data-dir nowhere", "is not a folder"),
        ("--cache-codec int8 --cache-dtype bf16", "exclude each other"),
        ("--cache-codec gzip", "invalid choice"),
        ("--cache-policy never", "invalid choice"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(
    fails: Fails,
    options: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in fails(*options.split())
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_the_cache_may_not_exist_yet_nor_be_somebody_elses(
    fails: Fails,
    tmp_path: Path,
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("mine")
    assert "holds other files" in fails("--plan", "--cache-dir", tmp_path / "thesis")
