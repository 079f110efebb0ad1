"""Marks on segments that processes of other machines see, and their heartbeat.

A `flock` holds for the processes of one machine and one mounted file system. So each process also
has a lease: a folder with an empty file for each segment that it uses, and a file that it touches
every few seconds.
"""

import atexit
import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cachefreeze.store.files import LOCK_ATTEMPTS, LOCK_PAUSE_SECONDS

LEASES = "leases"
# A lease counts until its process has not touched it for the second number of seconds.
BEAT_SECONDS, LEASE_SECONDS = 15.0, 60.0
_BEAT, _NEW, _EXCLUSIVE = "beat", ".new-", ".exclusive"
# Who shares its locks, and a random part.
_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Mark:
    """Mark of this process on a segment, or on something else that is used by one at a time.

    Args:
        lease: Lease that the mark belongs to.
        name: Name of the mark.
    """

    def __init__(self, lease: "Lease", name: str) -> None:
        self._lease = lease
        self._name = name

    @property
    def is_lost(self) -> bool:
        """Whether other machines may have taken this process for dead since the mark was made."""
        return self._lease.is_lost

    def remove(self) -> None:
        """Removes the mark."""
        self._lease.unmark(self._name)


class Lease:
    """Marks of this process in one directory.

    Args:
        directory: Folder that holds the sets.

    Attributes:
        folder: Folder of the lease.

    Raises:
        OSError: The folder cannot be written to.
    """

    def __init__(self, directory: Path) -> None:
        root = directory / LEASES
        root.mkdir(exist_ok=True)
        _remove_dead(root)
        self._counts: Counter[str] = Counter()
        self._lost = False
        self._renewed = _clock()
        name = uuid.uuid4().hex
        new = root / f"{_NEW}{name}"
        new.mkdir()
        try:
            (new / _BEAT).touch()
            # A process without working locks is a machine of its own.
            here = _here(root) if _can_lock(new / _BEAT) else uuid.uuid4().hex[:16]
            self.folder = new.rename(root / f"{here}-{name}")
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise

    @property
    def is_lost(self) -> bool:
        """Whether other machines may take this process for dead, or did so."""
        return self._lost or _clock() - self._renewed >= LEASE_SECONDS

    @property
    def is_unused(self) -> bool:
        """Whether there are no marks."""
        return not self._counts

    def beat(self) -> None:
        """Shows other machines that this process lives."""
        began = _clock()
        if not self.is_lost:
            try:
                os.utime(self.folder / _BEAT)
            except FileNotFoundError:
                self._lost = True
            except OSError:  # tried again later
                return
        # The process may have been stopped just before the call.
        self._lost = self.is_lost
        if self._lost:
            self.end()
        else:
            self._renewed = began

    def mark(self, name: str) -> Mark:
        """Makes a mark. The same mark may be made several times.

        Raises:
            OSError: The folder cannot be written to, or has been removed.
        """
        self._counts[name] += 1
        try:
            os.close(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))
        except BaseException:
            self._forget(name)
            raise
        return Mark(self, name)

    def unmark(self, name: str) -> None:
        """Removes a mark, once for each time that it was made."""
        with _guard:
            if self._forget(name):
                with contextlib.suppress(OSError):
                    os.unlink(self.folder / name)

    def _forget(self, name: str) -> bool:
        self._counts[name] -= 1
        if self._counts[name] > 0:
            return False
        del self._counts[name]
        return True

    def end(self) -> None:
        """Removes the lease with all its marks."""
        self._lost = True
        shutil.rmtree(self.folder, ignore_errors=True)


# Of this process, by directory. The garbage collector may close a directory while the guard is
# held, so the guard can be taken twice.
_leases: dict[Path, Lease] = {}
_guard = threading.RLock()
_stop = threading.Event()


def mark(directory: Path, name: str, *, exclusive: bool, patient: bool = True) -> Mark | None:
    """Marks something as used by this process, unless another machine uses it.

    Args:
        directory: Folder that holds the sets.
        name: Name of what is used.
        exclusive: Whether no other machine may use it at the same time.
        patient: Whether to wait for a moment if another machine uses it.

    Returns:
        The mark. None if the directory cannot be written to.

    Raises:
        BlockingIOError: Another machine uses it.
    """
    try:
        made = _mark(directory, name + _EXCLUSIVE if exclusive else name)
    except OSError:
        return None
    # Both sides make their mark first and look then, so at least one of them sees the other.
    for attempt in range(LOCK_ATTEMPTS if patient else 1):
        if attempt:
            time.sleep(LOCK_PAUSE_SECONDS)
        if not is_marked_elsewhere(directory, name, exclusive=not exclusive):
            return made
    made.remove()
    raise BlockingIOError(f"{name} is used by another machine")


def _mark(directory: Path, name: str) -> Mark:
    with _guard:
        lease = _leases.get(directory)
        if lease is not None and not lease.is_lost:
            with contextlib.suppress(FileNotFoundError):
                return lease.mark(name)
        if lease is not None:
            lease.end()
        lease = _leases[directory] = Lease(directory)
        _start()
        return lease.mark(name)


def is_marked_elsewhere(directory: Path, name: str, *, exclusive: bool = False) -> bool:
    """Returns whether a process that does not share locks with this one has a mark.

    Args:
        directory: Folder that holds the sets.
        name: Name of what is used.
        exclusive: Whether only exclusive marks are looked for.
    """
    wanted = {name + _EXCLUSIVE} if exclusive else {name, name + _EXCLUSIVE}
    root = directory / LEASES
    # Listed, since a network file system looks at a folder anew only when it is opened.
    found = [lease for lease in _elsewhere(root) if wanted & set(_names(lease))]
    return bool(found) and any(_lives(lease, _now(root)) for lease in found)


def is_shared(directory: Path) -> bool:
    """Returns whether processes that do not share locks with this one use a directory."""
    return any(True for _ in _elsewhere(directory / LEASES))


def end(directory: Path) -> None:
    """Removes the lease of this process in a directory, if it has no marks there."""
    with _guard:
        lease = _leases.get(directory)
        if lease is not None and lease.is_unused:
            del _leases[directory]
            lease.end()
        if not _leases:
            _stop.set()


def _elsewhere(root: Path) -> Iterator[Path]:
    names = [name for name in _names(root) if _NAME.fullmatch(name)]
    own = _leases.get(root.parent)
    here = _here(root) if names else ""
    for name in names:
        lease = root / name
        if not name.startswith(f"{here}-") and (own is None or lease != own.folder):
            yield lease


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _lives(lease: Path, now: float | None) -> bool:
    """Returns whether a process has touched its lease lately. It does if nobody knows the time."""
    try:
        # Opened, since a network file system asks for the time of a file anew only then.
        file = os.open(lease / _BEAT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            beaten = os.fstat(file).st_mtime
        finally:
            os.close(file)
    except OSError:
        return False
    return now is None or abs(now - beaten) < LEASE_SECONDS


def _now(root: Path) -> float | None:
    """Returns the time by the clock of the file system, which may be another machine's."""
    try:
        os.utime(root)
        return os.stat(root).st_mtime
    except OSError:
        return None


def _remove_dead(root: Path) -> None:
    now = _now(root)
    for name in _names(root):
        if (_NAME.fullmatch(name) or name.startswith(_NEW)) and not _lives(root / name, now):
            with contextlib.suppress(OSError):
                if name.startswith(_NEW) and time.time() - os.lstat(root / name).st_mtime < 3600:
                    continue  # it is being made
                shutil.rmtree(root / name)


def _here(root: Path) -> str:
    """Returns a name for all processes whose locks on this file system are seen by each other."""
    try:
        machine = _BOOT.read_text()
    except OSError:
        machine = f"{platform.node()} {uuid.getnode()}"
    # Two mounts of one network folder do not share locks.
    return hashlib.sha256(f"{machine} {os.stat(root).st_dev}".encode()).hexdigest()[:16]


def _can_lock(path: Path) -> bool:
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def _clock() -> float:
    # This clock goes on while the machine sleeps.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _start() -> None:
    global _stop
    if len(_leases) == 1:
        _stop.set()
        _stop = threading.Event()
        threading.Thread(
            target=_run, args=(_stop,), name="cachefreeze-heartbeat", daemon=True
        ).start()


def _run(stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        for lease in list(_leases.values()):
            lease.beat()


def _end_all() -> None:
    _stop.set()
    for lease in list(_leases.values()):
        lease.end()


def _after_fork() -> None:
    global _guard, _stop
    _guard, _stop = threading.RLock(), threading.Event()
    _leases.clear()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_after_fork)
