"""The commits of a set in an object store: which chunks count there.

Commits are small numbered objects, each written only if it does not exist. So they are found
without a listing: the next one is asked for until there is none.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from cachefreeze.store.files import open_regular
from cachefreeze.store.format import CHUNK_ROWS, JOURNAL
from cachefreeze.store.journal import LINE_BYTES, Chunk, parse_line

# Folder of the local copies of commits, inside the folder of a directory.
REMOTE = "remote"
# Largest size of a commit.
MOST_BYTES = 2**14
_RECORD = re.compile(rb"([0-9a-f]{32}) (?:(hole )?(\d{8} [^\n]{31}\n)|removed ([0-9a-f]{8})\n)")
_END = re.compile(rb"end ([0-9a-f]{8})\n")
_LOCAL = re.compile(rb"(\d{8}) ([^\n]*)\n")


class Record(NamedTuple):
    """A fact about a segment: a chunk is complete, or the segment was removed.

    Args:
        segment: Name of the segment.
        chunk: Complete chunk. None if the segment was removed.
        hole: Whether the chunk has no objects, since its rows are in other segments or damaged.
    """

    segment: str
    chunk: Chunk | None
    hole: bool = False

    def line(self) -> bytes:
        """Returns the line of this record in a commit."""
        if self.chunk is None:
            return f"{self.segment} removed {_checksum(self.segment):08x}\n".encode()
        hole = "hole " if self.hole else ""
        return f"{self.segment} {hole}".encode() + self.chunk.line(self.segment)


def _checksum(segment: str) -> int:
    return google_crc32c.value(f"{segment} removed".encode())


def content_of(records: Sequence[Record]) -> bytes:
    """Returns the content of a commit."""
    lines = b"".join(one.line() for one in records)
    # Each line has a checksum, too. This one shows that no line is missing.
    return lines + f"end {google_crc32c.value(lines):08x}\n".encode()


def parse(content: bytes) -> list[Record] | None:
    """Returns the records of a commit, or None if it is damaged."""
    records: list[Record] = []
    end = 0
    while end < len(content) <= MOST_BYTES:
        if last := _END.match(content, end):
            whole = last.end() == len(content)
            right = int(last[1], 16) == google_crc32c.value(content[:end])
            return records if whole and right and records else None
        record = _parse_record(content, end)
        if record is None:
            return None
        records.append(record[0])
        end = record[1]
    return None


def _parse_record(content: bytes, start: int) -> tuple[Record, int] | None:
    found = _RECORD.match(content, start)
    if found is None:
        return None
    segment = found[1].decode()
    if found[3] is None:
        right = int(found[4], 16) == _checksum(segment)
        return (Record(segment, None), found.end()) if right else None
    chunk = parse_line(found[3], segment, int(found[3][:8]), CHUNK_ROWS)
    if chunk is None:
        return None
    return Record(segment, chunk, found[2] is not None), found.end()


class Commits:
    """All commits of one set that are known, with a copy in a local file.

    Only the process that holds the lock of the set adds commits to the file.

    Args:
        path: Path of the file.

    Attributes:
        next: Number of the first commit that is not known.
        chunks: Complete chunks by the number of the chunk, by the name of the segment.
        holes: Chunks without objects: the name of the segment, and the number of the chunk.
        removed: Names of removed segments.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self.next = 0
        self.chunks: dict[str, dict[int, Chunk]] = {}
        self.holes: set[tuple[str, int]] = set()
        self.removed: set[str] = set()

    def load(self) -> None:
        """Reads what was added to the file since the last call."""
        try:
            file = open_regular(self._path, os.O_RDONLY)
        except OSError:
            return
        try:
            if os.fstat(file).st_size < self._read:
                # The object store was made anew, and another process knows that already.
                self._read = self.next = 0
                self.chunks, self.holes, self.removed = {}, set(), set()
            while piece := os.pread(file, 2**20, self._read):
                end = piece.rfind(b"\n") + 1
                for line in _LOCAL.finditer(piece, 0, end):
                    records = parse(line[2].replace(b",", b"\n"))
                    if records is not None:
                        self._note(int(line[1]), records)
                self._read += end
                if not end:  # a process that was killed has left half a line
                    return
        finally:
            os.close(file)

    def add(self, number: int, records: Sequence[Record]) -> None:
        """Adds a commit that was read or written.

        Args:
            number: Number of the commit.
            records: Records of the commit.

        Raises:
            OSError: The file cannot be written.
        """
        # On one line, so that a killed process leaves all of the commit or half a line.
        joined = content_of(records).replace(b"\n", b",")
        line = f"{number:08} ".encode() + joined + b"\n"
        self._path.parent.mkdir(exist_ok=True)
        file = open_regular(self._path, os.O_WRONLY | os.O_CREAT)
        try:
            os.ftruncate(file, self._read)
            os.pwrite(file, line, self._read)
        finally:
            os.close(file)
        self._read += len(line)
        self._note(number, records)

    def _note(self, number: int, records: Sequence[Record]) -> None:
        self.next = max(self.next, number + 1)
        for segment, chunk, hole in records:
            if chunk is None:
                self.removed.add(segment)
                continue
            # The first one counts: a second writer of the same chunk comes too late.
            known = self.chunks.setdefault(segment, {})
            if chunk.number not in known:
                known[chunk.number] = chunk
                if hole:
                    self.holes.add((segment, chunk.number))

    def has_all(self, folder: Path) -> bool:
        """Returns whether all chunks of a local segment are in the object store, or were removed.

        Args:
            folder: Folder of the segment.
        """
        if folder.name in self.removed:
            return True
        try:
            lines = os.lstat(folder / JOURNAL).st_size // LINE_BYTES
        except OSError:
            return True
        known = self.chunks.get(folder.name, {})
        return all(number in known for number in range(lines))


def is_elsewhere(folder: Path) -> bool:
    """Returns whether a segment may be evicted: an object store has all of it.

    All segments of a directory that belongs to no object store may be evicted.

    Args:
        folder: Folder of the segment.
    """
    remote = folder.parent.parent / REMOTE
    if not remote.is_dir():
        return True
    commits = Commits(remote / folder.parent.name)
    commits.load()
    return commits.has_all(folder)
