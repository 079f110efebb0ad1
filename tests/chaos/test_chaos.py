"""Killed at any moment and resumed, a run ends with the weights and metrics of one that was not."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .harness import Chaos, Nursery, Tally, Victim, results
from .victim import POINTS


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def wrn(nursery: Nursery, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos(nursery, "wrn", images, tmp_path_factory.mktemp("chaos"))


@pytest.mark.parametrize("point", [point for point in POINTS if point != "any"])
def test_a_run_that_is_killed_just_before_it_goes_on_as_if_it_had_not_been(
    wrn: Chaos, point: str
) -> None:
    victim = Victim(wrn, point.replace(" ", "-"))
    # Not the first time that it happens, where it happens more than once.
    for count in (4, 1):
        code = victim.attempt(point=point, count=count)
        if code == -signal.SIGKILL:
            break
        assert code == 0
        victim = Victim(wrn, f"{point.replace(' ', '-')}-again")
    assert code == -signal.SIGKILL, "there is no such moment"
    assert victim.attempt() == 0
    assert victim.result() == wrn.right


@pytest.mark.parametrize("every", [1, 40])
def test_a_run_that_is_killed_again_and_again_comes_to_its_end(wrn: Chaos, every: int) -> None:
    """Before each `every`th change of a file: it must get on each time, or it would never end."""
    victim = Victim(wrn, f"every-{every}", "--checkpoint-every", "1")
    counts = range(every, 20 * every, every) if every == 1 else [every] * 20
    for count in counts:
        code = victim.attempt(point="any", count=count)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    if code:
        assert victim.attempt() == 0
    assert victim.result() == wrn.right


@pytest.mark.parametrize("network", ["densenet", "vgg"])
def test_the_other_networks_are_as_robust(
    nursery: Nursery, images: Path, tmp_path: Path, network: str
) -> None:
    chaos, tally = Chaos(nursery, network, images, tmp_path), Tally()
    dice = random.Random(network)
    for number in range(4):  # a run may end before its kill was due
        victim = Victim(chaos, f"victim{number}", "--checkpoint-every", "4")
        victim.torment(dice, tally, most=3 if network == "densenet" else 1)
        if tally.kills + tally.interrupts > 0:
            break
    assert tally.different == []
    assert tally.kills + tally.interrupts > 0


def test_so_it_is_with_the_command_that_people_type(wrn: Chaos, tmp_path: Path) -> None:
    victim = Victim(wrn, "typed")
    command = [sys.executable, "-m", "cachefreeze.train", *victim.argv]
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (0, 0)):
        with (tmp_path / "out").open("w+") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=tmp_path)
            while number and process.poll() is None:
                time.sleep(0.005)
                if (
                    "\nepoch 1/6" in (tmp_path / "out").read_text()
                    or "\nresume" in (tmp_path / "out").read_text()
                ):
                    process.send_signal(number)
                    break
            assert process.wait() == code, (tmp_path / "out").read_text()
    assert results(victim.run) == wrn.right
