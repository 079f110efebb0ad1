"""What a folder to go on in must hold, and which settings may change."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from cachefreeze.store.files import lock_folder, unlock_file
from cachefreeze.train import main
from cachefreeze.training import checkpoint
from cachefreeze.training.checkpoint import load_checkpoint, save_checkpoint
from cachefreeze.training.trainer import Trainer
from tests.conftest import Run, Train, write_images
from tests.support.interrupter import Interrupter, command
from tests.training.harness import WRN, Fails, reference, resume
from tests.training.test_parity import assert_same_run


@pytest.fixture(scope="module")
def once_cut_off(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("once")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        Interrupter(monkeypatch)(12)
        assert main(command(images, folder, "wrn")) == 130
    return folder / "run"


@pytest.fixture
def cut_off(once_cut_off: Path, tmp_path: Path) -> Path:
    """The folder of a run that was interrupted at step 12."""
    return Path(shutil.copytree(once_cut_off, tmp_path / "run"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--lr", 0.2),
        ("--epochs", 7),
        ("--seed", 1),
        ("--batch-size", 16),
        ("--t0", 0.5),
        ("--schedule", "cubic"),
        ("--width", 2),
        ("--dropout", 0.1),
        ("--momentum", 0.8),
        ("--weight-decay", 0),
        ("--image-size", 40),
        ("--precision", "bf16"),
    ],
)
def test_a_setting_that_would_change_the_results_is_refused_by_name(
    cut_off: Path, fails: Fails, option: str, value: object
) -> None:
    before = {path.name: path.read_bytes() for path in cut_off.iterdir()}
    arch = ("--arch", "wrn10") if option == "--width" else ()
    assert option in fails("--resume", cut_off, *arch, option, value)
    assert {path.name: path.read_bytes() for path in cut_off.iterdir()} == before


@pytest.mark.parametrize(
    "options",
    [
        ("--no-cache",),
        ("--cache-max-gb", 0.001),
        ("--cache-codec", "zstd"),
        ("--checkpoint-every", 2),
        ("-j", 1),
        ("--cache-dir", "another"),
        ("--lr", 0.05),  # as it was
    ],
)
def test_settings_that_change_no_result_may_change(
    train: Train,
    cut_off: Path,
    options: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    resumed = resume(cut_off, *options)
    assert_same_run(resumed, reference(train, "wrn"))
    if options[0] == "--no-cache":
        assert resumed.args["cache"] is False
        assert resumed.metrics[-1]["rows_served"] == 0


def test_a_run_without_a_cache_may_go_on_with_one(
    train: Train, argv: list[str], tmp_path: Path, interrupt: Interrupter
) -> None:
    interrupt(12)
    assert main([*argv, "--no-cache"]) == 130
    interrupt.no_more()
    resumed = resume(tmp_path / "run", "--cache")
    assert resumed.summary["cache"]["rows_served"] > 0
    assert_same_run(resumed, reference(train, "wrn"))


def test_images_that_were_only_touched_are_said_and_others_are_refused(
    capsys: pytest.CaptureFixture[str],
    train: Train,
    argv: list[str],
    images: Path,
    tmp_path: Path,
    interrupt: Interrupter,
    fails: Fails,
) -> None:
    copied = tmp_path / "images"
    shutil.copytree(images, copied)
    interrupt(12)
    assert main([*argv, "--data-dir", str(copied)]) == 130
    interrupt.no_more()
    victim = next((copied / "train").rglob("*.jpg"))
    content = victim.read_bytes()
    write_images(tmp_path / "others", 1, seed=9)
    other = next((tmp_path / "others").rglob("*.jpg"))
    shutil.copy(other, victim)
    assert "the images are not those" in fails("--resume", tmp_path / "run")
    victim.unlink()
    assert "the images are not those" in fails("--resume", tmp_path / "run")
    victim.write_bytes(content)
    capsys.readouterr()
    assert_same_run(resume(tmp_path / "run"), reference(train, "wrn"))
    told = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "image files were copied or written since the run was started" in told


def test_a_checkpoint_of_another_device_is_refused(cut_off: Path, fails: Fails) -> None:
    state = load_checkpoint(cut_off / "last.pt")
    state["numerics"]["device"] = "cuda"
    save_checkpoint(cut_off, state)
    assert "--device cuda" in fails("--resume", cut_off)


def test_other_numerics_are_said(cut_off: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_checkpoint(cut_off / "last.pt")
    state["numerics"]["torch"] = "1.0"
    save_checkpoint(cut_off, state)
    resume(cut_off)
    told = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "may differ, because the run was started with torch 1.0" in told


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((key, None) for key in ("model", "optimizer", "scheduler", "random", "metrics", "epoch")),
        *((key, [1]) for key in ("model", "optimizer", "metrics", "costs", "totals", "settings")),
        ("model", {"weight": torch.zeros(3)}),
        ("position", 1.5),
        ("position", 3),
        ("position", "x"),
        ("epoch", -1),
        ("epoch", 10**9),
        ("losses", torch.zeros(2, 2)),
        ("losses", []),
        ("metrics", [{"val_accuracy": "x"}] * 2),
        ("totals", {"rows_served": 1}),
        ("totals/train", "x"),
        ("fills", [3]),
        ("resumed_at", ["x"]),
        ("epoch_start", {}),
        ("costs", {"forward": ["x"] * 5, "read": [0.0] * 6, "backward": 2.0, "load": 0.0}),
        ("costs", {"forward": [1.0], "read": [0.0] * 2, "backward": 2.0, "load": 0.0}),
        ("scheduler/last_epoch", 3),
        ("random/torch", torch.zeros(3)),
        ("random/python", [3, [1], None]),
        ("settings/lr", 3),
    ],
)
def test_a_forged_checkpoint_is_one_sentence(
    cut_off: Path, fails: Fails, path: str, value: object
) -> None:
    state = load_checkpoint(cut_off / "last.pt")
    *parts, last = path.split("/")
    inner = state
    for part in parts:
        inner = inner[part]
    inner[last] = value
    save_checkpoint(cut_off, state)
    assert "start a new" in fails("--resume", cut_off)


@pytest.mark.parametrize("command", [["--help"], "words", [["--lr"]], ["--no-such-option"], 3])
def test_forged_settings_are_one_sentence(cut_off: Path, fails: Fails, command: object) -> None:
    args = json.loads((cut_off / "args.json").read_text())
    (cut_off / "args.json").write_text(json.dumps({**args, "command": command}))
    fails("--resume", cut_off)


def test_a_folder_without_a_run_is_one_sentence(fails: Fails, tmp_path: Path) -> None:
    for name in ("missing", "empty"):
        assert "holds no run" in fails("--resume", tmp_path / name)
        (tmp_path / "empty").mkdir(exist_ok=True)
    (tmp_path / "empty" / "args.json").write_text('{"command": 3}')
    assert "does not describe a run" in fails("--resume", tmp_path / "empty")
    assert "--output-dir" in fails("--resume", tmp_path / "a", "--output-dir", tmp_path / "b")
    assert "--plan" in fails("--resume", tmp_path / "empty", "--plan")


def test_two_processes_do_not_train_in_one_folder(cut_off: Path, fails: Fails) -> None:
    other = lock_folder(cut_off)
    assert other is not None
    assert "another process is training" in fails("--resume", cut_off)
    unlock_file(other)
    resume(cut_off)


def test_what_a_killed_process_left_in_the_folder_goes(cut_off: Path) -> None:
    (cut_off / "last.pt.123.partial").write_bytes(b"half")
    resume(cut_off)
    assert not list(cut_off.glob("*.partial"))


def test_a_lock_dies_with_its_process_though_its_workers_live(tmp_path: Path) -> None:
    """A process that was forked has the descriptors of its parent."""
    held = lock_folder(tmp_path)
    assert held is not None
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    unlock_file(held)
    try:
        again = lock_folder(tmp_path)
        assert again is not None
        unlock_file(again)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_auto_goes_on_with_the_newest_run_of_these_settings_or_starts_one(
    argv: list[str], interrupt: Interrupter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = argv.index("--output-dir")
    argv = [*argv[:place], *argv[place + 2 :], "--epochs", "2", "--resume", "auto"]
    interrupt(3)
    assert main(argv) == 130  # nothing to go on with: one was started
    interrupt.no_more()
    (first,) = Path("runs").iterdir()
    interrupt(2)
    assert main([*argv, "--seed", "5"]) == 130  # another run
    interrupt.no_more()
    assert len(list(Path("runs").iterdir())) == 2
    assert main([*argv, "--no-cache"]) == 0  # the first, with another cache
    assert (first / "summary.json").exists()
    assert len(list(Path("runs").iterdir())) == 2
    interrupt(1)
    assert main(argv) == 130  # that one is done: a new one
    assert len(list(Path("runs").iterdir())) == 3


def test_auto_goes_on_in_the_folder_that_is_named(
    train: Train, argv: list[str], tmp_path: Path, interrupt: Interrupter, fails: Fails
) -> None:
    for step in (3, 8, 9):
        interrupt(step)
        assert main([*argv, "--resume", "auto"]) == 130
        interrupt.no_more()
    assert "--lr" in fails(*argv, "--resume", "auto", "--lr", 0.3)
    assert main([*argv, "--resume=auto"]) == 0
    run = Run.load(tmp_path / "run")
    assert run.summary["resumed_at"] == [3, 11, 20]
    assert run.args["command"].count("--arch") == 1, "the same words are not added again"
    assert_same_run(run, reference(train, "wrn"))


def test_the_books_go_on(
    train: Train, argv: list[str], tmp_path: Path, interrupt: Interrupter
) -> None:
    whole = train(*WRN)
    interrupt(13)
    assert main(argv) == 130
    interrupt.no_more()
    resumed = resume(tmp_path / "run")
    one, other = resumed.summary["cache"], whole.summary["cache"]
    steps = [fill["step"] for fill in one["fills"]]
    assert sorted({*steps} - {13}) == [fill["step"] for fill in other["fills"]]
    total = sum(line["rows_served"] + line["rows_computed"] for line in resumed.metrics)
    assert one["rows_served"] + one["rows_computed"] == total
    for line in resumed.metrics:
        assert 0 < line["train_seconds"] < 60
    parts = ("train", "validate", "fill", "checkpoint")
    spent = sum(resumed.summary[f"{part}_seconds"] for part in parts)
    assert spent < resumed.summary["wall_seconds"]


def test_best_is_the_epoch_of_the_best_accuracy(train: Train) -> None:
    run = train(*WRN)
    accuracies = [line["val_accuracy"] for line in run.metrics]
    state = load_checkpoint(run.folder / "best.pt")
    assert state["epoch"] == 1 + accuracies.index(max(accuracies))
    assert state["metrics"] == run.metrics[: state["epoch"]]


def test_the_best_weights_are_saved_in_the_end_if_checkpoints_had_no_time(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "TIME_SHARE", 0.0)
    run = train(*WRN)
    assert not (run.folder / "previous.pt").exists(), "one checkpoint was saved"
    assert load_checkpoint(run.folder / "last.pt")["epoch"] == 6
    accuracies = [line["val_accuracy"] for line in run.metrics]
    best = load_checkpoint(run.folder / "best.pt")
    assert best["epoch"] == 1 + accuracies.index(max(accuracies)) < 6
    last = load_checkpoint(run.folder / "last.pt")["model"]
    assert any(not torch.equal(best["model"][name], last[name]) for name in last)


@pytest.mark.parametrize("every", [None, 1])
def test_a_loss_that_is_no_number_ends_the_run_with_what_was_good_kept(
    argv: list[str],
    fails: Fails,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int | None,
) -> None:
    real, calls = Trainer._step, 0

    def diverging(trainer: Trainer, *args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 13:
            with torch.no_grad():
                list(trainer.model.parameters())[-1].fill_(float("inf"))
        return real(trainer, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_step", diverging)
    options = [] if every is None else ["--checkpoint-every", every]
    sentence = fails(*argv, *options)
    assert (
        "the loss is nan at step 13 (epoch 3), with 1 of 5 units frozen and rates from" in sentence
    )
    assert "last.pt was saved before that" in sentence
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == (10 if every is None else 12)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_rate_that_is_far_too_high_is_said(argv: list[str], fails: Fails) -> None:
    sentence = fails(*argv, "--lr", 1e30)
    assert "--lr" in sentence
    assert "at step" in sentence
