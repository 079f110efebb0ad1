"""What the program leaves of a real run: its metrics, its page, and what it says of them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefreeze.report import figures
from cachefreeze.report.run_results import RunResults
from cachefreeze.train import main
from tests.report.harness import TITLES, Page, Script
from tests.report.test_metrics import lines_of, points, scalars, table
from tests.support.interrupter import Interrupter

Fails = Callable[..., str]
OPTIONS = ["--arch", "wrn10_1", "-b", "32", "-j", "0", "--precision", "fp32", "--t0", "0.3"]
OPTIONS += ["--epochs", "4", "--schedule", "linear", "--dataset", "imagefolder"]


def argv(images: Path, folder: Path, *options: str) -> list[str]:
    cache = ["--cache-dir", str(folder.parent / "cache")]
    place = ["--data-dir", str(images), "--image-size", "32", "--output-dir", str(folder)]
    return [*OPTIONS, *place, *cache, *options]


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    assert main(argv(images, folder)) == 0
    return folder


def test_a_run_leaves_a_page_with_every_figure_and_says_where(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    folder = tmp_path / "run"
    assert main(argv(images, folder)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report    {folder / 'report.html'}"
    drawn = Page((finished / "report.html").read_bytes()).drawn
    assert set(drawn) >= set(TITLES.values()) - {TITLES["predicted"]}


def test_the_files_of_a_run_fit_together(finished: Path) -> None:
    run = RunResults.load(finished)
    summary, lines = run.summary, run.metrics
    for name in ("rows_served", "rows_computed"):
        assert sum(line[name] for line in lines) == summary["cache"][name]
    assert summary["cache"]["rows_served"] > 0
    parts = ("train", "fill", "validate")
    for part in parts:
        total = sum(line[f"{part}_seconds"] for line in lines)
        assert total == pytest.approx(summary[f"{part}_seconds"], abs=0.05)
    for line in lines:
        spent = sum(line[f"{part}_seconds"] for part in parts)
        assert spent <= line["seconds"] * 1.02
    spent = sum(summary[f"{part}_seconds"] for part in (*parts, "checkpoint"))
    assert spent < summary["wall_seconds"]


def test_an_interrupted_run_has_every_epoch_once(
    images: Path, tmp_path: Path, interrupt: Interrupter, finished: Path
) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    folder = tmp_path / "run"
    interrupt(8)
    assert main([*argv(images, folder), "--tensorboard"]) == 130
    assert not (folder / "report.html").exists()
    assert [row["epoch"] for row in table(folder)] == ["1"]
    # What a killed process had written after its last checkpoint.
    for name in ("metrics.jsonl", "metrics.csv"):
        with (folder / name).open("a") as file:
            file.write((folder / name).read_text().splitlines()[-1] + "\n")
    interrupt.no_more()
    assert main(["--resume", str(folder)]) == 0
    run = RunResults.load(folder)
    assert [row["epoch"] for row in table(folder)] == ["1", "2", "3", "4"]
    assert [line["epoch"] for line in lines_of(folder)] == [1, 2, 3, 4]
    assert run.summary["weights_sha256"] == RunResults.load(finished).summary["weights_sha256"]
    assert scalars(folder)["run/train_loss"] == points(run, "train_loss")
    assert (
        f"after step {run.summary['resumed_at'][0]}"
        in Page((folder / "report.html").read_bytes()).words
    )


def test_without_tensorboard_it_says_how_to_get_it_before_anything_is_done(
    images: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    sentence = fails(*argv(images, tmp_path / "run"), "--tensorboard")
    assert "pip install 'cachefreeze[tensorboard]'" in sentence
    assert not (tmp_path / "run").exists()


def test_without_matplotlib_a_run_ends_well_and_says_how_to_get_its_page(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: Script
) -> None:
    """In a process in which it cannot be imported."""
    code = "import sys; sys.modules['matplotlib'] = None; from cachefreeze.train import main; "
    words = argv(images, tmp_path / "run", "--epochs", "1")
    command = [sys.executable, "-c", f"{code}sys.exit(main({words!r}))"]
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
    assert Page((tmp_path / "run" / "report.html").read_bytes()).drawn


def test_drawing_that_fails_takes_nothing_from_a_run(
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*args: object) -> str:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(figures, "learning", broken)
    assert main(argv(images, tmp_path / "run", "--epochs", "1")) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert "report    none: it could not be drawn (ZeroDivisionError: a bug); to see why: " in told
    assert RunResults.load(tmp_path / "run").summary["epochs"] == 1
    assert not (tmp_path / "run" / "report.html").exists()


def test_no_report_draws_none(images: Path, tmp_path: Path) -> None:
    assert main(argv(images, tmp_path / "run", "--epochs", "1", "--no-report")) == 0
    assert not (tmp_path / "run" / "report.html").exists()
