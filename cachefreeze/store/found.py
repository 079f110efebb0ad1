"""Finds and reads the rows of a set on disk, whichever run wrote them."""

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# `numpy.unique` imports it at its first use. That fails if no more files can be opened.
import numpy.ma

from cachefreeze.store.format import (
    JOURNAL,
    NAME,
    Layout,
    Row,
    SegmentError,
    is_folder,
    read_head,
)
from cachefreeze.store.index import Index
from cachefreeze.store.journal import LINE_BYTES, Chunk, read_lines
from cachefreeze.store.locks import Gone, Held, is_refused
from cachefreeze.store.reading import Damaged, Files, Source, is_hole, read_keys

# Source of a row that is no longer read.
_NOWHERE = -1
# Number of keys that are added to the index at once, since each call has a cost of its own.
_KEYS_AT_ONCE = 2**18
# Number of chunks that are read ahead at once. They take 128 MB of the system's memory.
_MOST_EXPECTED = 16


@dataclass(eq=False)
class _Segment:
    folder: Path
    layout: Layout
    lines: int = 0
    # Whether the journal is damaged: nothing that is written later is read.
    ended: bool = False
    sources: list[int] = field(default_factory=list)


class Found:
    """The rows of all segments of a set. Beside the index, they take 6 bytes of memory each.

    Args:
        folder: Folder of the set.
        row: Sizes and type of one row.
        held: Locks on the segments that are read.
        files: Open chunk files.
        tell: Function called with each message for the user.
    """

    def __init__(
        self, folder: Path, row: Row, held: Held, files: Files, tell: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self.row = row
        self._held = held
        self._files = files
        self._tell = tell
        self._guard = threading.RLock()
        self._segments: dict[str, _Segment] = {}
        self._seen: set[str] = set()
        self._sources: list[Source] = []
        self._index = Index()
        self._source = np.zeros(0, dtype=np.int32)
        self._slot = np.zeros(0, dtype=np.uint16)
        self._live = 0

    def __len__(self) -> int:
        """Returns the number of rows that can be read. A row in two segments counts once."""
        return self._live

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the index."""
        return self._index.nbytes + self._source.nbytes + self._slot.nbytes

    @property
    def segments(self) -> list[Path]:
        """Folders of the segments that are read."""
        return [segment.folder for segment in self._segments.values()]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the place of each row, which is its number in the index, or -1 for unknown rows.

        Args:
            keys: Keys of the rows, of shape (n, 2).
        """
        with self._guard:
            places = self._index.find(keys)
            if self._live < len(self._index):
                known = np.flatnonzero(places >= 0)
                places[known[self._source[places[known]] == _NOWHERE]] = -1
            return places

    def read(self, places: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copies rows. Rows that are damaged or were removed are unknown from then on.

        Args:
            places: Places of the rows, or -1.
            out: Memory for the rows, uint8 of shape (n, row_bytes).

        Returns:
            Bool array of shape (n,). True for each row that was copied.
        """
        assert out.dtype == np.uint8, "`out` is of type uint8"
        assert out.shape == (len(places), self.row.nbytes), "`out` has one row for each place"
        assert out.flags.c_contiguous, "`out` is contiguous"
        good = np.zeros(len(places), dtype=bool)
        with self._guard:
            known = np.flatnonzero(places >= 0)
            sources = self._source[places[known]].astype(np.int64)
            slots = self._slot[places[known]]
        # Sorted by chunk, so that each file is looked up once, and neighbouring rows are read at
        # once.
        order = np.argsort((sources << 16) | slots)
        order = order[np.searchsorted(sources[order], 0) :]
        if not len(order):
            return good
        chunks, numbers, positions = sources[order], slots[order].tolist(), known[order].tolist()
        good[positions] = True
        memory = out.reshape(-1).data
        bounds = [0, *(np.flatnonzero(np.diff(chunks)) + 1).tolist(), len(order)]
        unread = [one for one in bounds[:-1] if self._sources[chunks[one]].checked is None]
        for one in unread[:_MOST_EXPECTED]:
            self._files.expect(self._sources[chunks[one]], ())
        held: Path | None = None
        for start, end in itertools.pairwise(bounds):
            source = self._sources[chunks[start]]
            try:
                if source.folder is not held:
                    self._held.hold(source.folder)
                    held = source.folder
                self._files.read(source, numbers[start:end], positions[start:end], memory)
            except (Gone, Damaged) as error:
                self._lost(source, error)
                good[positions[start:end]] = False
        return good

    def chunks(self, places: np.ndarray) -> list[int]:
        """Returns the numbers of the chunks that hold some rows, each once."""
        with self._guard:
            sources = np.unique(self._source[places])
        return sources[sources != _NOWHERE].tolist()

    def expect(self, places: np.ndarray) -> None:
        """Tells the system to read rows ahead, so that the disk works while other rows are used.

        A chunk that was not checked yet is read ahead as a whole, since its checksum needs all of
        it.

        Args:
            places: Places of the rows. -1 is ignored.
        """
        with self._guard:
            known = places[places >= 0]
            sources, slots = self._source[known], self._slot[known]
        chunks, first = np.unique(sources, return_index=True)
        unread = 0
        # In the order of their use.
        for chunk in chunks[np.argsort(first)].tolist():
            if chunk == _NOWHERE:
                continue
            source = self._sources[chunk]
            unread += source.checked is None
            if source.checked is not None or unread <= _MOST_EXPECTED:
                self._files.expect(source, slots[sources == chunk].tolist())

    def load(self, chunk: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Reads all rows of a chunk.

        Args:
            chunk: Number of the chunk, as `chunks` returns it.

        Returns:
            Keys of the rows, of shape (n, 2), and the rows, uint8 of shape (n, row_bytes). None if
            the chunk is damaged or was removed.
        """
        source = self._sources[chunk]
        try:
            self._held.hold(source.folder)
            rows = self._files.load(source)
        except (Gone, Damaged) as error:
            self._lost(source, error)
            return None
        with self._guard:
            places = np.flatnonzero(self._source[: len(self._index)] == chunk)
            slots, keys = self._slot[places], self._index.keys(places)
        # A row in two segments is read from one of them only.
        all_of_them = np.array_equal(slots, np.arange(len(rows)))
        return keys, rows if all_of_them else rows[slots]

    def _lost(self, source: Source, error: Exception) -> None:
        if isinstance(error, Gone) or not is_folder(source.folder):
            self.drop(source.folder)
            return
        self._tell(f"{error}: the rows in it are computed again")
        with self._guard:
            self._forget([self._sources.index(source)])

    def refresh(self) -> None:
        """Adds the rows of the chunks that were completed since the last call, by any run."""
        with self._guard:
            for name in self._new_names():
                self._open(name)
            waiting: dict[int, np.ndarray] = {}
            count = 0
            for segment in list(self._segments.values()):
                for chunk in self._follow(segment):
                    keys = self._keys(segment, chunk)
                    if keys is None:
                        continue
                    waiting[len(self._sources)] = keys
                    segment.sources.append(len(self._sources))
                    self._sources.append(Source(segment.folder, segment.layout, chunk))
                    count += len(keys)
                    if count >= _KEYS_AT_ONCE:
                        self._add(waiting)
                        waiting, count = {}, 0
            self._add(waiting)

    def _new_names(self) -> list[str]:
        if not is_folder(self._folder):
            # Another process may have made it just now.
            if os.path.lexists(self._folder) and not is_folder(self._folder):
                self._tell(f"{self._folder} is not a folder: no rows are read from it")
            return []
        try:
            names = os.listdir(self._folder)
        except OSError as error:
            self._tell(
                f"{self._folder} cannot be read ({error.strerror}): its new rows are not used"
            )
            return []
        return [name for name in names if name not in self._seen and NAME.fullmatch(name)]

    def _open(self, name: str) -> None:
        folder = self._folder / name
        self._seen.add(name)
        try:
            head = read_head(folder, self._folder.name)
        except SegmentError as error:
            if is_folder(folder):  # else another process has just removed it
                self._tell(str(error))
            return
        if head.layout.row != self.row:
            self._tell(f"{folder} holds rows of another shape or type: not read")
            return
        self._segments[name] = _Segment(folder, head.layout)

    def _follow(self, segment: _Segment) -> Sequence[Chunk]:
        path = segment.folder / JOURNAL
        if is_refused(segment.folder):
            self._tell(f"{segment.folder} holds rows that were found to be wrong: not read")
            self.drop(segment.folder)
            return []
        try:
            if segment.ended or os.lstat(path).st_size < (segment.lines + 1) * LINE_BYTES:
                return []
            name, most = segment.folder.name, segment.layout.chunk_rows
            chunks = read_lines(path, name, segment.lines, most)
        except SegmentError as error:
            sentence, chunks = error.args
            self._tell(sentence)
            segment.ended = True
        except OSError as error:
            if is_folder(segment.folder):
                self._tell(f"{path} cannot be read ({error.strerror}): its later rows are not read")
                segment.ended = True
            else:
                self.drop(segment.folder)
            return []
        segment.lines += len(chunks)
        return chunks

    def _keys(self, segment: _Segment, chunk: Chunk) -> np.ndarray | None:
        path = segment.folder / segment.layout.keys_name(chunk.number)
        try:
            return read_keys(path, segment.layout, chunk)
        except Damaged as error:
            hole = is_hole(segment.folder, segment.layout, chunk)
            if is_folder(segment.folder) and not hole:
                self._tell(f"{error}: the rows in it are computed again")
            return None

    def _add(self, waiting: dict[int, np.ndarray]) -> None:
        if not waiting:
            return
        counts = [len(keys) for keys in waiting.values()]
        keys = np.concatenate(list(waiting.values()))
        sources = np.repeat(np.array(list(waiting), dtype=np.int32), counts)
        slots = np.concatenate([np.arange(count, dtype=np.uint16) for count in counts])
        first = np.sort(keys[:, 0])
        if (first[1:] == first[:-1]).any():  # a key may be there twice
            _, once = np.unique(keys, axis=0, return_index=True)
            keys, sources, slots = keys[once], sources[once], slots[once]
        places = self._index.find(keys)
        new = places < 0
        places[new] = self._index.add(keys[new])
        if len(self._index) > len(self._source):
            size = max(len(self._index), len(self._source) * 3 // 2)
            self._source = _grown(self._source, size, _NOWHERE)
            self._slot = _grown(self._slot, size, 0)
        # New rows, and rows that were dropped before, are read from here on.
        here = self._source[places] == _NOWHERE
        self._source[places[here]] = sources[here]
        self._slot[places[here]] = slots[here]
        self._live += int(here.sum())

    def drop(self, folder: Path) -> None:
        """Stops reading the rows of a segment."""
        with self._guard:
            self._held.release(folder)
            segment = self._segments.pop(folder.name, None)
            if segment is not None:
                self._forget(segment.sources)

    def drop_all(self) -> None:
        """Stops reading all rows."""
        for folder in self.segments:
            self.drop(folder)

    def _forget(self, sources: list[int]) -> None:
        lost = np.isin(self._source[: len(self._index)], sources)
        self._source[: len(self._index)][lost] = _NOWHERE
        self._live -= int(lost.sum())
        for source in sources:
            self._files.drop(self._sources[source])

    def after_fork(self) -> None:
        """Makes a new lock in a forked process, since another thread may have held the old one."""
        self._guard = threading.RLock()


def _grown(array: np.ndarray, size: int, fill: int) -> np.ndarray:
    grown = np.full(size, fill, dtype=array.dtype)
    grown[: len(array)] = array
    return grown
