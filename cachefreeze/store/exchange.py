"""Copies the chunks of one set between a local folder and an object store."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from cachefreeze.store.bucket import MOST_BYTES_OF_CHUNK, TOGETHER, Bucket, at_once, together
from cachefreeze.store.budget import Budget, named_folders
from cachefreeze.store.commits import REMOTE, Commits, Record
from cachefreeze.store.format import (
    CHUNK_ROWS,
    JOURNAL,
    KEY_BYTES,
    Head,
    Layout,
    SegmentError,
    is_folder,
    read_head,
)
from cachefreeze.store.journal import LINE_BYTES, Chunk, Content, read_lines
from cachefreeze.store.locks import Lock, is_refused, lock_name
from cachefreeze.store.objects import Denied
from cachefreeze.store.reading import Damaged, read_chunk
from cachefreeze.store.segment import add_chunk

# Part of the local folder that fetched chunks leave free.
_SHARE_FOR_NEW = 8


class Link:
    """A local folder and an object store whose sets are kept alike.

    Args:
        bucket: Sets in the object store.
        folder: Local folder.
        max_bytes: Largest number of bytes of the local folder, or None for half of the free disk.
        tell: Function called with each message for the user.

    Attributes:
        denied: Reason why the object store may not be written to. Empty if none is known.
        full: Whether the local folder has no room for further rows.
    """

    def __init__(
        self, bucket: Bucket, folder: Path, max_bytes: int | None, tell: Callable[[str], None]
    ) -> None:
        self.bucket = bucket
        self.folder = folder
        self.budget = Budget(folder, max_bytes)
        self.tell = tell
        self.denied, self.full = "", False
        self._told: set[str] = set()
        self._guard = threading.Lock()

    def say_once(self, about: str, sentence: str) -> None:
        """Tells the user something, once for each subject. Several threads may call this."""
        with self._guard:
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
        # Whether all chunks of known commits were here, or could not be had, at the last look.
        self._complete = False
        # First halves of the keys that were fetched in this run.
        self._theirs: list[np.ndarray] = []
        self._unsendable: set[str] = set()

    def turn(self, spared: Collection[str], ending: bool) -> bool | None:
        """Fetches a few chunks, or sends a few if there is nothing to fetch.

        Rows that were computed while the same rows were on their way are not sent again. So chunks
        are sent only after all others are here.

        Args:
            spared: Names of sets from which nothing is evicted for what is fetched.
            ending: Whether no further chunks are fetched.

        Returns:
            Whether there may be more. None if another process is busy with this set.
        """
        lock = lock_set(self._link.folder, self.name)
        if lock is None:
            return None
        try:
            self._commits.load()
            while self.removals:
                self._remove(*self.removals[0])
                del self.removals[0]
            if self.probe and not (ending and self._complete):
                self._bucket.follow(self.name, self._commits)
                self.probe, self.probed = False, time.monotonic()
            if ending:
                self._complete = self._complete or not self._missing()
                return self._complete and self._send()
            if self._fetch(spared):
                return True
            self._complete = True
            return self._send()
        finally:
            lock.release()

    def _fetch(self, spared: Collection[str]) -> bool:
        """Fetches a few chunks that are missing. Returns whether there were any.

        If the local folder is full, only their keys are fetched, so that rows which are computed
        now are not sent again.
        """
        wanted = self._missing()
        if not wanted:
            return False
        wanted = wanted[: at_once(wanted[0][1].layout)]
        layouts = [head.layout for _, head, _ in wanted]
        nbytes = sum(layout.values_bytes + layout.keys_bytes for layout in layouts)
        # New rows need some room, too.
        nbytes += self._link.budget.limit(0) // _SHARE_FOR_NEW
        if not self._link.full and not self._link.budget.make_room(nbytes, spared):
            self._link.full = True
            self._link.say_once(
                "full",
                f"{self._link.folder} has no room for all rows of {self._bucket.url}: those that "
                "are not in it are computed, unless max_bytes is larger",
            )
        contents = together([self._reader(*each) for each in wanted])
        for (segment, head, chunk), content in zip(wanted, contents, strict=True):
            self._done[segment] = chunk.number + 1
            if not self._link.full and not add_chunk(self._folder / segment, head, chunk, content):
                self._heads[segment] = None  # another process removes it, or chunks are missing
            if content is not None:
                self._theirs.append(_halves(content, chunk))
        return True

    def _reader(self, segment: str, head: Head, chunk: Chunk) -> Callable[[], Content | None]:
        def read() -> Content | None:
            if (segment, chunk.number) in self._commits.holes:
                return None
            where = self.name, segment, head.layout, chunk
            try:
                if self._link.full:
                    return Content(b"", self._bucket.keys(*where))
                return self._bucket.read(*where)
            except Damaged as error:
                self._link.say_once("damaged", f"{error}: the rows in it are computed again")
                return None

        return read

    def _missing(self) -> list[tuple[str, Head, Chunk]]:
        found: list[tuple[str, Head, Chunk]] = []
        for segment, chunks in self._commits.chunks.items():
            folder, number = self._folder / segment, self._done.get(segment, 0)
            if number not in chunks or segment in self._commits.removed or is_refused(folder):
                continue
            if all((segment, one) in self._commits.holes for one in chunks):
                continue
            lines, before = _lines(folder), len(found)
            # If a commit is damaged, the chunks behind it cannot be added either.
            while (chunk := chunks.get(number)) is not None and len(found) < TOGETHER:
                hole = (segment, number) in self._commits.holes
                if number >= lines or not (hole or (folder / Layout.keys_name(number)).exists()):
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
        if self._link.denied:
            return False
        for folder in named_folders(self._folder):
            unsent = self._new_chunks(folder)
            if not unsent:
                continue
            try:
                self._send_chunks(folder, unsent)
            except Denied as error:
                self._link.denied = str(error)
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
        theirs = np.unique(np.concatenate(self._theirs)) if self._theirs else None
        self._theirs = [] if theirs is None else [theirs]

        def sender(chunk: Chunk) -> Callable[[], Record | None]:
            def send() -> Record | None:
                try:
                    content = read_chunk(folder, head.layout, chunk)
                except Damaged as error:
                    if not is_folder(folder):  # another process has removed it
                        return None
                    self._link.say_once("damaged here", f"{error}: it is not sent")
                    return Record(folder.name, chunk, hole=True)
                if theirs is not None and np.isin(_halves(content, chunk), theirs).all():
                    return Record(folder.name, chunk, hole=True)
                if self._bucket.write(self.name, folder.name, head, chunk, content):
                    return Record(folder.name, chunk)
                where = f"{self._bucket.url}/{self.name}/{folder.name}"
                self._link.say_once(
                    "two writers",
                    f"{where} has another writer: the rows of this one stay in the local folder",
                )
                return None

            return send

        records: list[Record] = []
        for sent in together([sender(chunk) for chunk in chunks]):
            if sent is None:
                self._unsendable.add(folder.name)
                break
            records.append(sent)
        if records:
            if not all(record.hole for record in records):
                last = chunks[len(records) - 1]
                self._bucket.describe(self.name, folder.name, head, last, self._commits)
            self._bucket.commit(self.name, self._commits, records)
            # If it is evicted in this run, it is not fetched.
            self._done[folder.name] = chunks[len(records) - 1].number + 1

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


def _halves(content: Content, chunk: Chunk) -> np.ndarray:
    """Returns the first halves of the keys of a chunk, which are equal only for equal rows."""
    return np.frombuffer(content.keys[: chunk.rows * KEY_BYTES], dtype=np.uint64)[::2]


def _lines(folder: Path) -> int:
    try:
        return os.lstat(folder / JOURNAL).st_size // LINE_BYTES
    except OSError:
        return 0


def lock_set(folder: Path, name: str) -> Lock | None:
    """Takes the lock of a set for all processes that share a local folder.

    Args:
        folder: Local folder.
        name: Name of the set.

    Returns:
        The lock. None if another process has it.
    """
    path = folder / REMOTE / f"{name}.lock"
    path.parent.mkdir(exist_ok=True)
    return lock_name(folder, path)
