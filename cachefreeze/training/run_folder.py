"""The folder of a run, which only one process writes to, and the folder of the cache."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.store.directory import Directory, is_directory
from cachefreeze.store.files import lock_folder, unlock_file, why_not_writable, write_atomically
from cachefreeze.store.objects import is_url


class RunFolder:
    """The folder of one run: args.json, metrics, summary.json, checkpoints.

    Nothing is written before `create`.

    Args:
        path: Path of the folder.
        resume: Whether the folder holds the run that goes on. If so, it is locked at once against
            other processes.
        writes: Whether this process writes the files. If not, another process of the same run
            does, and nothing is checked or locked here.

    Raises:
        UserError: The folder holds another run, or cannot be written, or another process is
            training in it. Methods raise it, too.
    """

    # args.json alone is of a run that ended before its first epoch: there is nothing to lose.
    RESULTS = ("metrics.jsonl", "summary.json", "last.pt")

    def __init__(self, path: Path, *, resume: bool = False, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self._lock: int | None = None
        if not writes:
            return
        problem = why_not_writable(path)
        if problem is not None:
            raise self._cannot_be_written(problem)
        self.resume = resume
        if resume:
            self._take()
        self._refuse_another_run()

    def create(self, settings: Mapping[str, Any]) -> None:
        """Makes the folder, unless it is there, and writes args.json.

        The folder is locked against other processes until `close`.

        Args:
            settings: Settings of the run.
        """
        if not self.writes:
            return
        if self._lock is None:
            with self.writing():
                self.path.mkdir(parents=True, exist_ok=True)
            self._take()
            self._refuse_another_run()  # one that has come since
        for path in self.path.glob("*.partial"):  # what a killed process left
            path.unlink(missing_ok=True)
        self.write_json("args.json", settings)

    def close(self) -> None:
        """Unlocks the folder."""
        if self._lock is not None:
            unlock_file(self._lock)
            self._lock = None

    def _take(self) -> None:
        with self.writing():
            self._lock = lock_folder(self.path)
        if self._lock is None:
            raise UserError(f"another process is training in {self.path}: wait for it, or stop it")

    def _refuse_another_run(self) -> None:
        held = [name for name in self.RESULTS if (self.path / name).exists()]
        if held and not self.resume:
            raise UserError(
                f"{self.path} holds a run already ({', '.join(held)}): go on with it (--resume "
                f"{self.path}), choose another --output-dir, or remove that one"
            )

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a file of JSON, whole or not at all.

        Args:
            name: Name of the file.
            content: Content of the file.
        """
        if not self.writes:
            return
        with self.writing():
            write_atomically(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns errors of the file system into a UserError."""
        try:
            yield
        except OSError as error:
            raise self._cannot_be_written(error.strerror or str(error)) from error

    def _cannot_be_written(self, reason: str) -> UserError:
        return UserError(
            f"the output folder {self.path} cannot be written ({reason}): "
            "free some space, or choose another with --output-dir"
        )


def check_cache_folder(folder: Path) -> None:
    """Checks that a folder can hold kept rows. Nothing is written.

    Args:
        folder: Folder for kept rows. It need not be there.

    Raises:
        UserError: The folder cannot be made, or holds other files.
    """
    if is_url(folder):
        raise _cannot_be_used(folder, "the program keeps rows in a folder, not at a URL")
    problem = why_not_writable(folder)
    try:
        if folder.is_dir():  # rows that lie there are used even if none can be written
            others = not is_directory(folder) and any(
                not path.match("CACHEDIR.TAG*") for path in folder.iterdir()
            )
            problem = "it holds other files" if others else None
    except OSError as error:
        problem = error.strerror or str(error)
    if problem is not None:
        raise _cannot_be_used(folder, problem)


def make_cache_folder(folder: Path) -> None:
    """Makes the folder for kept rows, so that an error shows now, not hours later.

    Raises:
        UserError: The folder cannot be made, or holds other files.
    """
    check_cache_folder(folder)
    try:
        Directory(folder, None).close()
    except UserError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else str(error)
        raise _cannot_be_used(folder, reason or str(error)) from error


def _cannot_be_used(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the cache folder {folder} cannot be used ({reason}): choose another with --cache-dir"
    )
