"""Folders and object stores looked at as a whole: listed, read and copied. Not for training."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from cachefreeze.errors import UserError
from cachefreeze.store.bucket import Bucket
from cachefreeze.store.budget import named_folders
from cachefreeze.store.commits import Commits, Record
from cachefreeze.store.directory import Directory, is_directory
from cachefreeze.store.format import (
    CHUNK_ROWS,
    JOURNAL,
    NAME,
    Head,
    Layout,
    SegmentError,
    is_folder,
    read_head,
)
from cachefreeze.store.journal import Chunk, Content, read_lines
from cachefreeze.store.locks import is_refused
from cachefreeze.store.objects import Unreachable, is_url
from cachefreeze.store.reading import is_hole, read_chunk
from cachefreeze.store.segment import add_chunk


class Segment(NamedTuple):
    """A segment that can be read, as far as it can.

    Args:
        name: Name of the segment.
        head: Metadata of the segment.
        chunks: Complete chunks.
    """

    name: str
    head: Head
    chunks: list[Chunk]


class Place(Protocol):
    """Sets of rows in a folder or in an object store."""

    def sets(self) -> list[str]:
        """Returns the names of all sets."""

    def segments(self, name: str) -> Iterator[Segment | str]:
        """Yields the segments of a set, or a message for one that is not read in full."""

    def chunks(self, name: str, segment: str) -> set[int] | None:
        """Returns the numbers of the chunks of a segment. None if it must not be added to."""

    def read(self, name: str, segment: Segment, chunk: Chunk) -> Content:
        """Reads and checks a chunk.

        Raises:
            Damaged: The chunk is damaged or missing.
        """

    def is_hole(self, name: str, segment: Segment, chunk: Chunk) -> bool:
        """Returns whether a chunk is not there on purpose."""

    def write(
        self, name: str, segment: Segment, chunks: list[tuple[Chunk, Content | None]]
    ) -> None:
        """Adds chunks to a segment, which is made if it does not exist. None for a damaged one."""


class FolderPlace:
    """Sets of rows in a folder.

    Args:
        path: Folder of a directory.
        create: Whether the folder is made if it does not exist.

    Raises:
        UserError: The folder is not a cache directory.
    """

    def __init__(self, path: Path, create: bool) -> None:
        self._path = path
        if create:
            Directory(path, None).close()
        elif not is_directory(path):
            raise UserError(
                f"{path} holds no activations of cachefreeze: give the folder of a cache"
            )

    def sets(self) -> list[str]:
        """Returns the names of all sets."""
        return [folder.name for folder in named_folders(self._path)]

    def segments(self, name: str) -> Iterator[Segment | str]:
        """Yields the segments of a set, or a message for one that is not read in full."""
        for folder in named_folders(self._path / name):
            if is_refused(folder):
                continue
            try:
                head, chunks = read_head(folder, name), []
                try:
                    chunks = read_lines(folder / JOURNAL, folder.name, 0, head.layout.chunk_rows)
                except SegmentError as error:
                    sentence, chunks = error.args
                    yield sentence
                yield Segment(folder.name, head, chunks)
            except (SegmentError, OSError) as error:
                if is_folder(folder):  # else another process has removed it
                    yield str(error)

    def chunks(self, name: str, segment: str) -> set[int] | None:
        """Returns the numbers of the chunks of a segment. None if it must not be added to."""
        folder = self._path / name / segment
        if not is_folder(folder):
            return set()
        if is_refused(folder):
            return None
        try:
            chunks = read_lines(folder / JOURNAL, segment, 0, CHUNK_ROWS)
        except (SegmentError, OSError):
            return None
        # The files of a chunk that was damaged when it was copied are missing.
        numbers = {chunk.number for chunk in chunks}
        return {number for number in numbers if (folder / Layout.keys_name(number)).exists()}

    def read(self, name: str, segment: Segment, chunk: Chunk) -> Content:
        """Reads and checks a chunk."""
        return read_chunk(self._path / name / segment.name, segment.head.layout, chunk)

    def is_hole(self, name: str, segment: Segment, chunk: Chunk) -> bool:
        """Returns whether a chunk is not there on purpose."""
        return is_hole(self._path / name / segment.name, segment.head.layout, chunk)

    def write(
        self, name: str, segment: Segment, chunks: list[tuple[Chunk, Content | None]]
    ) -> None:
        """Adds chunks to a segment, which is made if it does not exist. None for a damaged one."""
        for chunk, content in chunks:
            add_chunk(self._path / name / segment.name, segment.head, chunk, content)


class BucketPlace:
    """Sets of rows in an object store.

    Args:
        url: URL such as "s3://bucket/prefix".
        create: Whether the object store is used if it has no rows yet.
        folder: Empty folder for copies of commits.

    Attributes:
        bucket: Object store.

    Raises:
        UserError: The object store cannot be used, or has no rows.
        Unreachable: A request failed.
    """

    def __init__(self, url: str, create: bool, folder: Path) -> None:
        self.bucket = Bucket(url)
        self.bucket.identity(create)
        self._folder = folder
        # The commits of each set, read once.
        self._known: dict[str, Commits] = {}

    def commits(self, name: str) -> Commits:
        """Returns all commits of a set."""
        if name not in self._known:
            commits = self._known[name] = Commits(self._folder / name)
            self.bucket.follow(name, commits)
        return self._known[name]

    def sets(self) -> list[str]:
        """Returns the names of all sets."""
        return [name for name in self.bucket.objects.folders() if NAME.fullmatch(name)]

    def segments(self, name: str) -> Iterator[Segment | str]:
        """Yields the segments of a set, or a message for one that is not read in full."""
        commits = self.commits(name)
        for segment, chunks in commits.chunks.items():
            if segment not in commits.removed:
                try:
                    head = self.bucket.head(name, segment)
                except SegmentError as error:
                    yield str(error)
                    continue
                yield Segment(segment, head, [chunks[number] for number in sorted(chunks)])

    def chunks(self, name: str, segment: str) -> set[int] | None:
        """Returns the numbers of the chunks of a segment. None if it must not be added to."""
        commits = self.commits(name)
        return None if segment in commits.removed else set(commits.chunks.get(segment, ()))

    def read(self, name: str, segment: Segment, chunk: Chunk) -> Content:
        """Reads and checks a chunk."""
        return self.bucket.read(name, segment.name, segment.head.layout, chunk)

    def is_hole(self, name: str, segment: Segment, chunk: Chunk) -> bool:
        """Returns whether a chunk is not there on purpose."""
        return (segment.name, chunk.number) in self.commits(name).holes

    def write(
        self, name: str, segment: Segment, chunks: list[tuple[Chunk, Content | None]]
    ) -> None:
        """Adds chunks to a segment, which is made if it does not exist. None for a damaged one."""
        head, bucket = segment.head, self.bucket
        for chunk, content in chunks:
            if content is not None:
                bucket.write(name, segment.name, head, chunk, content)
        commits = self.commits(name)
        bucket.describe(name, segment.name, head, chunks[-1][0], commits)
        records = [Record(segment.name, chunk, content is None) for chunk, content in chunks]
        bucket.commit(name, commits, records)


@contextmanager
def opened(directory: str | os.PathLike[str], create: bool = False) -> Iterator[Place]:
    """Opens a folder or an object store.

    Args:
        directory: Folder, or URL such as "s3://bucket/prefix".
        create: Whether it is made if it does not exist.

    Raises:
        UserError: It cannot be used, or a request fails while it is open.
    """
    if is_url(directory):
        with opened_store(os.fspath(directory), create) as place:
            yield place
    else:
        yield FolderPlace(Path(directory), create)


@contextmanager
def opened_store(url: str, create: bool = False) -> Iterator[BucketPlace]:
    """Opens an object store.

    Args:
        url: URL such as "s3://bucket/prefix".
        create: Whether it is used if it has no rows yet.

    Raises:
        UserError: It cannot be used, or a request fails while it is open.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="cachefreeze-") as folder:
            yield BucketPlace(url, create, Path(folder))
    except Unreachable as error:
        raise UserError(f"{url} does not work ({error}): try it again later") from error
