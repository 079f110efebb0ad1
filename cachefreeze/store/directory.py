"""The cache directory of the user, and the sets of rows in it."""

import atexit
import contextlib
import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.store.appending import Writer
from cachefreeze.store.bucket import Bucket
from cachefreeze.store.budget import Budget, named_folders
from cachefreeze.store.files import (
    open_regular,
    why_not_writable,
    write_atomically,
    write_partial,
)
from cachefreeze.store.format import Layout, Row, SegmentError, metadata, read_head
from cachefreeze.store.leases import end
from cachefreeze.store.locks import Held
from cachefreeze.store.mirror import Mirror
from cachefreeze.store.objects import is_url
from cachefreeze.store.reading import Files
from cachefreeze.store.rows import Rows

# Backup programs skip folders with this first line (bford.info/cachedir).
TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This folder holds activations cached by cachefreeze. It may be deleted at any time.\n"
)
_TAG_FILE = "CACHEDIR.TAG"
_MOST_MESSAGES = 50
# Largest size of a small file that runs share.
_SHARED_BYTES = 2**20


class Directory:
    """Rows on disk. Several runs may use the same directory at the same time.

    Args:
        path: Folder that holds the sets. It is created if it does not exist.
        max_bytes: Largest number of bytes of all sets together, for all runs. If None, half of the
            disk space that is free or used by the sets.
        bucket: Object store whose rows are copied into the folder, and which gets the new ones.
            None if there is none.

    Attributes:
        messages: Messages for the user.

    Raises:
        UserError: The path is a file, the folder cannot be created, or it holds other files. Or the
            object store cannot be used.
    """

    def __init__(self, path: Path, max_bytes: int | None, bucket: Bucket | None = None) -> None:
        self._path = Path(path).absolute()
        self.messages: list[str] = []
        # Not a method, since the writer's thread would then keep this object alive.
        tell = _teller(self.messages)
        self._tell = tell
        self._rows: dict[bytes, Rows] = {}
        self._held = Held()
        self._files = Files()
        self._budget = Budget(self._path, max_bytes)
        problem = _prepare(self._path)
        self._mirror = mirror = (
            None if bucket is None else Mirror(bucket, self._path, max_bytes, tell)
        )
        written = (lambda: None) if mirror is None else mirror.wake
        self._writer = Writer(self._path, self._budget, tell, written)
        self._closed = False
        if problem is not None:
            self._writer.stop(
                f"{self._path} cannot be written to ({problem}): the rows in it are used, and no "
                "further rows are written"
            )
        _open.add(self)

    @property
    def path(self) -> Path:
        """Absolute path of the folder."""
        return self._path

    @property
    def room(self) -> int:
        """Number of bytes that all sets may take if there is none yet."""
        return self._budget.limit(0)

    def rows(self, name: bytes, row: Row, about: Mapping[str, Any], codec: str = "raw") -> Rows:
        """Returns the rows of one set, which is created if it does not exist.

        Args:
            name: Name of the set, 16 bytes: a hash of the operations and weights that make the
                value.
            row: Sizes and type of one row.
            about: Description of the value for people, as plain JSON.
            codec: Codec for new rows, "raw" or "zstd". Rows of both codecs are read in any case.

        Raises:
            ValueError: The set was opened with another `row`, or the description is not plain JSON.
        """
        assert len(name) == 16, "the name of a set has 16 bytes"
        assert not self._closed, "the directory is closed"
        found = self._rows.get(name)
        if found is None:
            metadata(name.hex(), Layout.of(row), about, 0)
            if self._mirror is not None:
                self._mirror.open(name.hex())
            folder = self._path / name.hex()
            held, files, writer = self._held, self._files, self._writer
            found = Rows(folder, row, about, held, files, writer, self._tell, codec, self._mirror)
            self._rows[name] = found
        if found.row != row:
            raise ValueError(f"the set {name.hex()} holds {found.row}, and not {row}")
        return found

    def has(self, name: bytes) -> bool:
        """Returns whether a set exists. It may be empty.

        Args:
            name: Name of the set, 16 bytes.
        """
        if self._mirror is not None:
            self._mirror.open(name.hex())
        return (self._path / name.hex()).is_dir()

    def agree(self, name: str, content: bytes, is_right: Callable[[bytes], bool]) -> bytes | None:
        """Writes a small file that all runs share, unless another run has written it before.

        Args:
            name: Name of the file in the folder `costs`.
            content: Content if there is no such file yet.
            is_right: Function that returns whether what an object store holds can be used.

        Returns:
            Content that the first run has written. None if the folder fails.
        """
        folder = self._path / "costs"
        found = _read_shared(folder / name)
        if found is None:
            if self._mirror is not None:
                other = self._mirror.agree(f"costs/{name}", content)
                content = other if other is not None and is_right(other) else content
            with contextlib.suppress(OSError):
                folder.mkdir(exist_ok=True)
                with write_partial(folder / name, content) as written:
                    try:
                        os.link(written, folder / name)  # fails if another process was faster
                    finally:
                        written.unlink()
            found = _read_shared(folder / name)
        return found

    def newest_sets(self, most: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Yields the names of the sets that were changed last, with what is said about them.

        Args:
            most: Largest number of sets.
        """
        folders = named_folders(self._path)
        if len(folders) > most:
            folders = sorted(folders, key=_changed)[-most:]
        for folder in folders:
            for segment in named_folders(folder):
                with contextlib.suppress(SegmentError):
                    yield bytes.fromhex(folder.name), read_head(segment, folder.name).about
                    break

    def close(self) -> None:
        """Writes the last rows, releases all locks and closes all files."""
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        for rows in self._rows.values():
            rows.flush()
        self._writer.close()
        if self._mirror is not None:
            self._mirror.close()
        for rows in self._rows.values():
            rows.close()
        self._files.close()
        end(self._path)

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()

    def _after_fork(self) -> None:
        self._writer.after_fork()
        if self._mirror is not None:
            self._mirror.after_fork()
        self._held.after_fork()
        self._files.after_fork()
        for rows in self._rows.values():
            rows.after_fork()


def _read_shared(path: Path) -> bytes | None:
    try:
        with open(path, "rb", opener=open_regular) as file:
            # A number takes about 25 bytes.
            return file.read(_SHARED_BYTES)
    except OSError:
        return None


def _changed(folder: Path) -> float:
    try:
        return os.lstat(folder).st_mtime
    except OSError:  # another process has removed it
        return 0.0


def open_directory(
    directory: str | os.PathLike[str] | None,
    max_bytes: int | None,
    local: str | os.PathLike[str] | None = None,
) -> Directory | None:
    """Opens a folder, or an object store with a local folder.

    Args:
        directory: Folder, or URL such as "s3://bucket/prefix". If None, nothing is opened.
        max_bytes: Largest number of bytes of the folder, or None for half of the free disk.
        local: Folder for copies of what lies in the object store. If None, one in the folder for
            caches of the user, `~/.cache/cachefreeze`.

    Raises:
        UserError: The folder or the object store cannot be used.
    """
    if directory is None or not is_url(directory):
        if local is not None:
            raise UserError(
                f"local={str(local)!r} is for copies of an object store, and directory is none: "
                'leave it out, or give a URL such as directory="s3://bucket/name"'
            )
        return None if directory is None else Directory(Path(directory), max_bytes)
    bucket = Bucket(str(directory))
    folder = default_local(bucket.url) if local is None else Path(local)
    return Directory(folder, max_bytes, bucket)


def default_local(url: str) -> Path:
    """Returns the folder for copies of an object store, if the user names none."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "cachefreeze" / hashlib.sha256(url.encode()).hexdigest()[:32]


def _prepare(path: Path) -> str | None:
    """Creates the folder and its tag. Returns why the folder cannot be written to, or None."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = os.listdir(path)
        if names and not is_directory(path) and any(not _is_part_of_tag(name) for name in names):
            raise _cannot_be_used(path, "it holds other files")
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror or str(error)
        raise _cannot_be_used(path, reason) from error
    problem = why_not_writable(path)
    if problem is None and not is_directory(path):
        try:
            write_atomically(path / _TAG_FILE, TAG.encode())
        except OSError as error:
            problem = error.strerror or str(error)
    return problem


def _is_part_of_tag(name: str) -> bool:
    # A process that is killed while it writes the tag leaves a part of it.
    return name.startswith(f"{_TAG_FILE}.")


def _cannot_be_used(path: Path, reason: str) -> UserError:
    return UserError(
        f"the folder {path} cannot hold activations ({reason}): give another directory, or none "
        "to keep them in memory"
    )


def is_directory(path: Path) -> bool:
    """Returns whether a folder is a cache directory of cachefreeze, by its tag."""
    try:
        with open(path / _TAG_FILE, "rb", opener=open_regular) as file:
            return file.read(len(TAG) + 1) == TAG.encode()
    except OSError:
        return False


def _teller(messages: list[str]) -> Callable[[str], None]:
    def tell(sentence: str) -> None:
        if sentence not in messages and len(messages) < _MOST_MESSAGES:
            messages.append(sentence)

    return tell


_open: "weakref.WeakSet[Directory]" = weakref.WeakSet()


def _close_all() -> None:
    # If a program ends without `close`, the rows that do not fill a chunk would be lost.
    for directory in list(_open):
        with contextlib.suppress(Exception):
            directory.close()


def _after_fork() -> None:
    for directory in list(_open):
        directory._after_fork()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)
