"""A run that a signal or a kill cut off anywhere ends with the weights of one that was not."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from cachefreeze.train import main
from cachefreeze.training.checkpoint import load_checkpoint
from cachefreeze.training.trainer import Trainer
from tests.conftest import Train
from tests.support import interrupter
from tests.support.interrupter import Interrupter, command, send
from tests.training.harness import reference, resume
from tests.training.test_parity import assert_same_run


@pytest.mark.parametrize(
    ("arch", "where", "at"),
    [
        *(("wrn", "step", step) for step in (1, 3, 5, 12, 30)),
        *(("wrn", "validation", epoch) for epoch in (1, 4)),
        *(("wrn", "filling", fill) for fill in (1, 2, 3)),
        ("densenet", "step", 13),
        ("densenet", "filling", 2),
        ("vgg", "step", 14),
        ("vgg", "filling", 1),
    ],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    train: Train,
    images: Path,
    tmp_path: Path,
    interrupt: Interrupter,
    arch: str,
    where: str,
    at: int,
) -> None:
    interrupt(at, where)
    assert main(command(images, tmp_path, arch)) == 130
    interrupt.no_more()
    assert (tmp_path / "run" / "last.pt").exists()
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = resume(tmp_path / "run")
    assert len(resumed.summary["resumed_at"]) == 1
    assert_same_run(resumed, reference(train, arch))


def test_ctrl_c_is_one_line_with_a_command_that_goes_on(
    argv: list[str], tmp_path: Path, interrupt: Interrupter, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(7)
    assert main(argv) == 130
    interrupt.no_more()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "interrupted at step 7 of 30 (epoch 2): saved in" in told
    command = told.strip().partition("to go on: ")[2].split()
    assert command[1:4] == ["-m", "cachefreeze.train", "--resume"]
    assert main(command[3:]) == 0
    out = capsys.readouterr().out
    assert "resume    after step 7 of 30 (epoch 2)" in out
    assert "epoch 1/6" not in out, "what is done is not done again"
    assert main(command[3:]) == 0
    assert "is finished" in " ".join(capsys.readouterr().out.split())


def test_rows_that_were_kept_are_found_again_and_a_checkpoint_needs_none_of_them(
    train: Train, argv: list[str], tmp_path: Path, interrupt: Interrupter
) -> None:
    interrupt(16)  # the last fill of this process was at step 14
    assert main(argv) == 130
    interrupt.no_more()
    assert "cache" not in load_checkpoint(tmp_path / "run" / "last.pt")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    found = resume(tmp_path / "run")
    assert_same_run(found, reference(train, "wrn"))
    shutil.rmtree(tmp_path / "cache")
    anew = resume(tmp_path / "other")
    assert_same_run(anew, reference(train, "wrn"))
    steps = [fill["step"] for fill in found.summary["cache"]["fills"]]
    assert steps == [fill["step"] for fill in anew.summary["cache"]["fills"]]
    assert 16 in steps, "rows of what was frozen before are kept at once"


def test_sigterm_saves_too_and_has_its_own_exit_code(
    train: Train, argv: list[str], tmp_path: Path, interrupt: Interrupter
) -> None:
    interrupt(8, number=signal.SIGTERM)
    assert main(argv) == 128 + signal.SIGTERM
    interrupt.no_more()
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 8
    assert_same_run(resume(tmp_path / "run"), reference(train, "wrn"))


@pytest.mark.parametrize("where", ["step", "filling"])
def test_a_second_ctrl_c_stops_at_once_and_the_run_can_still_go_on(
    train: Train,
    argv: list[str],
    tmp_path: Path,
    interrupt: Interrupter,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    interrupt(8 if where == "step" else 3, where, times=2)
    assert main(argv) == 130
    interrupt.no_more()
    told = capsys.readouterr().err
    assert told.startswith("stopped at once: ")
    assert told.count("\n") == 1
    assert "--resume" in told
    assert_same_run(resume(tmp_path / "run"), reference(train, "wrn"))


def test_signals_are_as_before_once_a_run_has_ended(
    argv: list[str], interrupt: Interrupter
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupt(1)
    main(argv)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_that_decode_images_outlive_signals(
    train: Train, argv: list[str], tmp_path: Path, interrupt: Interrupter, number: int
) -> None:
    """A terminal sends Ctrl-C to all processes of its foreground group, schedulers SIGTERM."""
    real = send

    def children() -> set[int]:
        found = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        return set(map(int, found.split()))

    others = children()  # processes of other tests

    def to_all(number: int, times: int = 1) -> None:
        workers = children() - others
        assert workers
        for worker in workers:
            os.kill(worker, number)
        time.sleep(0.2)
        real(number, times)

    interrupt.monkeypatch.setattr(interrupter, "send", to_all)
    interrupt(1, number=number)
    assert main([*argv, "-j", "1"]) == 128 + number
    interrupt.no_more()
    assert_same_run(resume(tmp_path / "run"), reference(train, "wrn"))


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    train: Train, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", killed)
        assert main(argv) == 130
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["args.json"]
    assert_same_run(resume(tmp_path / "run"), reference(train, "wrn"))


def test_steps_after_the_last_checkpoint_are_taken_once_more_and_told_once(
    train: Train, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Trainer._step, 0

    def killed(trainer: Trainer, *args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 14:
            raise KeyboardInterrupt
        return real(trainer, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", killed)
        assert main([*argv, "--checkpoint-every", "3"]) == 130
    # As if it had been killed between writing its metrics and its checkpoint.
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "of": "another world"}\n{"ep')
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 12
    resumed = resume(tmp_path / "run")
    assert [line["epoch"] for line in resumed.metrics] == [1, 2, 3, 4, 5, 6]
    assert resumed.summary["resumed_at"] == [12]
    assert_same_run(resumed, reference(train, "wrn"))


def test_ctrl_c_that_was_switched_off_stays_so(argv: list[str], interrupt: Interrupter) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt(3)
        assert main([*argv, "--epochs", "1"]) == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
