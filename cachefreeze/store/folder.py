"""The cache folder: its tag, its stores, who uses them, and their removal."""

import errno
import fcntl
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from cachefreeze.errors import UserError
from cachefreeze.files import (
    PARTIAL,
    entries_below,
    is_locked,
    lock_file,
    nearest_folder,
    open_regular,
    remove_tree,
    size_of_tree,
    unlock_file,
    why_not_writable,
    write_atomically,
)

FINGERPRINT = re.compile(r"[0-9a-f]{32}")
# Stores on their way out, and those that are only to measure with.
TRASH, SCRATCH = ".trash-", ".scratch-"
# Of the disk's free bytes: what the cache folder may take if nothing else is said.
FREE_DISK_SHARE = 0.8
# Marks a store that is to stay; when it was written is when the store was last taken into use.
KEPT = "kept"
TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This folder holds activations cached by cachefreeze. It may be deleted at any time.\n"
)


class Lock:
    """An advisory lock on a store's folder that dies with the process that holds it."""

    def __init__(self, folder: Path, *, exclusive: bool) -> None:
        """Raises BlockingIOError if others hold it, FileNotFoundError if there is no such store."""
        path = self._path = folder / "lock"
        if folder.is_symlink():
            raise OSError(errno.ELOOP, f"{folder} is a symbolic link")
        how = os.O_RDWR | os.O_CREAT if exclusive else os.O_RDONLY
        self._file = open_regular(path, how)
        try:
            self._lock(exclusive)
        except BaseException:
            unlock_file(self._file)
            raise

    def _lock(self, exclusive: bool) -> None:
        lock_file(self._file, exclusive=exclusive)
        # Whoever removed the store in between left us a lock on a file without a name.
        if os.fstat(self._file).st_ino != self._path.stat().st_ino:
            raise FileNotFoundError(f"{self._path.parent} was removed")

    def share(self) -> None:
        """From writer to reader. In between others may take it: raises as the constructor does."""
        self._lock(exclusive=False)

    def release(self) -> None:
        unlock_file(self._file)


def check_cache_dir(folder: Path) -> None:
    """Raises UserError if the folder cannot be used as a cache. Writes nothing.

    A folder that holds anything must carry our tag: what is in a cache may be deleted.
    """
    problem = why_not_writable(folder)
    if problem is None and folder.is_dir() and not is_cache_dir(folder) and _holds_files(folder):
        problem = "it holds other files, and what is in a cache may be deleted"
    if problem is not None:
        raise _cannot_be_used(folder, problem)


def _holds_files(folder: Path) -> bool:
    # A process that was killed while it made the folder left a part of the tag.
    return any(not path.match("CACHEDIR.TAG.*.partial") for path in folder.iterdir())


def prepare_cache_dir(folder: Path) -> None:
    """Make the cache folder, with its tag.

    Raises:
        UserError: it is a file, or cannot be made or written to.
    """
    check_cache_dir(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not is_cache_dir(folder):
            write_atomically(folder / "CACHEDIR.TAG", TAG.encode())
    except OSError as error:
        raise _cannot_be_used(folder, error.strerror or str(error)) from error


def _cannot_be_used(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the cache folder {folder} cannot be used ({reason}): "
        "choose another with --cache-dir, or use --no-cache"
    )


def is_cache_dir(folder: Path) -> bool:
    """Whether the folder carries our tag."""
    try:
        with open(folder / "CACHEDIR.TAG", "rb", opener=open_regular) as file:
            return file.read(len(TAG) + 1) == TAG.encode()
    except OSError:
        return False


def default_budget(folder: Path) -> float:
    """Bytes that a cache folder may take if nothing else is said."""
    # What lies in it already is not free, but the cache's to use.
    free = shutil.disk_usage(nearest_folder(folder)).free
    return FREE_DISK_SHARE * (free + size_of_tree(folder))


def store_folders(cache_dir: Path) -> list[Path]:
    """The stores in a cache folder, committed or not, in the order of their names.

    A folder with none of our files is none of ours, whatever its name.
    """
    return sorted(
        Path(entry.path)
        for entry in os.scandir(cache_dir)
        if FINGERPRINT.fullmatch(entry.name)
        and entry.is_dir(follow_symlinks=False)
        and is_store(Path(entry.path))
    )


def is_store(folder: Path) -> bool:
    """Whether a folder holds a store of ours, or what is left of one."""
    return any(os.path.lexists(folder / name) for name in ("lock", "COMMITTED"))


def remove_store(folder: Path) -> bool:
    """Remove a store, committed or not, unless a process reads or writes it."""
    try:
        lock = Lock(folder, exclusive=True)
    except FileNotFoundError:
        return True
    except OSError:  # others hold it, or it is not ours to remove
        return False
    return remove_locked(folder, lock)


def remove_locked(folder: Path, lock: Lock) -> bool:
    """Remove a store that is locked exclusively; lets go of the lock. Returns whether it went."""
    # Renamed first: a removal that is cut short leaves rubbish, never half a store.
    trash = folder.with_name(f"{TRASH}{uuid.uuid4().hex}")
    try:
        folder.rename(trash)
    except OSError:  # no permission any more: whoever may, prunes it later
        return False
    finally:
        lock.release()
    remove_tree(trash)
    return True


def in_use(folder: Path) -> bool:
    """Whether a process reads or writes a store. (Takes its lock for a moment to find out.)"""
    return not _can_lock(folder, fcntl.LOCK_EX)


def _can_lock(folder: Path, how: int) -> bool:
    try:
        file = open_regular(folder / "lock", os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def is_being_written(folder: Path) -> bool:
    """Whether a process holds a store for itself alone. (Takes its lock for a moment.)"""
    return not _can_lock(folder, fcntl.LOCK_SH)


def mark_kept(folder: Path) -> None:
    """Say that a store is to be kept for later runs, and is in use now.

    Raises:
        OSError: nothing can be written there.
    """
    file = open_regular(folder / KEPT, os.O_WRONLY | os.O_CREAT)
    try:
        os.utime(file)
    finally:
        os.close(file)


def kept_since(folder: Path) -> float | None:
    """When a store that is kept for later runs was last taken into use, in seconds since 1970; None
    if it is not kept."""
    try:
        found = (folder / KEPT).lstat()
    except OSError:
        return None
    return found.st_mtime if stat.S_ISREG(found.st_mode) else None


def is_committed(folder: Path) -> bool:
    """Whether a store says that it is complete."""
    return (folder / "COMMITTED").is_file()


def rubbish(cache_dir: Path) -> list[Path]:
    """What killed runs left: stores without a marker, half-removed ones, `*.partial` files."""
    stores = store_folders(cache_dir)
    found = [folder for folder in stores if not is_committed(folder) and not in_use(folder)]
    for entry in os.scandir(cache_dir):
        if not entry.is_dir(follow_symlinks=False):
            continue
        path = Path(entry.path)
        abandoned = entry.name.startswith(SCRATCH) and not is_locked(path)
        if abandoned or entry.name.startswith(TRASH):
            found.append(path)
    found += cache_dir.glob("CACHEDIR.TAG.*.partial")
    for folder in filter(is_committed, stores):
        if not in_use(folder):  # whoever uses it may be mending it
            found += partial_files(folder)
    return sorted(found)


def partial_files(folder: Path) -> Iterator[Path]:
    """Files below a store that were not written to their end. Links are not followed."""
    for entry in entries_below(folder):
        if entry.name.endswith(PARTIAL) and not entry.is_dir(follow_symlinks=False):
            yield Path(entry.path)


def remove_rubbish(cache_dir: Path, keep: str = "") -> int:
    """Remove `rubbish`, but for the store that is called `keep`; returns how many files and folders
    went."""
    removed = 0
    for path in rubbish(cache_dir):
        if path.name == keep:
            continue
        if FINGERPRINT.fullmatch(path.name):
            remove_store(path)
        elif path.is_dir():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)
        removed += not path.exists()
    return removed
