"""A writer that is killed at any moment loses at most what was not written yet."""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from cachefreeze.store import Directory
from cachefreeze.store.inspect import prune, verify

from .harness import ABOUT, CHUNK_ROWS, NAME, ROW, fork, keys_of, read, rows_of, segments, wait

KILLS = 30
STEP = 5


def write_until_killed(path: Path, start: int, progress: int, codec: str) -> None:
    """Appends a few rows at a time, and says how many there were."""
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT, codec)
    for first in range(start, start + 10**6, STEP):
        numbers = np.arange(first, first + STEP)
        rows.append(keys_of(numbers), rows_of(numbers))
        os.write(progress, b".")


def kill_and_look(path: Path, start: int, seconds: float, codec: str = "raw") -> None:
    """Kills a writer after some time; what it left must be right, and all but a few chunks."""
    reader, progress = os.pipe()
    pid = fork(lambda: write_until_killed(path, start, progress, codec))
    os.close(progress)
    os.read(reader, 1)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    appended = STEP
    while piece := os.read(reader, 2**16):
        appended += STEP * len(piece)
    os.close(reader)
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    good = read(rows, np.arange(start, start + appended + 10 * CHUNK_ROWS))
    found = int(good.sum())
    assert good[:found].all(), "rows in the middle are lost"
    # The chunk that was collected, two that waited, and the one that was being written.
    assert found >= appended - 4 * CHUNK_ROWS
    assert directory.messages == []
    directory.close()


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_killed_writer_loses_at_most_what_was_not_written(path: Path, codec: str) -> None:
    chance = random.Random(0)
    for number in range(KILLS):
        kill_and_look(path, number * 10**6, chance.random() ** 2 * 0.1, codec)
    # What lies there is whole, and what was begun goes with the next tidying up.
    assert list(verify(path)) == []
    assert prune(path, 3600).segments == 0
    left = [file.name for folder in segments(path) for file in folder.rglob("*.partial")]
    assert left == []


def test_a_writer_that_goes_on_after_others_were_killed_keeps_their_rows(path: Path) -> None:
    for _ in range(3):
        kill_and_look(path, 0, 0.02)
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    numbers = np.arange(600)
    new = numbers[rows.find(keys_of(numbers)) < 0]
    rows.append(keys_of(new), rows_of(new))
    directory.close()
    directory = Directory(path, None)
    assert read(directory.rows(NAME, ROW, ABOUT), numbers).all()
    directory.close()
