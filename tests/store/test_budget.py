"""`max_bytes` holds over all runs, and what somebody reads or writes stays."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cachefreeze.store import Directory
from cachefreeze.store.budget import Budget, disk_bytes, segment_folders
from cachefreeze.store.format import USED, Layout, Row
from cachefreeze.store.inspect import prune

from .harness import ABOUT, NAME, fork, forked, keys_of, read, rows_of, segments, wait

# Of 8 rows with 4 kB each, so that metadata do not count much.
ROW = Row((1024,), "float32")
ROWS = 8


def chunk_bytes() -> int:
    layout = Layout.of(ROW)
    return layout.values_bytes + layout.keys_bytes


def write(path: Path, first: int, count: int, max_bytes: int | None, name: bytes = NAME) -> list:
    directory = Directory(path, max_bytes)
    rows = directory.rows(name, ROW, ABOUT)
    for start in range(first, first + count, ROWS):
        numbers = np.arange(start, start + ROWS)
        rows.append(keys_of(numbers), rows_of(numbers, ROW))
    directory.close()
    return directory.messages


def age(folder: Path, seconds: float) -> None:
    os.utime(folder / USED, (time.time() - seconds,) * 2)


def total(path: Path) -> int:
    return sum(disk_bytes(folder) for folder in segment_folders(path))


@pytest.mark.parametrize("writers", [1, 2, 5])
def test_writers_exceed_the_budget_by_at_most_a_chunk_each(path: Path, writers: int) -> None:
    max_bytes = 20 * chunk_bytes()
    most = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            new = sum(disk_bytes(folder) for folder in segment_folders(path) if folder != old)
            # Counted last: if it is there now, it was there while the others were counted.
            most = max(most, new + disk_bytes(old))

    def run(number: int) -> None:
        messages = write(path, number * 1000, 40 * ROWS, max_bytes, bytes([number]) * 16)
        assert len(messages) == 1
        assert "in use" in messages[0]

    # One of earlier runs, that nobody uses.
    write(path, 10**6, 5 * ROWS, None)
    (old,) = segments(path)
    watcher = threading.Thread(target=watch, daemon=True)
    try:
        with forked(*(lambda number=number: run(number) for number in range(writers))):
            watcher.start()
    finally:
        done.set()
    watcher.join()
    assert max(most, total(path)) <= max_bytes + writers * chunk_bytes()
    assert total(path) >= max_bytes - chunk_bytes()
    assert not old.exists()


def test_the_least_recently_used_segments_go_first(path: Path) -> None:
    folders = []
    for number in range(4):
        write(path, 100 * number, 3 * ROWS, None)
        folders += [folder for folder in segments(path) if folder not in folders]
    for folder, seconds in zip(folders, (50, 400, 10, 300), strict=True):
        age(folder, seconds)
    assert write(path, 10**6, 4 * ROWS, total(path) + chunk_bytes()) == []
    assert [folder.exists() for folder in folders] == [True, False, True, True]
    # A row that is read makes its segment the one that was used last.
    directory = Directory(path, None)
    assert read(directory.rows(NAME, ROW, ABOUT), np.arange(300, 300 + ROWS)).all()
    directory.close()
    assert write(path, 2 * 10**6, 4 * ROWS, total(path) + chunk_bytes()) == []
    assert [folder.exists() for folder in folders] == [False, False, True, True]


def test_what_another_process_reads_stays(path: Path) -> None:
    write(path, 0, 3 * ROWS, None)
    write(path, 100, 3 * ROWS, None)
    one, other = segments(path)
    key = keys_of(np.array([0])).tobytes()
    read_now = one if (one / "keys/c.0.0").read_bytes().startswith(key) else other
    begun, end = os.pipe(), os.pipe()

    def read_for_a_while() -> None:
        directory = Directory(path, None)
        rows = directory.rows(NAME, ROW, ABOUT)
        assert read(rows, np.arange(3 * ROWS)).all()
        os.write(begun[1], b".")
        os.read(end[0], 1)
        assert read(rows, np.arange(3 * ROWS)).all()
        directory.close()

    pid = fork(read_for_a_while)
    os.read(begun[0], 1)
    for folder in (one, other):
        age(folder, 1000 if folder == read_now else 10)
    messages = write(path, 1000, 8 * ROWS, 6 * chunk_bytes())
    assert len(messages) == 1
    assert {folder: folder.exists() for folder in (one, other)} == {
        folder: folder == read_now for folder in (one, other)
    }
    os.write(end[1], b".")
    assert wait(pid) == 0
    for file in (*begun, *end):
        os.close(file)
    # Nobody reads it any more.
    assert write(path, 5000, 3 * ROWS, 8 * chunk_bytes()) == []
    assert not read_now.exists()


def test_rows_that_are_removed_under_a_reader_are_unknown_to_it(path: Path) -> None:
    write(path, 0, 3 * ROWS, None)
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    assert len(rows) == 3 * ROWS  # and none was read
    assert write(path, 1000, 3 * ROWS, 4 * chunk_bytes()) == []
    assert not read(rows, np.arange(3 * ROWS)).any()
    assert len(rows) == 0
    rows.refresh()
    assert read(rows, np.arange(1000, 1000 + 3 * ROWS)).all()
    assert directory.messages == []
    directory.close()


def test_what_lies_there_is_counted_without_looking_at_each_file(path: Path) -> None:
    budget = Budget(path, 10**9)
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    for start in range(0, 20 * ROWS, ROWS):
        numbers = np.arange(start, start + ROWS)
        rows.append(keys_of(numbers), rows_of(numbers, ROW))
        assert budget.total() <= total(path) + chunk_bytes()
    directory.close()
    # One that was written while it counted may count twice.
    assert total(path) <= budget.total() + 4096 <= total(path) + chunk_bytes() + 8192


def test_what_others_write_and_remove_meanwhile_does_not_disturb_the_count(path: Path) -> None:
    def write_and_remove() -> None:
        for number in range(30):
            write(path, 100 * number, 5 * ROWS, None)
            prune(path, 0)

    pid = fork(write_and_remove)
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        assert Budget(path, 1).total() >= 0
    assert ended == (pid, 0)


def test_a_budget_below_one_chunk_writes_nothing(path: Path) -> None:
    messages = write(path, 0, 3 * ROWS, 1000)
    assert len(messages) == 1
    assert not (path / NAME.hex()).exists()
