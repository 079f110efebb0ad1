"""What a run shows while it goes on: on a terminal, and where there is none."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from cachefreeze.train import main
from cachefreeze.training import progress, trainer, validation
from cachefreeze.training.progress import Progress, clock, status
from cachefreeze.training.resume import start_of
from cachefreeze.training.terminal import EVERYTHING, Verbosity, say
from tests.conftest import Run
from tests.support.screen import Screen, terminal

EPOCHS = 6
OPTIONS = ["--arch", "wrn10_1", "-b", "32", "-j", "0", "--precision", "fp32", "--t0", "0.3"]
OPTIONS += ["--epochs", str(EPOCHS), "--schedule", "linear"]
OPTIONS += ["--dataset", "imagefolder", "--image-size", "32"]


@dataclass
class Watched:
    """A run on a terminal: what was written there, and what the bar was asked to show."""

    screen: Screen
    shown: list[Progress]
    run: Run


def options(images: Path, folder: Path) -> list[str]:
    words = [*OPTIONS, "--data-dir", str(images), "--cache-dir", str(folder / "cache")]
    return [*words, "--output-dir", str(folder / "run")]


@pytest.fixture(scope="module", params=[60, 80, 120])
def watched(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    shown: list[Progress] = []

    def recorded(each: Progress, columns: int) -> str:
        shown.append(each)
        return status(each, columns)

    with pytest.MonkeyPatch.context() as patch, terminal(request.param) as screen:
        patch.setattr(progress, "SECONDS_BETWEEN", 0.0)  # every step: the run is short
        patch.setattr(progress, "status", recorded)
        patch.setattr(trainer, "SHOW_AFTER", 0.0)
        patch.setattr(validation, "SHOW_AFTER", 0.0)
        assert main(options(images, folder)) == 0
    return Watched(screen, shown, Run.load(folder / "run"))


def test_one_bar_shows_the_run_and_fits_the_terminal(watched: Watched) -> None:
    columns = watched.screen.columns
    bars = [frame for frame in watched.screen.frames if frame.endswith("|")]
    assert len(bars) >= 5 * EPOCHS, "the bar moves with the steps"
    assert all(len(bar) < columns for bar in bars)
    assert any("loss " in bar and "val " in bar and " left |" in bar for bar in bars)
    last = bars[-1]
    assert re.match(rf"(epoch )?{EPOCHS}/{EPOCHS}  ", last)
    assert "frozen 4/5" in last
    if columns >= 80:
        assert re.search(r"[\d,]+ img/s", last)
    if columns >= 120:
        assert re.search(r"\d+% of rows from the cache", last)


def test_bars_leave_nothing_behind_and_tear_no_line(watched: Watched) -> None:
    lines = watched.screen.lines
    assert not [line for line in lines if re.search(r"\d left|keeping|\|", line)]
    epochs = [line for line in lines if line.startswith("epoch ")]
    whole = r"epoch \d/6  loss \d\.\d{4}  val +[\d.]+%  frozen \d/5 +[\d,]+ img/s(  \d+% cached)?"
    assert len(epochs) == EPOCHS
    assert all(re.fullmatch(whole, line) for line in epochs)
    filled = [line for line in lines if line.startswith("  step ")]
    assert len(filled) == len(watched.run.summary["cache"]["fills"]) > 1
    assert all(line.endswith(" s") for line in filled)


def test_keeping_all_rows_has_a_bar_below(watched: Watched) -> None:
    filling = [frame for frame in watched.screen.frames if frame.startswith("keeping ")]
    assert len(filling) >= len(watched.run.summary["cache"]["fills"])
    assert all(len(frame) < watched.screen.columns for frame in filling)


def test_a_long_validation_has_a_bar_below(watched: Watched) -> None:
    validating = [frame for frame in watched.screen.frames if frame.startswith("validating")]
    assert len(validating) >= EPOCHS
    assert all(len(frame) < watched.screen.columns for frame in validating)
    assert not [line for line in watched.screen.lines if "validating" in line]


def test_the_bar_shows_what_the_metrics_say(watched: Watched) -> None:
    shown, metrics = watched.shown, watched.run.metrics
    assert len(shown) == 5 * EPOCHS, "one for every step"
    for number, each in enumerate(shown):
        epoch, position = divmod(number, 5)
        assert (each.epoch, each.epochs, each.units) == (epoch + 1, EPOCHS, 5)
        before = metrics[epoch - 1] if epoch else None
        assert each.accuracy == (before and before["val_accuracy"])
        if position == 0:
            assert each.loss == (before and before["train_loss"])
    for epoch, line in enumerate(metrics):
        last = shown[5 * epoch + 4]
        assert last.frozen <= line["frozen_units"] <= 4
    assert shown[0].served is None
    assert shown[-1].served
    # Of an epoch, the loss of the last step that was shown is one of those that it is the mean of.
    first = [each.loss for each in shown[1:5] if each.loss is not None]
    assert len(first) == 4
    assert min(first) < metrics[0]["train_loss"] * 1.5


def test_time_left_comes_to_its_end(watched: Watched) -> None:
    left = [each.seconds_left for each in watched.shown]
    assert all(seconds is None or seconds > 0 for seconds in left)
    assert left[-1] is not None
    assert left[-1] < watched.run.summary["wall_seconds"]


def test_no_progress_is_lines_only_even_on_a_terminal(images: Path, tmp_path: Path) -> None:
    with terminal(80) as screen:
        assert main([*options(images, tmp_path), "--epochs", "1", "--no-progress"]) == 0
    assert "\x1b" not in screen.text
    assert "\r" not in screen.text.replace("\r\n", "")
    assert "epoch 1/1  loss" in screen.text


RESULT = ["accuracy", "time", "cache", "run", "weights", "report"]


def subjects(lines: list[str]) -> list[str]:
    """The words before the tenth column; lines without one go on with the subject before."""
    return [line[:10].strip() for line in lines if line[:10].strip()]


def test_a_quiet_run_tells_its_result(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with terminal(80) as screen:
        assert main([*options(images, tmp_path), "--epochs", "1", "-q"]) == 0
    lines = screen.text.splitlines()
    assert subjects(lines) == RESULT
    say("and whoever comes next is heard again")
    assert "heard again" in capsys.readouterr().out


def test_a_quiet_plan_is_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plan", "--arch", "wrn10_1", "-q", "--cache-dir", str(tmp_path / "cache")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("unit  ")
    # It may be more than one line: it names the folder.
    assert any(line.startswith("predicted from ") for line in lines)


def test_an_error_ends_the_bar_first(images: Path, tmp_path: Path) -> None:
    with terminal(100) as screen:
        assert main([*options(images, tmp_path), "--lr", "1e30"]) == 2
    *_, last = [line for line in screen.lines if line]
    assert last.startswith("error: the loss is ")
    assert "|" not in last


def test_where_there_is_no_terminal_there_are_plain_lines(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options(images, tmp_path), "--epochs", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert not set(captured.out) & set("\r\x1b|█")


def test_how_much_is_told_is_no_setting_of_the_run(images: Path, tmp_path: Path) -> None:
    words = options(images, tmp_path)
    start = start_of([*words[:5], "--quiet", *words[5:]])
    assert start.verbosity == Verbosity(lines=False, bars=False)
    assert "--quiet" not in start.command
    assert start_of([*words, "--no-progress"]).verbosity == Verbosity(lines=True, bars=False)
    assert start_of(words).verbosity == EVERYTHING
    assert not {"quiet", "progress"} & set(start.settings.as_json())


def test_a_run_goes_on_in_another_manner_and_warns_in_any(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main([*options(images, tmp_path), "--epochs", "2", "--quiet"]) == 0
    (folder / "summary.json").unlink()
    (folder / "last.pt").write_bytes(b"damaged")
    resume = ["--resume", str(folder)]
    assert start_of(resume).verbosity == EVERYTHING
    capsys.readouterr()
    assert main([*resume, "--quiet"]) == 0
    warning, accuracy, result = capsys.readouterr().out.partition("accuracy ")
    assert re.sub(r"\s+", " ", warning).endswith(": going on from previous.pt ")
    result = (accuracy + result).splitlines()
    assert subjects(result) == RESULT


PROGRESS = Progress(7, 12, 0.01234, 0.98331, 2, 8, 0.871, 2463.4, 65.0)


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (
            200,
            "epoch  7/12  loss 0.012  val 98.3%  frozen 2/8  "
            "87% of rows from the cache  2,463 img/s  1:05 left",
        ),
        (
            84,
            "epoch  7/12  loss 0.012  val 98.3%  frozen 2/8  87% cached  2,463 img/s  1:05 left",
        ),
        (78, "7/12  loss 0.012  val 98.3%  frozen 2/8  87% cached  2,463 img/s  1:05 left"),
        (70, "7/12  loss 0.012  val 98.3%  frozen 2/8  2,463 img/s  1:05 left"),
        (54, "7/12  loss 0.012  val 98.3%  frozen 2/8  1:05 left"),
        (40, "7/12  loss 0.012  1:05 left"),
        (5, "7/12  1:05 left"),
    ],
)
def test_a_narrow_terminal_gets_fewer_words(columns: int, line: str) -> None:
    assert " ".join(status(PROGRESS, columns).split()) == " ".join(line.split())


def test_what_is_not_known_yet_is_left_out() -> None:
    progress = Progress(1, 12, None, None, 0, 8, None, None, None)
    assert status(progress, 80) == "epoch  1/12  frozen 0/8"


def test_a_clock_is_short() -> None:
    assert [clock(s) for s in (0.2, 59.6, 61, 3600, 360000)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:00:00",
        "100:00:00",
    ]
