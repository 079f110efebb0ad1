"""The directory that the user names, and the sets of rows in it."""

import atexit
import contextlib
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.store.appending import Writer
from cachefreeze.store.budget import Budget
from cachefreeze.store.files import open_regular, why_not_writable, write_atomically
from cachefreeze.store.format import Layout, Row, metadata
from cachefreeze.store.locks import Held
from cachefreeze.store.reading import Files
from cachefreeze.store.rows import Rows

# Backup programs know the first line by its standard (bford.info/cachedir).
TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This folder holds activations cached by cachefreeze. It may be deleted at any time.\n"
)
_TAG_FILE = "CACHEDIR.TAG"
_MOST_MESSAGES = 50


class Directory:
    """Rows on the disk, shared with other runs at any time.

    Args:
        path: Folder that holds the sets. It is made if it is not there.
        max_bytes: Largest number of bytes that all sets may take, over all runs. If None, half of
            what they and the free space of the disk are together.

    Attributes:
        messages: Sentences for the user, so far.

    Raises:
        UserError: the path is a file, or the folder cannot be made, or it holds other files.
    """

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        self._path = Path(path).absolute()
        self.messages: list[str] = []
        # Not a method: the thread would keep this object alive.
        tell = _teller(self.messages)
        self._tell = tell
        self._rows: dict[bytes, Rows] = {}
        self._held = Held()
        self._files = Files()
        self._writer = Writer(self._path, Budget(self._path, max_bytes), tell)
        self._closed = False
        problem = _prepare(self._path)
        if problem is not None:
            self._writer.stop(
                f"{self._path} cannot be written to ({problem}): rows that lie there are used, "
                "and no further ones are kept"
            )
        _open.add(self)

    def rows(self, name: bytes, row: Row, about: Mapping[str, Any], codec: str = "raw") -> Rows:
        """Returns the rows of one kind of value.

        Args:
            name: Hash of how the value is made and of the bits that it is made from, 16 bytes.
            row: How a row lies in memory.
            about: What to say about the value, as plain JSON, for people.
            codec: How new rows are written, "raw" or "zstd". Both are read whatever it is.

        Raises:
            ValueError: the set was opened with another row, or `about` is no plain JSON.
        """
        assert len(name) == 16, "the name of a set has 16 bytes"
        assert not self._closed, "the directory is closed"
        found = self._rows.get(name)
        if found is None:
            metadata(name.hex(), Layout.of(row), about, 0)
            folder = self._path / name.hex()
            held, files, writer = self._held, self._files, self._writer
            found = Rows(folder, row, about, held, files, writer, self._tell, codec)
            self._rows[name] = found
        if found.row != row:
            raise ValueError(f"{name.hex()} holds {found.row}, and not {row}")
        return found

    def has(self, name: bytes) -> bool:
        """Returns whether there may be rows of one kind of value.

        Args:
            name: Hash of how the value is made, 16 bytes.
        """
        return (self._path / name.hex()).is_dir()

    def close(self) -> None:
        """Writes what is left, and gives back locks and files."""
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        for rows in self._rows.values():
            rows.flush()
        self._writer.close()
        for rows in self._rows.values():
            rows.close()
        self._files.close()

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()

    def _leave_to_the_parent(self) -> None:
        self._writer.leave_to_the_parent()
        self._held.leave_to_the_parent()
        self._files.leave_to_the_parent()
        for rows in self._rows.values():
            rows.leave_to_the_parent()


def _prepare(path: Path) -> str | None:
    """Makes the folder, with its tag. Returns why it cannot be written to, if so."""
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
    # A process that was killed while it wrote the tag leaves a part of it.
    return name.startswith(f"{_TAG_FILE}.")


def _cannot_be_used(path: Path, reason: str) -> UserError:
    return UserError(
        f"the folder {path} cannot hold activations ({reason}): give another one as directory, "
        "or none to keep them in memory"
    )


def is_directory(path: Path) -> bool:
    """Returns whether a folder carries the tag of cachefreeze.

    Args:
        path: Folder that may hold sets.
    """
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
    # Rows that do not fill a chunk would be lost with a program that ends without `close`.
    for directory in list(_open):
        with contextlib.suppress(Exception):
            directory.close()


def _after_fork() -> None:
    for directory in list(_open):
        directory._leave_to_the_parent()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)
