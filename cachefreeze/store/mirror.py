"""Keeps a local folder and an object store alike, in a thread beside training."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cachefreeze.errors import UserError, first_line
from cachefreeze.store.bucket import Bucket
from cachefreeze.store.commits import REMOTE
from cachefreeze.store.exchange import Exchange, Link, lock_set
from cachefreeze.store.files import write_atomically
from cachefreeze.store.format import NAME, SegmentError, read_small
from cachefreeze.store.objects import Unreachable

# Seconds that a run waits for its object store in all: for the first answer, then for rows. Rows
# that come later are computed.
START_SECONDS, PATIENCE_SECONDS = 5.0, 1.0
# Seconds that the end of a run waits for the last rows to be sent: in all, without any answer, and
# if the last request failed.
CLOSE_SECONDS, SILENT_SECONDS, FAILED_CLOSE_SECONDS = 30.0, 10.0, 5.0
# Seconds between two requests for new commits of a set, while rows are not found.
PROBE_SECONDS = 1.0
# Seconds until the next try after a request has failed. They double up to the second number.
_RETRY_SECONDS, _MOST_RETRY_SECONDS = 1.0, 300.0
# Seconds until the next try if another process is busy with the same set.
_BUSY_SECONDS = 0.2
_STORE = "store"
T = TypeVar("T")


class Mirror:
    """Copies whole chunks between a local folder and an object store, both ways.

    Training reads and writes the local folder only. A thread fetches what is missing in the sets
    that are open, and sends what is new. It raises no errors. If the object store fails, the user
    is told once, and the thread tries again later.

    Args:
        bucket: Sets in the object store.
        folder: Local folder, a directory of its own.
        max_bytes: Largest number of bytes of the local folder, or None for half of the free disk.
        tell: Function called with each message for the user.

    Raises:
        UserError: The object store cannot be used, or the local folder belongs to another one.
    """

    def __init__(
        self, bucket: Bucket, folder: Path, max_bytes: int | None, tell: Callable[[str], None]
    ) -> None:
        self._bucket = bucket
        self._folder = folder
        self._link = Link(bucket, folder, max_bytes, tell)
        self._sets: dict[str, Exchange] = {}
        self._guard = threading.Lock()
        self._wake, self._end = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._patience = PATIENCE_SECONDS
        self._identified = self._closed = False
        self._failed, self._retry = "", _RETRY_SECONDS
        self._check_url()
        done, _ = self._in_time(START_SECONDS, self._identify)
        if not done:
            self._fail(self._failed or f"no answer within {START_SECONDS:.0f} seconds")

    def _check_url(self) -> None:
        known = _read_store(self._folder)
        if known is not None and known[0] != self._bucket.url:
            raise UserError(
                f"the folder {self._folder} holds copies of {known[0]}: give another one for "
                f"{self._bucket.url}"
            )

    def _identify(self) -> None:
        """Compares the object store with the one that the local folder has copies of.

        Raises:
            UserError: The object store cannot be used.
            Unreachable: A request failed.
        """
        identity = self._bucket.identity()
        prepare(self._folder, self._bucket.url, identity)
        self._identified = True

    def _in_time(self, seconds: float, function: Callable[[], T]) -> tuple[bool, T | None]:
        """Calls a function in a thread, and waits for it.

        Returns:
            Whether it has ended in time and without a failed request, and its result.

        Raises:
            UserError: The function has raised it.
        """
        results: list[T] = []
        errors: list[Exception] = []
        ended = threading.Event()

        def run() -> None:
            try:
                results.append(function())
            except Exception as error:
                errors.append(error)
            ended.set()

        threading.Thread(target=run, daemon=True, name="cachefreeze-request").start()
        ended.wait(seconds)
        if errors and isinstance(errors[0], UserError):
            raise errors[0]
        if errors:
            self._failed = first_line(errors[0])
        return bool(results), results[0] if results else None

    def open(self, name: str) -> None:
        """Begins to fetch a set, and waits for it as long as the run has patience.

        Args:
            name: Name of the set, 32 hexadecimal digits.
        """
        if self._closed:
            return
        with self._guard:
            one = self._sets.get(name)
            if one is not None:
                return
            one = self._sets[name] = Exchange(name, self._link)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="cachefreeze-objects", daemon=True
                )
                self._thread.start()
        self._wake.set()
        if not self._failed:
            began = time.monotonic()
            one.ready.wait(self._patience)
            self._patience = max(self._patience - (time.monotonic() - began), 0.0)

    def look(self, name: str) -> None:
        """Asks for new commits of a set, since rows were not found. Does not wait."""
        one = self._sets.get(name)
        if one is None or self._closed or time.monotonic() - one.probed < PROBE_SECONDS:
            return
        one.probe = True
        self._wake.set()

    def wake(self) -> None:
        """Sends the chunks that were written since the last call. Does not wait."""
        self._wake.set()

    def remove(self, name: str, segments: Sequence[str], own: bool) -> None:
        """Marks segments as removed in the object store, so that no process fetches them.

        Args:
            name: Name of the set.
            segments: Names of the segments.
            own: Whether this process has written them. Only then are their rows removed as well.
        """
        one = self._sets.get(name)
        if one is not None and not self._closed:
            one.removals += [(segment, own) for segment in segments]
            self._wake.set()

    def agree(self, path: str, content: bytes) -> bytes | None:
        """Writes a small object unless it exists. Returns what it holds, or None if unknown.

        Args:
            path: Path of the object below the URL.
            content: Content if the object does not exist.
        """
        if self._closed or self._failed or self._patience <= 0:
            return None
        began = time.monotonic()
        _, found = self._in_time(self._patience, lambda: self._bucket.agree(path, content))
        self._patience = max(self._patience - (time.monotonic() - began), 0.0)
        return found

    def close(self) -> None:
        """Sends the last chunks, for a limited time. Tells the user what was not sent."""
        if self._closed:
            return
        self._closed = True
        self._end.set()
        self._wake.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            self._wait_for(thread)
        rows = sum(one.unsent() for one in self._sets.values())
        if rows:
            why = self._failed or self._link.denied or "not all others were fetched yet"
            self._link.tell(
                f"{rows} rows are not in {self._bucket.url} yet ({why}): they stay in "
                f"{self._folder}, and the next run with this local folder that uses them sends them"
            )

    def _wait_for(self, thread: threading.Thread) -> None:
        began = time.monotonic()
        until = began + (FAILED_CLOSE_SECONDS if self._failed else CLOSE_SECONDS)
        while thread.is_alive():
            silent = max(self._bucket.objects.answered, began) + SILENT_SECONDS
            left = min(until, silent) - time.monotonic()
            if left <= 0:
                self._failed = self._failed or "there was not enough time"
                return
            thread.join(min(left, 1.0))

    def after_fork(self) -> None:
        """Does nothing more, in a forked process that does not have the thread."""
        self._closed = True
        self._thread = None
        self._sets = {}
        self._guard = threading.Lock()
        self._wake, self._end = threading.Event(), threading.Event()

    def _run(self) -> None:
        pause: float | None = None
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            ending, pause = self._end.is_set(), None
            try:
                if not self._identified:
                    self._identify()
                busy = self._round()
                self._failed, self._retry = "", _RETRY_SECONDS
                pause = _BUSY_SECONDS if busy else None
            except Unreachable as error:
                self._fail(str(error))
                pause = self._retry
            except Exception as error:
                # An error of the disk, or what nobody thought of. Training goes on.
                reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
                self._fail(reason)
                ending = True
            for one in list(self._sets.values()):
                one.ready.set()
            if ending and (pause is None or self._failed):
                return
            if self._failed:
                self._end.wait(pause)
                self._retry = min(2 * self._retry, _MOST_RETRY_SECONDS)
                pause = 0.0

    def _fail(self, reason: str) -> None:
        self._failed = reason
        self._link.say_once(
            "failed",
            f"{self._bucket.url} does not work ({reason}): rows that are not in {self._folder} are "
            "computed, and new ones are kept there until it works again",
        )

    def _round(self) -> bool:
        """Fetches and sends all that there is. Returns whether another process was busy."""
        more, busy = True, False
        while more:
            more, busy = False, False
            for one in list(self._sets.values()):
                found = one.turn(self._sets.keys(), self._end.is_set())
                busy = busy or found is None
                more = more or bool(found)
                if not found:
                    one.ready.set()
        return busy


def prepare(folder: Path, url: str, identity: str) -> None:
    """Notes which object store a local folder has copies of.

    If the object store was emptied and made anew, all that is known about it is dropped, so that
    rows are sent again.

    Args:
        folder: Local folder.
        url: URL of the object store.
        identity: Random name of the object store.

    Raises:
        OSError: The folder cannot be written.
    """
    remote = folder / REMOTE
    remote.mkdir(exist_ok=True)
    while (lock := lock_set(folder, _STORE)) is None:
        pass  # each try waits for a moment
    try:
        if _read_store(folder) == (url, identity):
            return
        for path in remote.iterdir():
            if NAME.fullmatch(path.name):
                path.unlink()
        write_atomically(remote / _STORE, json.dumps([url, identity]).encode())
    finally:
        lock.release()


def _read_store(folder: Path) -> tuple[str, str] | None:
    try:
        url, identity = json.loads(read_small(folder / REMOTE / _STORE))
    except (SegmentError, ValueError, TypeError, RecursionError):
        return None
    return str(url), str(identity)
