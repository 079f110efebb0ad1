"""Locks on segments, and the removal of segments that no process uses."""

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
import uuid
from collections import OrderedDict
from pathlib import Path

from cachefreeze.store import leases
from cachefreeze.store.files import (
    lock_file,
    open_regular,
    remove_tree,
    take_lock,
    unlock_file,
    write_atomically,
)
from cachefreeze.store.format import LOCK, REFUSED, TRASH, USED, is_folder

# Each lock is an open file. Above this number, the segment that was read longest ago loses its
# lock, and other processes may remove it.
MOST_HELD = 128
TOUCH_SECONDS = 60.0


class Gone(Exception):  # noqa: N818
    """A segment was removed, or is being removed."""


class Lock:
    """Lock on a segment or on something else, against processes of this machine and of others.

    Args:
        file: Descriptor of a locked file. None if it cannot be locked.
        mark: Mark for other machines. None if it cannot be made.
    """

    def __init__(self, file: int | None, mark: leases.Mark | None) -> None:
        self._file = file
        self._mark = mark

    @property
    def is_lost(self) -> bool:
        """Whether this process was stopped for so long that other machines took it for dead."""
        return self._mark is not None and self._mark.is_lost

    def release(self) -> None:
        """Releases the lock."""
        if self._mark is not None:
            self._mark.remove()
        if self._file is not None:
            unlock_file(self._file)


class Held:
    """Shared locks on the segments that this process reads. They prevent a removal."""

    def __init__(self) -> None:
        self._locks: OrderedDict[Path, tuple[Lock, float]] = OrderedDict()
        self._guard = threading.Lock()

    def hold(self, folder: Path) -> None:
        """Locks a segment, if it is not locked yet.

        Records once a minute that the segment is used. A segment that cannot be locked, for lack of
        permission or on a file system without locks, is read without a lock.

        Raises:
            Gone: The segment was removed.
        """
        now = time.monotonic()
        with self._guard:
            held = self._locks.pop(folder, None)
            if held is not None and held[0].is_lost:
                held[0].release()
                held = None
            lock, touched = (share(folder), float("-inf")) if held is None else held
            if now - touched > TOUCH_SECONDS:
                touch(folder)
                touched = now
            self._locks[folder] = lock, touched
            while len(self._locks) > MOST_HELD:
                self._unlock(next(iter(self._locks)))

    def release(self, folder: Path) -> None:
        """Releases the lock on a segment, if there is one."""
        with self._guard:
            self._unlock(folder)

    def after_fork(self) -> None:
        """Forgets all locks in a forked process, which does not have them."""
        self._locks.clear()
        self._guard = threading.Lock()

    def _unlock(self, folder: Path) -> None:
        held = self._locks.pop(folder, None)
        if held is not None:
            held[0].release()


def share(folder: Path, final: Path | None = None) -> Lock:
    """Takes a shared lock on a segment, as far as it can be locked.

    A forked process does not have the lock. `cachefreeze.store.files` explains why.

    Args:
        folder: Folder of the segment.
        final: Folder that the segment will be renamed to. If None, it is not renamed.

    Raises:
        Gone: The segment was removed.
    """
    file = _share_file(folder)
    try:
        lock = Lock(file, leases.mark(*_mark_of(final or folder), exclusive=False))
    except BlockingIOError as error:  # a process of another machine is removing it
        Lock(file, None).release()
        raise Gone from error
    # If the segment was removed before the lock was taken, this is a lock on a file without a name.
    if not os.path.lexists(folder / LOCK):
        lock.release()
        raise Gone
    return lock


def _share_file(folder: Path) -> int | None:
    try:
        file = open_regular(folder / LOCK, os.O_RDONLY)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise Gone from error
        return None
    try:
        lock_file(file, exclusive=False)
    except BlockingIOError as error:  # another process is removing it
        os.close(file)
        raise Gone from error
    except OSError:
        os.close(file)
        return None
    return file


def _mark_of(folder: Path) -> tuple[Path, str]:
    # Leases are in the folder that holds the sets.
    return folder.parent.parent, f"{folder.parent.name}.{folder.name}"


def touch(folder: Path) -> None:
    """Records that a segment is used now, if this is permitted."""
    with contextlib.suppress(OSError):
        os.utime(folder / USED, follow_symlinks=False)


def last_use(folder: Path) -> float:
    """Returns the time of the last use of a segment, in seconds since 1970, or 0 if unknown."""
    try:
        return os.lstat(folder / USED).st_mtime
    except OSError:
        return 0.0


def in_use(folder: Path) -> bool:
    """Returns whether a process reads or writes a segment."""
    if not is_folder(folder / "keys"):
        return False
    with contextlib.suppress(OSError):
        file = open_regular(folder / LOCK, os.O_RDONLY)
        if not _lock_now(file):
            return True
        unlock_file(file)
    return leases.is_marked_elsewhere(*_mark_of(folder))


def remove(folder: Path) -> bool:
    """Removes a segment, unless a process reads or writes it. Returns whether it was removed."""
    file = None
    if _can_be_locked(folder):
        file = _exclusive(folder)
        if file is None:
            return False
    try:
        mark = leases.mark(*_mark_of(folder), exclusive=True, patient=False)
    except BlockingIOError:
        Lock(file, None).release()
        return False
    # After the rename, an interrupted removal leaves a folder that nobody reads, not half a
    # segment.
    trash = folder.with_name(f"{TRASH}{uuid.uuid4().hex}")
    try:
        folder.rename(trash)
    except OSError:
        return False
    finally:
        Lock(file, mark).release()
    remove_tree(trash)
    return True


def lock_name(folder: Path, path: Path) -> Lock | None:
    """Takes the exclusive lock of something that processes use in turn.

    Args:
        folder: Folder that holds the sets.
        path: File in the folder that is locked. It is made if it does not exist.

    Returns:
        The lock. None if another process has it.
    """
    file = take_lock(open_regular(path, os.O_RDWR | os.O_CREAT))
    if file is None:
        return None
    try:
        return Lock(file, leases.mark(folder, path.name, exclusive=True))
    except BlockingIOError:
        unlock_file(file)
        return None


def _can_be_locked(folder: Path) -> bool:
    # A segment with anything else in the place of the lock file was not written by this store.
    try:
        return is_folder(folder / "keys") and stat.S_ISREG(os.lstat(folder / LOCK).st_mode)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _exclusive(folder: Path) -> int | None:
    try:
        file = open_regular(folder / LOCK, os.O_RDWR | os.O_CREAT)
    except OSError:
        return None
    return file if _lock_now(file) else None


def _lock_now(file: int) -> bool:
    try:
        # `lock_file` waits, which is too slow for a check of many segments.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return False
    return True


def refuse(folder: Path, sentence: str) -> bool:
    """Marks a segment, so that no process reads it. Returns whether the mark was written."""
    try:
        write_atomically(folder / REFUSED, sentence.encode())
    except OSError:
        return False
    return True


def is_refused(folder: Path) -> bool:
    """Returns whether a segment is marked as wrong."""
    return os.path.lexists(folder / REFUSED)
