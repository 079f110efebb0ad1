"""The limit on the disk space of a directory."""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from cachefreeze.store.commits import is_elsewhere
from cachefreeze.store.files import entries_below, open_regular, remove_tree
from cachefreeze.store.format import JOURNAL, NAME, TRASH, is_folder
from cachefreeze.store.journal import LINE_BYTES
from cachefreeze.store.locks import is_refused, last_use, remove


def segment_folders(directory: Path) -> Iterator[Path]:
    """Yields the folders of all segments in a directory."""
    for folder in named_folders(directory):
        yield from named_folders(folder)


def named_folders(folder: Path) -> list[Path]:
    """Returns the sets in a directory, or the segments in a set, sorted by name. Ignores links."""
    try:
        with os.scandir(folder) as entries:
            found = [
                entry.name
                for entry in entries
                if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return []
    return [folder / name for name in sorted(found)]


def disk_bytes(folder: Path) -> int:
    """Returns the disk space of all files below a folder, in bytes. Holes in files take none."""
    return sum(map(_file_bytes, entries_below(folder)))


def _file_bytes(entry: os.DirEntry[str]) -> int:
    try:
        if entry.is_dir(follow_symlinks=False):
            return 0
        found = entry.stat(follow_symlinks=False)
    except OSError:  # another process may rename or remove it now
        return 0
    # Some file systems report 0 blocks.
    return min(found.st_size, found.st_blocks * 512) or found.st_size


class Budget:
    """Limit on the disk space of a directory, for all runs that write there together.

    Args:
        directory: Folder that holds the sets.
        max_bytes: Largest number of bytes. If None, half of the disk space that is free or used by
            the directory.
    """

    def __init__(self, directory: Path, max_bytes: int | None) -> None:
        self._directory = directory
        self.max_bytes = max_bytes
        # For each segment: lines of the journal, bytes at that time, bytes of a full chunk.
        self._known: dict[Path, tuple[int, int, int]] = {}

    def make_room(self, nbytes: int, spared: Collection[str] = ()) -> bool:
        """Removes unused segments until some bytes fit. Returns whether they fit.

        Segments that an object store does not have yet are never removed, if the directory belongs
        to one.

        Args:
            nbytes: Number of bytes.
            spared: Names of sets that nothing is removed from.
        """
        if self.max_bytes is not None and nbytes > self.max_bytes:
            return False
        kept: set[Path] = set()
        # Counted again after each removal, since other processes may remove segments, too.
        while (total := self.total()) + nbytes > self.limit(total):
            if not kept:
                remove_trash(self._directory)
            left = [folder for folder in self._known if folder not in kept]
            left = [folder for folder in left if folder.parent.name not in spared]
            if not left:
                return False
            # Segments that are marked as wrong go first, since nobody reads them.
            oldest = min(left, key=lambda folder: (not is_refused(folder), last_use(folder)))
            if is_elsewhere(oldest):
                remove(oldest)
            kept.add(oldest)
        return True

    def limit(self, total: int) -> int:
        """Returns the number of bytes that all segments may take.

        Args:
            total: Number of bytes that they take now.
        """
        if self.max_bytes is not None:
            return self.max_bytes
        return (total + shutil.disk_usage(self._directory).free) // 2

    def total(self) -> int:
        """Returns the bytes of all segments."""
        known, self._known = self._known, {}
        for folder in segment_folders(self._directory):
            lines = _lines(folder / JOURNAL)
            before = known.get(folder)
            # All chunks of a segment have about the same size, so its files are counted only once.
            if before is None or not before[2]:
                before = lines, disk_bytes(folder), _chunk_bytes(folder)
            self._known[folder] = before
            grown = max(lines - before[0], 0) * before[2]
            self._known[folder] = lines, before[1] + grown, before[2]
        return sum(nbytes for _, nbytes, _ in self._known.values())


def _lines(journal: Path) -> int:
    # Opened, since a network file system asks for the size of a file anew only then.
    try:
        file = open_regular(journal, os.O_RDONLY)
    except OSError:
        return 0
    try:
        return os.fstat(file).st_size // LINE_BYTES
    finally:
        os.close(file)


def _chunk_bytes(folder: Path) -> int:
    total = 0
    for part in ("values", "keys"):
        if is_folder(folder / part):
            with contextlib.suppress(OSError), os.scandir(folder / part) as entries:
                chunks = (entry for entry in entries if entry.name.startswith("c."))
                total += max(map(_file_bytes, chunks), default=0)
    return total


def remove_trash(directory: Path) -> None:
    """Removes folders whose removal another process began and did not finish."""
    for folder in named_folders(directory):
        with contextlib.suppress(OSError):
            for entry in folder.glob(f"{TRASH}*"):
                remove_tree(entry)
