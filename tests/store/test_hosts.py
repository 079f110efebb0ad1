"""Processes whose `flock` does not reach each other, as those of two machines."""

import fcntl
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cachefreeze.store import Directory, leases
from cachefreeze.store.budget import disk_bytes
from cachefreeze.store.exchange import lock_set
from cachefreeze.store.inspect import inspect, prune, verify
from cachefreeze.store.locks import Held, in_use

from .harness import (
    ABOUT,
    CHUNK_ROWS,
    NAME,
    ROW,
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
from .test_budget import ROW as LARGE_ROW
from .test_budget import ROWS, chunk_bytes, total


def on_another_host(function: Callable[[], object], tmp_path: Path) -> Callable[[], object]:
    """Runs a function on a machine of its own: with another name, and with locks of its own."""

    def run() -> None:
        boot = tmp_path / f"boot-{os.getpid()}"
        boot.write_text(str(os.getpid()))
        leases._BOOT = boot
        fcntl.flock = Locks().flock
        function()

    return run


class Locks:
    """The locks of a machine of which no other machine knows."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, int]] = {}

    def flock(self, file: int, how: int) -> None:
        node, how = os.fstat(file).st_ino, how & ~fcntl.LOCK_NB
        self._held.pop(file, None)
        for other, (locked, kind) in list(self._held.items()):
            try:
                closed = os.fstat(other).st_ino != locked
            except OSError:
                closed = True
            if closed:
                del self._held[other]
            elif locked == node and fcntl.LOCK_EX in (kind, how) and how != fcntl.LOCK_UN:
                raise BlockingIOError
        if how != fcntl.LOCK_UN:
            self._held[file] = node, how


class Steps:
    """Lets two processes wait for each other."""

    def __init__(self) -> None:
        self._here, self._there = os.pipe(), os.pipe()

    def reach(self) -> None:
        """Called by the forked process: tells that it is here, and waits until it may go on."""
        os.write(self._here[1], b".")
        os.read(self._there[0], 1)

    def wait(self) -> None:
        assert select.select([self._here[0]], [], [], 60)[0], "the other process has failed"
        os.read(self._here[0], 1)

    def go_on(self) -> None:
        os.write(self._there[1], b".")


def the_lease(path: Path) -> Path:
    (found,) = (path / leases.LEASES).iterdir()
    return found


def let_it_age(lease: Path) -> None:
    """Makes a lease look as if its process had not touched it for a minute."""
    then = time.time() - leases.LEASE_SECONDS - 1
    os.utime(lease / "beat", (then, then))


def reader(path: Path, steps: Steps) -> Callable[[], None]:
    def run() -> None:
        directory = Directory(path, None)
        rows = directory.rows(NAME, ROW, ABOUT)
        assert read(rows, np.arange(20)).all()
        steps.reach()
        assert read(rows, np.arange(20)).all()
        directory.close()

    return run


def test_what_another_host_reads_is_not_removed(path: Path, tmp_path: Path) -> None:
    write(path, np.arange(20))
    (folder,) = segments(path)
    steps = Steps()
    with forked(on_another_host(reader(path, steps), tmp_path)):
        steps.wait()
        assert in_use(folder)
        assert inspect(path)[0].in_use
        assert prune(path, 0).segments == 0
        # A budget that is too small for both takes it neither.
        directory = Directory(path, disk_bytes(folder) + 100)
        rows = directory.rows(NAME, ROW, ABOUT)
        rows.append(keys_of(np.arange(100, 120)), rows_of(np.arange(100, 120)))
        directory.close()
        assert "in use" in directory.messages[0]
        steps.go_on()
    assert not in_use(folder)
    assert prune(path, 0).segments == 1
    assert not list((path / leases.LEASES).iterdir())


def test_what_another_host_writes_is_not_removed(path: Path, tmp_path: Path) -> None:
    steps = Steps()
    numbers = np.arange(CHUNK_ROWS)

    def writer() -> None:
        directory = Directory(path, None)
        rows = directory.rows(NAME, ROW, ABOUT)
        rows.append(keys_of(numbers), rows_of(numbers))
        while not len(rows):
            time.sleep(0.01)
            rows.refresh()
        steps.reach()
        rows.append(keys_of(numbers + 100), rows_of(numbers + 100))
        directory.close()
        assert directory.messages == []

    with forked(on_another_host(writer, tmp_path)):
        steps.wait()
        assert prune(path, 0).segments == 0
        steps.go_on()
    assert len(segments(path)) == 1
    assert read_again(path, 200) == (2 * CHUNK_ROWS, [])


@pytest.mark.parametrize("own_locks", [True, False])
def test_a_host_that_was_killed_leaves_no_lock_after_its_heartbeat(
    path: Path, tmp_path: Path, own_locks: bool
) -> None:
    write(path, np.arange(20))
    (folder,) = segments(path)
    steps = Steps()
    run = reader(path, steps)
    pid = fork(on_another_host(run, tmp_path) if own_locks else run)
    steps.wait()
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    # On the same machine, its end is seen at once.
    assert in_use(folder) == own_locks
    if own_locks:
        assert prune(path, 0).segments == 0
        let_it_age(the_lease(path))
        assert not in_use(folder)
    assert prune(path, 0).segments == 1
    if not own_locks:  # what it has left is removed later
        let_it_age(the_lease(path))
    write(path, np.arange(20))
    assert not list((path / leases.LEASES).iterdir())


def test_a_host_that_lives_touches_its_lease(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, np.arange(20))
    (folder,) = segments(path)
    steps = Steps()
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.05)
    with forked(on_another_host(reader(path, steps), tmp_path)):
        steps.wait()
        let_it_age(the_lease(path))
        until = time.monotonic() + 30
        while not in_use(folder) and time.monotonic() < until:
            time.sleep(0.01)
        assert in_use(folder)
        steps.go_on()


def test_a_host_that_was_stopped_for_long_serves_and_loses_nothing_wrong(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, np.arange(20))
    (folder,) = segments(path)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(leases, "LEASE_SECONDS", 2.0)
    new, later = np.arange(100, 100 + CHUNK_ROWS), np.arange(200, 200 + CHUNK_ROWS)

    def stopped() -> None:
        directory = Directory(path, None)
        rows = directory.rows(NAME, ROW, ABOUT)
        assert read(rows, np.arange(20)).all()
        rows.append(keys_of(new), rows_of(new))
        while len(rows) < 20 + CHUNK_ROWS:
            time.sleep(0.01)
            rows.refresh()
        os.kill(os.getpid(), signal.SIGSTOP)
        # All of it was removed. It is unknown, and written again to a segment of its own.
        assert not read(rows, np.arange(20)).any()
        assert not read(rows, new).any()
        rows.append(keys_of(later), rows_of(later))
        directory.close()
        assert directory.messages == []

    pid = fork(on_another_host(stopped, tmp_path))
    os.waitpid(pid, os.WUNTRACED)
    mine, theirs = {folder}, set(segments(path))
    assert mine < theirs
    removed, until = 0, time.monotonic() + 30
    while removed < 2 and time.monotonic() < until:
        removed += prune(path, 0).segments
        time.sleep(0.1)
    assert removed == 2
    os.kill(pid, signal.SIGCONT)
    assert wait(pid) == 0
    assert list(verify(path)) == []
    assert read_again(path, 300) == (CHUNK_ROWS, [])
    assert not theirs & set(segments(path))


def test_a_host_that_was_stopped_and_not_missed_locks_all_of_it_anew(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = np.arange(20), np.arange(100, 100 + CHUNK_ROWS)
    write(path, old)
    steps = Steps()

    def stopped() -> None:
        directory = Directory(path, None)
        rows = directory.rows(NAME, ROW, ABOUT)
        assert read(rows, old).all()
        rows.append(keys_of(new), rows_of(new))
        while len(rows) < 20 + CHUNK_ROWS:
            time.sleep(0.01)
            rows.refresh()
        monkeypatch.setattr(leases, "_clock", lambda: time.monotonic() + 10**6)
        assert read(rows, old).all()
        rows.append(keys_of(new + 100), rows_of(new + 100))
        while len(rows) < 20 + 2 * CHUNK_ROWS:
            time.sleep(0.01)
            rows.refresh()
        # The marks of before are gone, and those of now are there.
        steps.reach()
        directory.close()
        assert directory.messages == []

    with forked(on_another_host(stopped, tmp_path)):
        steps.wait()
        assert prune(path, 0).segments == 0
        steps.go_on()
    assert len(segments(path)) == 2
    assert read_again(path, 300) == (20 + 2 * CHUNK_ROWS, [])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_exceed_the_budget_by_at_most_a_chunk_each(
    path: Path, tmp_path: Path, hosts: int
) -> None:
    max_bytes = 20 * chunk_bytes()

    def run(number: int) -> None:
        directory = Directory(path, max_bytes)
        rows = directory.rows(bytes([number]) * 16, LARGE_ROW, ABOUT)
        for start in range(1000 * number, 1000 * number + 40 * ROWS, ROWS):
            numbers = np.arange(start, start + ROWS)
            rows.append(keys_of(numbers), rows_of(numbers, LARGE_ROW))
        rows.flush()
        while not directory.messages:
            time.sleep(0.01)
        assert "in use" in directory.messages[0]
        steps[number].reach()
        directory.close()

    steps = [Steps() for _ in range(hosts)]
    runs = [on_another_host(lambda number=number: run(number), tmp_path) for number in range(hosts)]
    with forked(*runs):
        for one in steps:
            one.wait()
        assert total(path) <= max_bytes + hosts * chunk_bytes()
        assert total(path) >= max_bytes - chunk_bytes()
        for one in steps:
            one.go_on()


def test_two_hosts_do_not_turn_to_one_set_of_an_object_store(path: Path, tmp_path: Path) -> None:
    Directory(path, None).close()
    steps = Steps()

    def busy() -> None:
        lock = lock_set(path, NAME.hex())
        assert lock is not None
        steps.reach()
        lock.release()

    with forked(on_another_host(busy, tmp_path)):
        steps.wait()
        assert lock_set(path, NAME.hex()) is None
        steps.go_on()
    lock = lock_set(path, NAME.hex())
    assert lock is not None
    lock.release()
    leases.end(path)


def test_rows_that_are_removed_by_another_host_are_gone_while_it_does_so(
    path: Path, tmp_path: Path
) -> None:
    write(path, np.arange(20))
    (folder,) = segments(path)
    steps = Steps()

    def remover() -> None:
        mark = leases.mark(path, f"{folder.parent.name}.{folder.name}", exclusive=True)
        assert mark is not None
        steps.reach()
        mark.remove()

    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    with forked(on_another_host(remover, tmp_path)):
        steps.wait()
        assert not read(rows, np.arange(20)).any()
        steps.go_on()
    directory.close()
    assert directory.messages == []


def test_a_folder_that_may_not_be_written_is_read(path: Path, tmp_path: Path) -> None:
    write(path, np.arange(20))
    (path / leases.LEASES).rmdir()
    (path / leases.LEASES).write_text("in the way")
    assert read_again(path, 20) == (20, [])


def test_served_rows_cost_no_call_of_the_system_for_their_locks(path: Path) -> None:
    write(path, np.arange(20))
    (folder,) = segments(path)

    def hold() -> None:
        held = Held()
        held.hold(folder)
        called: list[str] = []
        sys.addaudithook(lambda event, _: called.append(event))
        for _ in range(1000):
            held.hold(folder)
        # The heartbeat of a process does not come within this time.
        assert not [event for event in called if event.startswith(("os.", "open", "fcntl"))]
        held.release(folder)
        leases.end(path)

    with forked(hold):
        pass
