"""Lists, checks and prunes the contents of a cache directory."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.store.budget import disk_bytes, named_folders, remove_trash, segment_folders
from cachefreeze.store.directory import is_directory
from cachefreeze.store.files import PARTIAL, open_regular
from cachefreeze.store.format import (
    JOURNAL,
    NEW,
    Head,
    Layout,
    Row,
    SegmentError,
    is_folder,
    read_head,
)
from cachefreeze.store.journal import Chunk, read_lines
from cachefreeze.store.leases import end
from cachefreeze.store.locks import in_use, is_refused, last_use, remove
from cachefreeze.store.reading import Damaged, check_values, is_hole, read_keys

# A segment takes less time than this to create. An older unfinished one is of a killed process.
_OLD_SECONDS = 3600.0


@dataclass
class SetReport:
    """Contents of one set.

    Attributes:
        name: Name of the set, 32 hexadecimal digits.
        row: Sizes and type of one row. None if no segment is readable.
        about: Description of the value by its last writer.
        rows: Number of rows. A row in two segments counts twice.
        nbytes: Bytes on disk.
        segments: Number of segments. Each run that adds rows writes one segment.
        in_use: Whether a process reads or writes the set now.
        first_use: Time at which the oldest segment was created, in seconds since 1970.
        last_use: Time at which a row was last read or written, in seconds since 1970.
        problems: Messages about segments that are not read.
    """

    name: str
    row: Row | None = None
    about: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    nbytes: int = 0
    segments: int = 0
    in_use: bool = False
    first_use: float = 0.0
    last_use: float = 0.0
    problems: list[str] = field(default_factory=list)


def inspect(directory: Path) -> list[SetReport]:
    """Returns the contents of each set in a directory. Writes nothing.

    Raises:
        UserError: The folder is not a cache directory.
    """
    _check(directory)
    return [_inspect_set(folder) for folder in named_folders(directory)]


def _inspect_set(set_folder: Path) -> SetReport:
    report = SetReport(set_folder.name)
    for folder in named_folders(set_folder):
        nbytes, used, made = disk_bytes(folder), last_use(folder), _made(folder)
        try:
            head, chunks, problem = _read(folder)
        except SegmentError as error:
            head, chunks, problem = None, [], str(error)
        if not is_folder(folder):  # another process removed it
            continue
        report.nbytes += nbytes
        report.segments += 1
        report.in_use |= in_use(folder)
        if problem is not None:
            report.problems.append(problem)
        if head is None:
            continue
        if used >= report.last_use:
            report.row, report.about = head.layout.row, head.about
        report.rows += sum(chunk.rows for chunk in chunks)
        report.last_use = max(report.last_use, used)
        report.first_use = min(report.first_use or made, made)
    return report


def _made(folder: Path) -> float:
    try:
        return os.lstat(folder / "zarr.json").st_mtime
    except OSError:
        return 0.0


def verify(directory: Path) -> Iterator[str]:
    """Reads everything. Yields a message for each segment or chunk that is damaged.

    Raises:
        UserError: The folder is not a cache directory.
    """
    _check(directory)
    for folder in segment_folders(directory):
        try:
            head, chunks, problem = _read(folder)
        except SegmentError as error:
            if is_folder(folder):
                yield str(error)
            continue
        if problem is not None:
            yield problem
        for chunk in chunks:
            if is_hole(folder, head.layout, chunk):
                continue
            for check in (_check_values, _check_keys):
                try:
                    check(folder, head.layout, chunk)
                except Damaged as error:
                    if is_folder(folder):
                        yield str(error)


def _check_values(folder: Path, layout: Layout, chunk: Chunk) -> None:
    path = folder / layout.values_name(chunk.number)
    try:
        file = open_regular(path, os.O_RDONLY)
        try:
            check_values(file, path, layout, chunk)
        finally:
            os.close(file)
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror})") from error


def _check_keys(folder: Path, layout: Layout, chunk: Chunk) -> None:
    read_keys(folder / layout.keys_name(chunk.number), layout, chunk)


def _read(folder: Path) -> tuple[Head, list[Chunk], str | None]:
    """Returns the metadata and the chunks of a segment, and a message if not all of it is read.

    Raises:
        SegmentError: No part of the segment can be read.
    """
    head = read_head(folder, folder.parent.name)
    if is_refused(folder):
        return head, [], f"{folder} holds rows that were found to be wrong: not read"
    try:
        return head, read_lines(folder / JOURNAL, folder.name, 0, head.layout.chunk_rows), None
    except SegmentError as error:
        sentence, chunks = error.args
        return head, chunks, sentence
    except OSError as error:
        raise SegmentError(f"{folder / JOURNAL} cannot be read ({error.strerror})") from error


@dataclass
class Pruned:
    """Result of `prune`.

    Attributes:
        segments: Number of removed segments.
        nbytes: Removed bytes, including those that killed runs had left.
        rows: Number of removed readable rows, by name of the set.
    """

    segments: int = 0
    nbytes: int = 0
    rows: dict[str, int] = field(default_factory=dict)


def prune(directory: Path, older_than: float) -> Pruned:
    """Removes segments that were not used for some time, and the unfinished files of killed runs.

    Segments that a process reads or writes now are not removed.

    Args:
        directory: Folder that holds the sets.
        older_than: Seconds since the last use. 0 removes all segments, and infinity only those
            whose rows were found to be wrong.

    Raises:
        UserError: The folder is not a cache directory.
    """
    _check(directory)
    pruned = Pruned()
    before = sum(disk_bytes(folder) for folder in named_folders(directory))
    now = time.time()
    for folder in segment_folders(directory):
        if not is_refused(folder) and now - last_use(folder) < older_than:
            continue
        rows = _rows(folder)
        if remove(folder):
            name = folder.parent.name
            pruned.segments += 1
            pruned.rows[name] = pruned.rows.get(name, 0) + rows
    remove_trash(directory)
    for set_folder in named_folders(directory):
        with contextlib.suppress(OSError):  # another process may remove the same files
            for path in _left(set_folder, now):
                if path.name.startswith(NEW):
                    remove(path)
                else:
                    path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            set_folder.rmdir()  # only if it is empty
    left = sum(disk_bytes(folder) for folder in named_folders(directory))
    pruned.nbytes = max(before - left, 0)
    end(directory)
    return pruned


def _rows(folder: Path) -> int:
    try:
        return sum(chunk.rows for chunk in _read(folder)[1])
    except SegmentError:
        return 0


def _left(set_folder: Path, now: float) -> Iterator[Path]:
    """Yields the unfinished segments and chunk files that killed runs left in a set."""
    for path in set_folder.glob(f"{NEW}*"):
        if now - path.lstat().st_mtime > _OLD_SECONDS:
            yield path
    for folder in named_folders(set_folder):
        if not in_use(folder):
            for part in ("values", "keys"):
                if is_folder(folder / part):
                    yield from (folder / part).glob(f"c.*{PARTIAL}")


def _check(directory: Path) -> None:
    if not is_directory(directory):
        raise UserError(
            f"{directory} holds no activations of cachefreeze: give the folder of a cache"
        )
