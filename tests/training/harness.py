"""Runs to go on with, and the uninterrupted runs to compare them with."""

from collections.abc import Callable
from pathlib import Path

from cachefreeze.train import main
from tests.conftest import Run, Train
from tests.training.test_parity import NETWORKS, SCHEDULE

Fails = Callable[..., str]
WRN = (*NETWORKS["wrn"], *SCHEDULE)
SHORT = ("--arch", "wrn10_1", "--epochs", 4, "--t0", 0.2, "--schedule", "linear")


def resume(folder: Path, *options: object) -> Run:
    assert main(["--resume", str(folder), *map(str, options)]) == 0
    return Run.load(folder)


REFERENCES: dict[str, Run] = {}


def reference(train: Train, arch: str) -> Run:
    """Of each network once."""
    if arch not in REFERENCES:
        REFERENCES[arch] = train(*NETWORKS[arch], *SCHEDULE, "--no-cache")
    return REFERENCES[arch]
