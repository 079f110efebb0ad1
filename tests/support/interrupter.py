"""Signals at chosen moments of a run in this process."""

import os
import signal
from pathlib import Path

import pytest

from cachefreeze.training.trainer import Trainer
from tests.training.test_parity import NETWORKS, SCHEDULE


def send(number: int, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


class Interrupter:
    """Sends signals to this process in the middle of a step, of filling, or of validation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(
        self, at: int, where: str = "step", number: int = signal.SIGINT, times: int = 1
    ) -> None:
        owner, name = {
            "step": (Trainer, "_step"),
            "validation": (Trainer, "_validate"),
            "filling": (Trainer, "_fill"),
        }[where]
        real, calls = getattr(owner, name), 0

        def interrupted(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:
                send(number, times)
            return real(*args)

        self.monkeypatch.setattr(owner, name, interrupted)

    def no_more(self) -> None:
        self.monkeypatch.undo()


def command(images: Path, folder: Path, arch: str) -> list[str]:
    options = ["-b", 32, "-j", 0, "--precision", "fp32", "--no-report"]
    options += ["--dataset", "imagefolder", "--data-dir", images, "--image-size", 32]
    options += ["--cache-dir", folder / "cache", "--output-dir", folder / "run"]
    return [str(option) for option in (*options, *NETWORKS[arch], *SCHEDULE)]
