"""The rows of a set that lie on the disk, whoever wrote them."""

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# numpy.unique imports it at its first use, which fails where no more files can be opened.
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
from cachefreeze.store.reading import Damaged, Files, Source, read_keys

# The source of a row that is not served any more.
_NOWHERE = -1
# Keys that are added at once: adding a few has a price of its own.
_KEYS_AT_ONCE = 2**18
# Chunks that are read ahead at once: 128 MB, which the system must have room for.
_MOST_EXPECTED = 16


@dataclass(eq=False)
class _Segment:
    folder: Path
    layout: Layout
    lines: int = 0
    # Whether nothing that is written from now on is read: the journal is damaged.
    ended: bool = False
    sources: list[int] = field(default_factory=list)


class Found:
    """Finds and reads the rows of all segments of a set.

    It costs 6 bytes a row beside the index.

    Args:
        folder: Folder of the set.
        row: How a row lies in memory.
        held: Locks on the segments that are read.
        files: Chunk files that are open.
        tell: Function that takes a sentence for the user.
    """

    def __init__(
        self, folder: Path, row: Row, held: Held, files: Files, tell: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._row = row
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
        """Returns the number of rows that are served, each counted once."""
        return self._live

    @property
    def nbytes(self) -> int:
        """Bytes of memory of what rows are found by."""
        return self._index.nbytes + self._source.nbytes + self._slot.nbytes

    @property
    def segments(self) -> list[Path]:
        """Folders of the segments that are read."""
        return [segment.folder for segment in self._segments.values()]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the place of each row, or -1.

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
        """Copies rows, and returns which of them are good.

        The others are damaged or were removed, and are unknown from now on.

        Args:
            places: Places of the rows.
            out: Memory that the rows are copied to, uint8 of shape (n, row_bytes).
        """
        assert out.dtype == np.uint8, "rows are bytes"
        assert out.shape == (len(places), self._row.nbytes), "one row for each place"
        assert out.flags.c_contiguous, "rows lie one after another"
        good = np.zeros(len(places), dtype=bool)
        with self._guard:
            known = np.flatnonzero(places >= 0)
            sources = self._source[places[known]].astype(np.int64)
            slots = self._slot[places[known]]
        # By chunk, so that each file is looked up once, and neighbours are read in one call.
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
        """Returns the chunks that rows lie in, each once.

        Args:
            places: Places of the rows.
        """
        with self._guard:
            sources = np.unique(self._source[places])
        return sources[sources != _NOWHERE].tolist()

    def expect(self, places: np.ndarray) -> None:
        """Has the system read rows ahead, so that the disk works while others are read.

        Of a chunk that was not read yet all is read, for its checksum is one of all.

        Args:
            places: Places of the rows. Those that are -1 are left out.
        """
        with self._guard:
            known = places[places >= 0]
            sources, slots = self._source[known], self._slot[known]
        chunks, first = np.unique(sources, return_index=True)
        unread = 0
        # In the order in which they are read.
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
            chunk: What `chunks` has returned.

        Returns:
            Keys of the rows, of shape (n, 2), and rows, uint8 of shape (n, row_bytes), or None if
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
        # Of rows that lie in two segments, one of the two is served.
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
        """Takes in the chunks that were completed since the last time."""
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
            if os.path.lexists(self._folder):
                self._tell(f"{self._folder} is no folder: no rows are read from it")
            return []
        try:
            names = os.listdir(self._folder)
        except OSError as error:
            self._tell(f"{self._folder} cannot be read ({error.strerror})")
            return []
        return [name for name in names if name not in self._seen and NAME.fullmatch(name)]

    def _open(self, name: str) -> None:
        folder = self._folder / name
        self._seen.add(name)
        try:
            head = read_head(folder, self._folder.name)
        except SegmentError as error:
            if is_folder(folder):  # and was not removed just now
                self._tell(str(error))
            return
        if head.layout.row != self._row:
            self._tell(f"{folder} holds rows of another shape: not read")
            return
        self._segments[name] = _Segment(folder, head.layout)

    def _follow(self, segment: _Segment) -> Sequence[Chunk]:
        path = segment.folder / JOURNAL
        if is_refused(segment.folder):
            self._tell(f"{segment.folder} was found to hold wrong rows: not read")
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
                self._tell(f"{path} cannot be read ({error.strerror})")
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
            if is_folder(segment.folder):
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
        if (first[1:] == first[:-1]).any():  # else no key is there twice
            _, once = np.unique(keys, axis=0, return_index=True)
            keys, sources, slots = keys[once], sources[once], slots[once]
        places = self._index.find(keys)
        new = places < 0
        places[new] = self._index.add(keys[new])
        if len(self._index) > len(self._source):
            size = max(len(self._index), len(self._source) * 3 // 2)
            self._source = _grown(self._source, size, _NOWHERE)
            self._slot = _grown(self._slot, size, 0)
        # Those that were lost before lie here now.
        here = self._source[places] == _NOWHERE
        self._source[places[here]] = sources[here]
        self._slot[places[here]] = slots[here]
        self._live += int(here.sum())

    def drop(self, folder: Path) -> None:
        """Serves no row of a segment any more.

        Args:
            folder: Folder of the segment.
        """
        with self._guard:
            self._held.release(folder)
            segment = self._segments.pop(folder.name, None)
            if segment is not None:
                self._forget(segment.sources)

    def drop_all(self) -> None:
        """Serves no row any more."""
        for folder in self.segments:
            self.drop(folder)

    def _forget(self, sources: list[int]) -> None:
        lost = np.isin(self._source[: len(self._index)], sources)
        self._source[: len(self._index)][lost] = _NOWHERE
        self._live -= int(lost.sum())
        for source in sources:
            self._files.drop(self._sources[source])

    def leave_to_the_parent(self) -> None:
        """Takes a new lock, in a forked process: the old one may be held by another thread."""
        self._guard = threading.RLock()


def _grown(array: np.ndarray, size: int, fill: int) -> np.ndarray:
    grown = np.full(size, fill, dtype=array.dtype)
    grown[: len(array)] = array
    return grown
