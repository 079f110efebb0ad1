"""Forked processes, rows that turned out to be wrong, and what is listed and tidied up."""

import fcntl
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cachefreeze.errors import UserError
from cachefreeze.store import Directory
from cachefreeze.store.budget import Budget
from cachefreeze.store.format import LOCK, NEW, TRASH, USED
from cachefreeze.store.inspect import inspect, prune, verify
from cachefreeze.store.locks import in_use

from .harness import (
    ABOUT,
    CHUNK_ROWS,
    NAME,
    ROW,
    files_below,
    fork,
    forked,
    keys_of,
    read,
    read_again,
    rows_of,
    segments,
    wait,
    write,
)


def test_a_forked_process_reads_and_does_not_write(path: Path) -> None:
    write(path, np.arange(20))
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    new = np.arange(20, 25)
    rows.append(keys_of(new), rows_of(new))

    def worker() -> None:
        before = files_below(path)
        assert read(rows, np.arange(20)).all()
        more = np.arange(100, 200)
        rows.append(keys_of(more), rows_of(more))
        rows.refresh()
        directory.close()
        assert files_below(path) == before

    with forked(worker, worker):
        pass
    # It took nothing away either.
    assert read(rows, np.arange(20)).all()
    directory.close()
    assert read_again(path, 300) == (25, [])
    assert len(segments(path)) == 2


def test_a_process_may_be_forked_while_chunks_are_written(path: Path) -> None:
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    pids = []
    for start in range(0, 1000, 50):
        numbers = np.arange(start, start + 50)
        rows.append(keys_of(numbers), rows_of(numbers))
        rows.refresh()
        pids.append(fork(lambda: (read(rows, np.arange(1000)), rows.refresh(), directory.close())))
    signal.alarm(30)
    assert [wait(pid) for pid in pids] == [0] * len(pids)
    signal.alarm(0)
    directory.close()
    assert read_again(path, 1000) == (1000, [])


def test_a_forked_process_does_not_keep_the_locks_of_one_that_was_killed(path: Path) -> None:
    ready, end = os.pipe(), os.pipe()

    def parent() -> None:
        directory = Directory(path, None)
        rows = directory.rows(NAME, ROW, ABOUT)
        rows.append(keys_of(np.arange(CHUNK_ROWS)), rows_of(np.arange(CHUNK_ROWS)))
        while not len(rows):
            time.sleep(0.01)
            rows.refresh()
        assert read(rows, np.arange(CHUNK_ROWS)).all()
        fork(lambda: (os.write(ready[1], b"."), os.read(end[0], 1)))
        time.sleep(60)

    pid = fork(parent)
    os.read(ready[0], 1)
    (folder,) = segments(path)
    assert in_use(folder)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    assert not in_use(folder)
    assert prune(path, 0).segments == 1
    os.write(end[1], b".")
    for file in (*ready, *end):
        os.close(file)


def test_rows_that_turned_out_to_be_wrong_are_served_to_nobody(path: Path) -> None:
    write(path, np.arange(20))
    (before,) = segments(path)
    other_run = Directory(path, None)
    theirs = other_run.rows(NAME, ROW, ABOUT)
    assert read(theirs, np.arange(20)).all()
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    new = np.arange(20, 45)
    rows.append(keys_of(new), rows_of(new))
    while len(rows) < 40:
        time.sleep(0.01)
        rows.refresh()
    rows.forget()
    assert len(rows) == 0
    assert not read(rows, np.arange(45)).any()
    rows.append(keys_of(new), rows_of(new))
    write(path, np.arange(50, 60))  # another run goes on
    (later,) = (folder for folder in segments(path) if folder != before)
    rows.refresh()
    assert len(rows) == 0
    shutil.rmtree(later)
    (sentence,) = directory.messages
    assert "turned out to be wrong" in sentence
    directory.close()
    # The own segment is gone, and the other is marked: at once for those who look again.
    assert segments(path) == [before]
    theirs.refresh()
    assert not read(theirs, np.arange(20)).any()
    assert len(other_run.messages) == 1
    other_run.close()
    found, messages = read_again(path, 45)
    assert found == 0
    assert "found to be wrong" in messages[0]
    assert inspect(path)[0].problems
    assert prune(path, 10**6).segments == 1


def test_wrong_rows_that_another_run_reads_just_now_are_marked(path: Path) -> None:
    directory, other_run = Directory(path, None), Directory(path, None)
    rows, theirs = (one.rows(NAME, ROW, ABOUT) for one in (directory, other_run))
    numbers = np.arange(2 * CHUNK_ROWS)
    rows.append(keys_of(numbers), rows_of(numbers))
    while len(theirs) < len(numbers):
        time.sleep(0.01)
        theirs.refresh()
    assert read(theirs, numbers).all()
    rows.forget()
    theirs.refresh()
    assert not read(theirs, numbers).any()
    other_run.close()
    directory.close()
    assert read_again(path, len(numbers))[0] == 0


def test_wrong_rows_that_wait_for_the_disk_are_not_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "make_room", lambda budget, nbytes: time.sleep(0.1) or True)
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    numbers = np.arange(3 * CHUNK_ROWS)
    rows.append(keys_of(numbers), rows_of(numbers))
    time.sleep(0.15)  # the first one is written, and two are not
    rows.forget()
    directory.close()
    assert segments(path) == []


def test_rows_of_which_nothing_was_written_can_be_forgotten(path: Path) -> None:
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    rows.append(keys_of(np.arange(3)), rows_of(np.arange(3)))
    rows.forget()
    directory.close()
    assert read_again(path, 3) == (0, [])


def test_what_lies_in_a_directory_is_listed(path: Path) -> None:
    begin = time.time() - 1
    write(path, np.arange(20))
    write(path, np.arange(20, 50))
    write(path, np.arange(5), name=bytes(16))
    with_a_writer = Directory(path, None)
    rows = with_a_writer.rows(bytes(16), ROW, ABOUT)
    assert read(rows, np.arange(5)).all()
    empty, full = inspect(path)
    assert (empty.name, full.name) == (bytes(16).hex(), NAME.hex())
    assert (full.rows, full.segments, full.row, full.about) == (50, 2, ROW, ABOUT)
    assert begin <= full.first_use <= full.last_use <= time.time() + 1
    assert full.nbytes > 50 * ROW.nbytes
    assert (empty.in_use, full.in_use) == (True, False)
    assert (empty.problems, full.problems) == ([], [])
    with_a_writer.close()
    with pytest.raises(UserError, match="holds no activations"):
        inspect(path.parent)


def test_what_was_not_used_for_long_and_what_killed_runs_left_is_removed(path: Path) -> None:
    write(path, np.arange(20))
    (old,) = segments(path)
    os.utime(old / USED, (time.time() - 1000,) * 2)
    write(path, np.arange(20, 40))
    (new,) = (folder for folder in segments(path) if folder != old)
    (new / "values" / "c.9.0.0.partial").write_bytes(bytes(100))
    (path / NAME.hex() / f"{TRASH}1").mkdir()
    (path / NAME.hex() / f"{TRASH}1" / "zarr.json").write_text("{}")
    for name, seconds in ((f"{NEW}1", 10_000), (f"{NEW}2", 0)):
        folder = path / NAME.hex() / name
        folder.mkdir()
        os.utime(folder, (time.time() - seconds,) * 2)
    pruned = prune(path, 500)
    assert pruned.segments == 1
    assert pruned.nbytes > 20 * ROW.nbytes
    # What is being made just now stays.
    assert {one.name for one in (path / NAME.hex()).iterdir()} == {new.name, f"{NEW}2"}
    assert not list(path.rglob("*.partial"))
    assert list(verify(path)) == []
    assert read_again(path, 40) == (20, [])


def test_a_segment_that_is_removed_while_its_lock_is_waited_for_is_gone(path: Path) -> None:
    write(path, np.arange(20))
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    (folder,) = segments(path)
    file = os.open(folder / LOCK, os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)

    def remove_slowly() -> None:
        time.sleep(0.05)
        folder.rename(folder.with_name(f"{TRASH}1"))
        os.close(file)

    remover = threading.Thread(target=remove_slowly)
    remover.start()
    assert not read(rows, np.arange(20)).any()
    remover.join()
    assert len(rows) == 0
    assert directory.messages == []
    directory.close()


def test_what_is_in_use_is_not_removed(path: Path) -> None:
    write(path, np.arange(20))
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    assert read(rows, np.arange(20)).all()
    assert prune(path, 0).segments == 0
    assert read(rows, np.arange(20)).all()
    directory.close()
    assert prune(path, 0).segments == 1
    assert not (path / NAME.hex()).exists()


@contextmanager
def no_more_files() -> Iterator[None]:
    """Lets this process open no further file, for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # All numbers below the limit are taken.
    spare = os.open(os.devnull, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 64, hard))
    taken = [spare]
    try:
        while True:
            try:
                taken.append(os.dup(spare))
            except OSError:
                break
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in taken:
            os.close(file)


@pytest.mark.parametrize("moment", ["open", "refresh", "read", "load"])
def test_a_process_that_may_open_no_more_files_condemns_no_row(path: Path, moment: str) -> None:
    numbers = np.arange(10 * CHUNK_ROWS)
    write(path, numbers)
    before = files_below(path)
    directory = Directory(path, None)
    rows = None if moment == "open" else directory.rows(NAME, ROW, ABOUT)
    if moment in ("read", "load"):
        assert rows is not None
        rows.refresh()
    places = None if rows is None else rows.find(keys_of(numbers))
    with no_more_files():
        if rows is None:
            rows = directory.rows(NAME, ROW, ABOUT)
        elif moment == "refresh":
            rows.refresh()
        elif moment == "read":
            read(rows, numbers)
        else:
            assert places is not None
            for chunk in rows.chunks(places):
                rows.load(chunk)
    new = np.arange(1000, 1000 + CHUNK_ROWS)
    rows.append(keys_of(new), rows_of(new))
    directory.close()
    assert set(before) <= set(files_below(path))
    assert list(verify(path)) == []
    assert read_again(path, len(numbers)) == (len(numbers), [])


def test_rows_that_cannot_be_opened_are_unknown_and_it_is_said(path: Path) -> None:
    numbers = np.arange(10 * CHUNK_ROWS)
    write(path, numbers)
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    with no_more_files():
        assert not read(rows, numbers).any()
    assert "Too many open files" in " ".join(directory.messages)
    directory.close()


def test_a_writer_that_is_stopped_in_the_middle_does_not_hold_up_others(path: Path) -> None:
    write(path, np.arange(20))

    def writer() -> None:
        directory = Directory(path, None)
        rows = directory.rows(NAME, ROW, ABOUT)
        for number in range(20, 4000):
            one = np.array([number])
            rows.append(keys_of(one), rows_of(one))
        directory.close()

    pid = fork(writer)
    try:
        while len(segments(path)) < 2:
            time.sleep(0.001)
        for _ in range(10):
            time.sleep(0.005)
            os.kill(pid, signal.SIGSTOP)
            started = time.monotonic()
            found, messages = read_again(path, 4000)
            new = Directory(path, 10**9)
            mine = np.arange(5000, 5000 + CHUNK_ROWS)
            new.rows(NAME, ROW, ABOUT).append(keys_of(mine), rows_of(mine))
            new.close()
            assert prune(path, 3600).segments == 0
            assert time.monotonic() - started < 30
            assert found >= 20
            assert (messages, new.messages) == ([], [])
            os.kill(pid, signal.SIGCONT)
    finally:
        os.kill(pid, signal.SIGCONT)
        assert wait(pid) == 0
    assert list(verify(path)) == []
    assert read_again(path, 4000) == (4000, [])


@pytest.mark.parametrize("shift", [-1e9, 1e9])
def test_a_clock_that_was_put_forward_or_back_loses_no_row(path: Path, shift: float) -> None:
    numbers = np.arange(10 * CHUNK_ROWS)
    write(path, numbers)
    then = time.time() + shift
    for one in [*path.rglob("*"), path]:
        os.utime(one, (then, then))
    directory = Directory(path, 10**9)
    rows = directory.rows(NAME, ROW, ABOUT)
    assert read(rows, numbers).all()
    new = np.arange(1000, 1000 + CHUNK_ROWS)
    rows.append(keys_of(new), rows_of(new))
    directory.close()
    assert directory.messages == []
    # It was used just now: neither is it old.
    assert prune(path, 3600).segments == 0
    assert list(verify(path)) == []
    assert read_again(path, len(numbers)) == (len(numbers), [])
