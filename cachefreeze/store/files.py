"""Atomic writes, locks on files and folders, and walks through folders."""

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Ending of the names of files that are not complete yet.
PARTIAL = ".partial"


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the content of a file. A crash at any moment leaves the old file or the new one.

    Args:
        path: Path of the file.
        content: New content.

    Raises:
        OSError: The file cannot be written. The old one is untouched.
    """
    with write_partial(path, content) as written:
        written.replace(path)
    sync_folder(path.parent)


@contextmanager
def write_partial(path: Path, content: bytes) -> Iterator[Path]:
    """Writes a temporary file beside `path` and yields its path. The caller renames it.

    Its content is on disk by then. If the caller raises an error, the file is removed.

    Args:
        path: Path to which the caller renames the file.
        content: Content of the file.
    """
    with partial_beside(path) as temporary:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary


@contextmanager
def partial_beside(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`, where the caller creates a file and renames it.

    No other process uses the path. If the caller raises an error, the file is removed.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    # Removed first, since an existing file may be a link.
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Writes a folder to disk. A rename inside of it is on disk only after that."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def lock_folder(folder: Path) -> int | None:
    """Takes an advisory lock on a folder, which ends with this process.

    Returns:
        Descriptor that holds the lock. None if another process holds it.
    """
    return take_lock(os.open(folder, os.O_RDONLY))


def take_lock(file: int) -> int | None:
    """Takes the exclusive lock of an open file or folder.

    Args:
        file: Descriptor of the file. It is closed if the lock cannot be had.

    Returns:
        The descriptor, which holds the lock. None if another process holds it.
    """
    try:
        lock_file(file, exclusive=True)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError:  # a file system without locks
        pass
    return file


# Not the filelock library: its shared locks are SQLite databases or have a thread each, every
# reader must be able to write to them, and another program can forge them. Its exclusive lock needs
# a writable file. Here, a reader without permission to write locks up to 128 files at once.
# Another process may hold a lock for a moment, only to test it.
LOCK_ATTEMPTS, LOCK_PAUSE_SECONDS = 10, 0.02
# Descriptors that hold a lock. A forked process inherits them, and would keep the locks if this
# process is killed, so it closes them.
_holding: set[int] = set()


def lock_file(file: int, *, exclusive: bool) -> None:
    """Takes an advisory lock on an open file, until `unlock_file` or the end of this process.

    Args:
        file: Descriptor of the file.
        exclusive: Whether no other process may hold a lock on the file at the same time.

    Raises:
        BlockingIOError: Other processes hold it.
    """
    how = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB
    for attempt in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(file, how)
            break
        except BlockingIOError:
            if attempt == LOCK_ATTEMPTS - 1:
                raise
            time.sleep(LOCK_PAUSE_SECONDS)
    _holding.add(file)


def unlock_file(file: int) -> None:
    """Releases the lock on a file, and closes the file."""
    # Unlocked before it is closed: a process that another thread forks now has the descriptor, too.
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
    _holding.discard(file)
    os.close(file)


def _leave_locks_to_the_parent() -> None:
    for file in _holding:
        os.close(file)
    _holding.clear()


os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


def is_locked(folder: Path) -> bool:
    """Returns whether a process holds the lock on a folder. Takes the lock for a moment."""
    file = lock_folder(folder)
    if file is not None:
        unlock_file(file)
    return file is None


def nearest_folder(path: Path) -> Path:
    """Returns the path itself if it exists, or else its nearest parent that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def why_not_writable(folder: Path) -> str | None:
    """Returns why a folder cannot be created or written to, or None if no reason is known.

    This writes nothing.
    """
    try:
        nearest = nearest_folder(folder)
    except OSError as error:  # for example, a name that is too long
        return error.strerror or str(error)
    if not nearest.is_dir():
        return f"{nearest} is a file"
    effective = os.access in os.supports_effective_ids
    if not os.access(nearest, os.W_OK | os.X_OK, effective_ids=effective):
        return f"no permission to write to {nearest}"
    return None


def entries_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yields all files and folders below a folder, each folder before its contents.

    Links are not followed. The depth is not limited, as it is in `os.walk` and `shutil.rmtree`.
    """
    folders = [os.fspath(folder)]
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                yield entry


def remove_tree(folder: Path) -> None:
    """Removes a folder and everything below it, as far as permissions allow."""
    for entry in reversed(list(entries_below(folder))):
        with contextlib.suppress(OSError):
            if entry.is_dir(follow_symlinks=False):
                os.rmdir(entry.path)
            else:
                os.unlink(entry.path)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def open_regular(path: str | Path, flags: int, mode: int = 0o666) -> int:
    """Opens a file that another program may have written, and returns its descriptor.

    A symbolic link may lead anywhere, and a pipe would block, so both are refused.

    Args:
        path: Path of the file.
        flags: Flags of `os.open`.
        mode: Permissions of the file if it is created.

    Raises:
        OSError: The file cannot be opened, or is not a regular file.
    """
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def human_bytes(count: float) -> str:
    """Returns a number of bytes in decimal units, with three digits: `118 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.3g} {unit}"
