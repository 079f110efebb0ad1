"""Copies the chunks of one set between a local folder and an object store."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from cachefreeze.store.bucket import MOST_BYTES_OF_CHUNK, TOGETHER, Bucket, at_once, together
from cachefreeze.store.budget import Budget, named_folders
from cachefreeze.store.commits import REMOTE, Commits, Record
from cachefreeze.store.files import lock_file, open_regular, unlock_file
from cachefreeze.store.format import CHUNK_ROWS, JOURNAL, Head, SegmentError, read_head
from cachefreeze.store.journal import LINE_BYTES, Chunk, Content, read_lines
from cachefreeze.store.locks import is_refused
from cachefreeze.store.objects import Denied
from cachefreeze.store.reading import Damaged, read_chunk
from cachefreeze.store.segment import add_chunk


class Link:
    """A local folder and an object store whose sets are kept alike.

    Args:
        bucket: Sets in the object store.
        folder: Local folder.
        max_bytes: Largest number of bytes of the local folder, or None for half of the free disk.
        tell: Function called with each message for the user.

    Attributes:
        may_send: Whether the object store may be written to, as far as is known.
        full: Whether the local folder has no room for further rows.
    """

    def __init__(
        self, bucket: Bucket, folder: Path, max_bytes: int | None, tell: Callable[[str], None]
    ) -> None:
        self.bucket = bucket
        self.folder = folder
        self.budget = Budget(folder, max_bytes)
        self.tell = tell
        self.may_send, self.full = True, False
        self._told: set[str] = set()

    def say_once(self, about: str, sentence: str) -> None:
        """Tells the user something, once for each subject."""
        if about not in self._told:
            self._told.add(about)
            self.tell(sentence)


class Exchange:
    """Copies the chunks of one set, both ways.

    Args:
        name: Name of the set, 32 hexadecimal digits.
        link: Local folder and object store.

    Attributes:
        name: Name of the set.
        probe: Whether new commits are asked for in the next turn.
        probed: Time when they were asked for last, by `time.monotonic`.
        ready: Event that is set once all chunks that were found at first are here, or cannot be
            had.
        removals: Names of segments to be marked as removed, and whether this process wrote them.
    """

    def __init__(self, name: str, link: Link) -> None:
        self.name = name
        self.probe, self.probed = True, 0.0
        self.ready = threading.Event()
        self.removals: list[tuple[str, bool]] = []
        self._link = link
        self._bucket = link.bucket
        self._folder = link.folder / name
        self._commits = Commits(link.folder / REMOTE / name)
        # None for a segment that is not fetched.
        self._heads: dict[str, Head | None] = {}
        # Number of the first chunks of each segment that are here or were asked for in this run.
        # What is evicted later is not fetched again.
        self._done: dict[str, int] = {}
        self._unsendable: set[str] = set()

    def turn(self, spared: Collection[str], ending: bool) -> bool | None:
        """Fetches and sends a few chunks.

        Args:
            spared: Names of sets from which nothing is evicted for what is fetched.
            ending: Whether chunks are only sent.

        Returns:
            Whether there may be more. None if another process is busy with this set.
        """
        lock = _lock(self._link.folder / REMOTE / f"{self.name}.lock")
        if lock is None:
            return None
        try:
            self._commits.load()
            while self.removals:
                self._remove(*self.removals[0])
                del self.removals[0]
            if ending:
                return self._send()
            if self.probe:
                self._bucket.follow(self.name, self._commits)
                self.probe, self.probed = False, time.monotonic()
            more = self._fetch(spared)
            return self._send() or more
        finally:
            unlock_file(lock)

    def _fetch(self, spared: Collection[str]) -> bool:
        """Fetches a few chunks that are missing. Returns whether there were any."""
        wanted = [] if self._link.full else self._missing()
        if not wanted:
            return False
        wanted = wanted[: at_once(wanted[0][1].layout)]
        layouts = [head.layout for _, head, _ in wanted]
        nbytes = sum(layout.values_bytes + layout.keys_bytes for layout in layouts)
        if not self._link.budget.make_room(nbytes, spared):
            self._link.full = True
            self._link.say_once(
                "full",
                f"{self._link.folder} has no room for all rows of {self._bucket.url}: those that "
                "are not in it are computed, unless max_bytes is larger",
            )
            return False

        def reader(segment: str, head: Head, chunk: Chunk) -> Callable[[], Content | Damaged]:
            def read() -> Content | Damaged:
                try:
                    return self._bucket.read(self.name, segment, head.layout, chunk)
                except Damaged as error:
                    return error

            return read

        contents = together([reader(*each) for each in wanted])
        for (segment, head, chunk), content in zip(wanted, contents, strict=True):
            self._done[segment] = chunk.number + 1
            folder = self._folder / segment
            found = content if isinstance(content, Content) else None
            if found is None:
                self._link.say_once("damaged", f"{content}: the rows in it are computed again")
            if not add_chunk(folder, head, chunk, found):
                self._heads[segment] = None  # another process removes it, or chunks are missing
        return True

    def _missing(self) -> list[tuple[str, Head, Chunk]]:
        found: list[tuple[str, Head, Chunk]] = []
        for segment, chunks in self._commits.chunks.items():
            folder, number = self._folder / segment, self._done.get(segment, 0)
            if number not in chunks or segment in self._commits.removed or is_refused(folder):
                continue
            lines, before = _lines(folder), len(found)
            # If a commit is damaged, the chunks behind it cannot be added either.
            while (chunk := chunks.get(number)) is not None and len(found) < TOGETHER:
                if number >= lines or not (folder / f"keys/c.{number}.0").exists():
                    head = self._head(segment)
                    if head is None:
                        break
                    found.append((segment, head, chunk))
                elif len(found) == before:
                    self._done[segment] = number + 1
                number += 1
        return found

    def _head(self, segment: str) -> Head | None:
        if segment not in self._heads:
            try:
                self._heads[segment] = self._bucket.head(self.name, segment)
            except SegmentError as error:
                self._link.say_once("damaged", str(error))
                self._heads[segment] = None
        return self._heads[segment]

    def _send(self) -> bool:
        """Sends a few chunks that are new. Returns whether there were any."""
        if not self._link.may_send:
            return False
        for folder in named_folders(self._folder):
            unsent = self._new_chunks(folder)
            if not unsent:
                continue
            try:
                self._send_chunks(folder, unsent)
            except Denied as error:
                self._link.may_send = False
                self._link.say_once(
                    "failed",
                    f"no rows are written to {self._bucket.url} ({error}): new ones stay in "
                    f"{self._link.folder}",
                )
                return False
            return True
        return False

    def _new_chunks(self, folder: Path) -> list[Chunk]:
        known = self._commits.chunks.get(folder.name, {})
        if (
            _lines(folder) <= len(known)
            or folder.name in self._commits.removed
            or folder.name in self._unsendable
            or is_refused(folder)
        ):
            return []
        first = len(known) if all(number in known for number in range(len(known))) else 0
        try:
            chunks = read_lines(folder / JOURNAL, folder.name, first, CHUNK_ROWS)
        except SegmentError as error:
            _, chunks = error.args
        except OSError:
            return []
        return [one for one in chunks if one.number not in known]

    def _send_chunks(self, folder: Path, chunks: Sequence[Chunk]) -> None:
        try:
            head = read_head(folder, self.name)
        except SegmentError:  # whoever reads the segment is told
            self._unsendable.add(folder.name)
            return
        if head.layout.values_bytes > MOST_BYTES_OF_CHUNK:
            self._unsendable.add(folder.name)
            self._link.say_once("large", f"{folder} has chunks of more than 1 GiB: not sent")
            return
        chunks = chunks[: at_once(head.layout)]

        def sender(chunk: Chunk) -> Callable[[], bool | None]:
            def send() -> bool | None:
                try:
                    content = read_chunk(folder, head.layout, chunk)
                except Damaged:
                    return None
                return self._bucket.write(self.name, folder.name, head, chunk, content)

            return send

        records = []
        for chunk, sent in zip(chunks, together([sender(chunk) for chunk in chunks]), strict=True):
            if sent:
                records.append(Record(folder.name, chunk))
                continue
            # Nothing that is behind it can be read there.
            self._unsendable.add(folder.name)
            if sent is False:
                self._link.say_once(
                    "two writers",
                    f"{self._bucket.url}/{self.name}/{folder.name} has another writer: the rows of "
                    "this one stay in the local folder",
                )
            break
        if records:
            self._bucket.commit(self.name, self._commits, records)
            last = records[-1].chunk
            assert last is not None
            self._bucket.count(self.name, folder.name, head, last)

    def _remove(self, segment: str, own: bool) -> None:
        chunks = self._commits.chunks.get(segment)
        if not chunks or segment in self._commits.removed:
            return
        self._bucket.commit(self.name, self._commits, [Record(segment, None)])
        if own:
            with contextlib.suppress(SegmentError):
                layout = self._bucket.head(self.name, segment).layout
                self._bucket.remove(self.name, segment, layout, list(chunks.values()))

    def unsent(self) -> int:
        """Returns the number of rows that only the local folder has."""
        self._commits.load()
        return sum(
            chunk.rows
            for folder in named_folders(self._folder)
            for chunk in self._new_chunks(folder)
        )


def _lines(folder: Path) -> int:
    try:
        return os.lstat(folder / JOURNAL).st_size // LINE_BYTES
    except OSError:
        return 0


def _lock(path: Path) -> int | None:
    """Takes the lock of a set, or returns None if another process has it."""
    path.parent.mkdir(exist_ok=True)
    file = open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        lock_file(file, exclusive=True)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError:  # a file system without locks
        pass
    return file
