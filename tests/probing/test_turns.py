"""Probings that begin together: one computes the rows, and the others wait for them."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefreeze.probing import turns
from cachefreeze.probing.turns import turn

WORK = {"network": "wrn16_2", "size": 32}


class Other:
    """Another probing of the same directory, in a thread: locks tell threads apart as well."""

    def __init__(self, folder: Path, work: dict[str, object]) -> None:
        self.began = threading.Event()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(folder, work))
        self._thread.start()

    def _run(self, folder: Path, work: dict[str, object]) -> None:
        with turn(folder, work):
            self.began.set()
            assert self._ends.wait(60)

    def end(self) -> None:
        self._ends.set()
        self._thread.join()


@pytest.fixture
def other(tmp_path: Path) -> "Callable[[dict[str, object]], Other]":
    return lambda work: Other(tmp_path, work)


def test_the_second_begins_when_the_first_is_done_and_later_ones_do_not_wait(
    other: "Callable[[dict[str, object]], Other]",
) -> None:
    first = other(WORK)
    assert first.began.wait(60)
    second = other(WORK)
    assert not second.began.wait(0.5)
    first.end()
    assert second.began.wait(60)
    third = other(WORK)
    assert third.began.wait(60), "rows are there, and the second one reads them, too"
    second.end()
    third.end()


def test_other_work_is_not_waited_for(other: "Callable[[dict[str, object]], Other]") -> None:
    first, second = other(WORK), other({**WORK, "size": 64})
    assert first.began.wait(60)
    assert second.began.wait(60)
    first.end()
    second.end()


def test_a_probing_that_failed_is_followed_by_the_next(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), turn(tmp_path, WORK):
        raise ZeroDivisionError
    assert not list(tmp_path.rglob("done"))
    with turn(tmp_path, WORK):
        pass


def test_a_probing_that_stands_still_is_not_waited_for(
    other: "Callable[[dict[str, object]], Other]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "_PAUSE", 0.01)
    first = other(WORK)
    assert first.began.wait(60)
    (folder,) = (tmp_path / "turns").iterdir()
    os.utime(folder, (time.time() - 3600,) * 2)
    second = other(WORK)
    assert second.began.wait(60)
    second.end()
    first.end()


def test_a_folder_that_cannot_be_written_to_has_no_turns(tmp_path: Path) -> None:
    (tmp_path / "turns").write_text("a file")
    with turn(tmp_path, WORK) as goes_on:
        goes_on()
