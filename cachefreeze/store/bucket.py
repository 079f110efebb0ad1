"""Segments in an object store: the same files as on disk, and commits in place of the journal."""

import json
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

from cachefreeze.errors import UserError
from cachefreeze.store.commits import MOST_BYTES, Commits, Record, content_of, parse
from cachefreeze.store.format import (
    FORMAT,
    METADATA_BYTES,
    NAME,
    Head,
    Layout,
    SegmentError,
    metadata,
    parse_head,
)
from cachefreeze.store.journal import Chunk, Content
from cachefreeze.store.objects import Denied, NoBucket, Objects, Unreachable, set_credentials
from cachefreeze.store.reading import Damaged, check_content, check_keys

# Object that tells that a prefix belongs to cachefreeze. It has a random name, which differs after
# everything was removed.
TAG = "cachefreeze.json"
_TAG_BYTES, _COSTS_BYTES = 1000, 2**20
# Number of chunks that are copied at the same time, and of commits that are read at once.
TOGETHER, _MOST_AHEAD = 4, 16
# Largest object that is copied, and of all that are copied at the same time, unless it is only one.
# Objects are held in memory while they are checked.
MOST_BYTES_OF_CHUNK, _HELD_BYTES = 2**30, 2**27
T = TypeVar("T")


class Bucket:
    """Sets of rows below a URL. Several threads may use it.

    Args:
        url: URL such as "s3://bucket/prefix".

    Attributes:
        url: URL without a slash at its end.

    Raises:
        UserError: The URL is wrong, obstore is not installed, or there are no credentials.
    """

    def __init__(self, url: str) -> None:
        self.objects = Objects(url)
        self.url = self.objects.url

    def identity(self, create: bool = True) -> str:
        """Returns the random name that the first writer gave, and lets this process be the first.

        Args:
            create: Whether to write the name if there is none.

        Raises:
            UserError: There is no such bucket, access is denied, or the rows are those of another
                version. Or there is no name, and none should be written.
            Unreachable: A request failed, or the object with the name is damaged.
        """
        try:
            found = self.objects.read(TAG, _TAG_BYTES)
            if found is None and create:
                name = {"cachefreeze": FORMAT, "id": uuid.uuid4().hex}
                self.objects.create(TAG, json.dumps(name).encode())
                found = self.objects.read(TAG, _TAG_BYTES)
        except Denied as error:
            raise UserError(
                f"{self.url} cannot be used ({error}): {set_credentials(self.url)}"
            ) from error
        except NoBucket as error:
            raise UserError(f"{self.url} names no bucket that exists: create it first") from error
        if found is None:
            raise UserError(f"{self.url} holds no activations of cachefreeze: give another URL")
        try:
            said = json.loads(found)
            version, name = said["cachefreeze"], said["id"]
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise Unreachable(f"{TAG} is damaged") from error
        if type(version) is int and version != FORMAT:
            raise UserError(
                f"{self.url} has format {version}, and this version reads format {FORMAT}: give "
                "another URL"
            )
        if type(name) is not str or not NAME.fullmatch(name):
            raise Unreachable(f"{TAG} is damaged")
        return name

    def follow(self, name: str, commits: Commits) -> None:
        """Reads the commits of a set that are not known yet. One request if there are none.

        Args:
            name: Name of the set.
            commits: Known commits, to which new ones are added.

        Raises:
            Unreachable: A request failed, or a commit is damaged.
            OSError: The local copy cannot be written.
        """
        ahead = 1
        while True:
            numbers = range(commits.next, commits.next + ahead)
            found = together([self._reader(name, number) for number in numbers])
            for number, content in zip(numbers, found, strict=True):
                if content is None:
                    return
                records = parse(content)
                if records is None:
                    raise Unreachable(f"{_commit(name, number)} is damaged")
                commits.add(number, records)
            ahead = min(2 * ahead, _MOST_AHEAD)

    def _reader(self, name: str, number: int) -> Callable[[], bytes | None]:
        return lambda: self.objects.read(_commit(name, number), MOST_BYTES)

    def commit(self, name: str, commits: Commits, records: Sequence[Record]) -> None:
        """Writes a commit under the next number that is free.

        Args:
            name: Name of the set.
            commits: Known commits, to which this one and those before it are added.
            records: Records of the new commit.

        Raises:
            Unreachable: A request failed. It is unknown whether the commit was written.
            OSError: The local copy cannot be written.
        """
        content = content_of(records)
        while not self.objects.create(_commit(name, commits.next), content):
            before = commits.next
            # Another writer was faster. Or an earlier request has written this commit, and its
            # answer was lost: then all records are known after this.
            self.follow(name, commits)
            if all(_is_known(commits, record) for record in records):
                return
            if commits.next == before:
                raise Unreachable(f"{_commit(name, before)} exists, and cannot be read")
        commits.add(commits.next, records)

    def head(self, name: str, segment: str) -> Head:
        """Reads and checks the metadata of a segment. Those of its arrays follow from them.

        Raises:
            SegmentError: The metadata are missing, or are not what cachefreeze writes.
            Unreachable: A request failed.
        """
        path = f"{name}/{segment}/zarr.json"
        content = self.objects.read(path, METADATA_BYTES)
        if content is None:
            raise SegmentError(f"{self.url}/{path} is missing: this segment is not read")
        if len(content) > METADATA_BYTES:
            raise SegmentError(f"{self.url}/{path} is larger than any that cachefreeze writes")
        head = parse_head(content, f"{self.url}/{path}", name)
        if head.layout.values_bytes > MOST_BYTES_OF_CHUNK:
            raise SegmentError(f"{self.url}/{path} has chunks of more than 1 GiB: not read")
        return head

    def read(self, name: str, segment: str, layout: Layout, chunk: Chunk) -> Content:
        """Reads and checks the two objects of a chunk.

        Raises:
            Damaged: An object is missing, or its size or checksum is wrong.
            Unreachable: A request failed.
        """
        folder = f"{name}/{segment}"
        path = f"{folder}/{layout.values_name(chunk.number)}"
        values = self._object(path, layout.values_bytes)
        content = Content(values, self.keys(name, segment, layout, chunk))
        check_content(f"{self.url}/{folder}", layout, chunk, content)
        return content

    def keys(self, name: str, segment: str, layout: Layout, chunk: Chunk) -> bytes:
        """Reads and checks the object with the keys of a chunk.

        Raises:
            Damaged: The object is missing, or its size or checksum is wrong.
            Unreachable: A request failed.
        """
        path = f"{name}/{segment}/{layout.keys_name(chunk.number)}"
        keys = self._object(path, layout.keys_bytes)
        check_keys(f"{self.url}/{name}/{segment}", layout, chunk, keys)
        return keys

    def _object(self, path: str, most: int) -> bytes:
        content = self.objects.read(path, most)
        if content is None:
            raise Damaged(f"{self.url}/{path} is missing")
        return content

    def write(self, name: str, segment: str, head: Head, chunk: Chunk, content: Content) -> bool:
        """Writes the objects of a chunk. It counts only once a commit names it.

        Args:
            name: Name of the set.
            segment: Name of the segment.
            head: Metadata of the segment.
            chunk: Line of the journal for this chunk.
            content: Contents of the two files of the chunk.

        Returns:
            Whether the objects are there. False if another writer has written other ones.

        Raises:
            Unreachable: A request failed.
        """
        folder, layout = f"{name}/{segment}", head.layout
        names = layout.values_name(chunk.number), layout.keys_name(chunk.number)
        for path, one in zip(names, content, strict=True):
            # An earlier run may have written it, and was killed before the commit.
            if (
                not self.objects.create(f"{folder}/{path}", one)
                and self.objects.read(f"{folder}/{path}", len(one)) != one
            ):
                return False
        return True

    def describe(self, name: str, segment: str, head: Head, last: Chunk, commits: Commits) -> None:
        """Writes the metadata of a segment before a commit names its chunks.

        cachefreeze itself does not read the number of slots.

        Args:
            name: Name of the set.
            segment: Name of the segment.
            head: Metadata of the segment.
            last: Last chunk of the segment.
            commits: Known commits of the set.

        Raises:
            Unreachable: A request failed.
        """
        slots = last.number * head.layout.chunk_rows + last.rows
        is_new = all((segment, one) in commits.holes for one in commits.chunks.get(segment, ()))
        for path, content in metadata(name, head.layout, head.about, slots).items():
            if path == "zarr.json" and not is_new:  # it does not change
                continue
            self.objects.replace(f"{name}/{segment}/{path}", content.encode())

    def remove(self, name: str, segment: str, layout: Layout, chunks: Sequence[Chunk]) -> None:
        """Removes the objects of chunks, after a commit has said that the segment is removed.

        Raises:
            Unreachable: A request failed.
        """
        folder = f"{name}/{segment}"
        for chunk in chunks:
            names = layout.values_name(chunk.number), layout.keys_name(chunk.number)
            self.objects.remove([f"{folder}/{path}" for path in names])

    def agree(self, path: str, content: bytes) -> bytes | None:
        """Writes a small object unless it exists. Returns what it holds then.

        Raises:
            Unreachable: A request failed.
        """
        found = self.objects.read(path, _COSTS_BYTES)
        if found is None:
            if self.objects.create(path, content):
                return content
            found = self.objects.read(path, _COSTS_BYTES)
        return found


def _commit(name: str, number: int) -> str:
    return f"{name}/commits/{number:08}"


def _is_known(commits: Commits, record: Record) -> bool:
    if record.chunk is None:
        return record.segment in commits.removed
    return record.chunk.number in commits.chunks.get(record.segment, {})


def at_once(layout: Layout) -> int:
    """Returns the number of chunks that are held in memory at the same time."""
    return min(max(_HELD_BYTES // layout.values_bytes, 1), TOGETHER)


def together(functions: Sequence[Callable[[], T]]) -> list[T]:
    """Calls functions in threads of their own. Returns their results in order.

    The threads end with the process, so a request without an answer does not delay its end.

    Raises:
        BaseException: The first error, after all functions have ended.
    """
    if len(functions) == 1:
        return [functions[0]()]
    results: list[T | None] = [None] * len(functions)
    errors: list[BaseException] = []

    def run(place: int) -> None:
        try:
            results[place] = functions[place]()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(place,), daemon=True, name="cachefreeze-request")
        for place in range(len(functions))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]
