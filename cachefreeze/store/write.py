"""Writing a store."""

import errno
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from cachefreeze.files import (
    entries_below,
    human_bytes,
    partial_beside,
    remove_tree,
    write_atomically,
    write_partial,
)
from cachefreeze.store.codecs import CHECKSUM_BYTES, Bytes, codec_for
from cachefreeze.store.folder import Lock, is_committed, is_store, remove_locked
from cachefreeze.store.format import (
    DIMENSIONS,
    FILL_VALUES,
    FORMAT,
    MANIFEST_BYTES,
    Description,
    Layout,
    Manifest,
    StoreError,
    check_array,
    read_description,
    read_file,
    sha256,
)
from cachefreeze.store.read import Damage, Store, split_reader

# Of one write call. From 2 MiB on Linux fills the page cache with pages of 2 MiB; in smaller pieces
# it takes memory that was in use a moment ago, which is faster in a virtual machine.
WRITE_BYTES = 2**20
JOURNAL = "journal"
JOURNAL_LINE = re.compile(r"([a-z]+) (\d{1,12}) (\d{1,12}) (\d{1,12})")

# Of a chunk file: CRC32C of its encoded rows, and its size.
Chunk = tuple[int, int]


class StoreTooLarge(OSError):  # noqa: N818
    """The chunk files of a store would take more than they may."""

    def __init__(self, max_bytes: float) -> None:
        super().__init__(errno.ENOSPC, f"it would take more than {human_bytes(max_bytes)}")


class StoreWriter:
    """Writes a store; nothing reads it before `commit`.

    Where an earlier writer of the same description was killed, this one goes on: `held` says how
    many rows of each split are there already.

    Args:
        cache_dir: prepared by `prepare_cache_dir`.
        description: of the store; anything else under its fingerprint is removed.
        max_bytes: that its chunk files may take; the metadata beside them are a few kB.

    Attributes:
        bytes: of the chunk files so far.
        held: rows of each split that were there at the start.

    Raises:
        BlockingIOError: another process is writing or reading a store of this fingerprint.
        OSError: the folder cannot be written, or is none of ours.
    """

    def __init__(
        self, cache_dir: Path, description: Description, max_bytes: float = float("inf")
    ) -> None:
        self.description = description
        self.max_bytes = max_bytes
        self.bytes = 0
        self.folder = cache_dir / description.fingerprint
        self.folder.mkdir(exist_ok=True)
        if not is_store(self.folder) and os.listdir(self.folder):
            raise FileExistsError(errno.EEXIST, f"{self.folder} holds other files")
        self._lock = Lock(self.folder, exclusive=True)
        self._journal: FileIO | None = None
        # Of `bytes`, and of the journal: chunks may come from several threads.
        self._accounts = threading.Lock()
        self._lost = False
        try:
            chunks = self._whole_chunks()
            if not any(chunks.values()):
                self._start()
            self._splits = {
                name: _SplitWriter(self.folder / name, layout, chunks[name], self._write_file)
                for name, layout in description.splits.items()
            }
            self.held = {name: split.written for name, split in self._splits.items()}
            self._not_in_journal = (
                (name, number)
                for name, layout in description.splits.items()
                for number in range(len(chunks[name]), layout.chunks)
            )
            self._next_in_journal = next(self._not_in_journal, None)
            self.bytes = sum(size for held in chunks.values() for _, size in held)
            self._clear(chunks)
            self._write_journal(chunks)
        except KeyboardInterrupt:
            self.suspend()
            raise
        except BaseException:
            self.abort()
            raise

    def append(self, split: str, rows: NDArray[Any]) -> None:
        """The next rows of a split, (n, *row_shape), in the order of their indices.

        Raises:
            StoreTooLarge: the next chunk file would exceed `max_bytes`; it is not written.
            OSError: the disk is full, or fails.
        """
        self._splits[split].append(rows)
        self._note_chunks()

    def write_chunk(self, split: str, number: int, rows: NDArray[Any]) -> None:
        """One of the chunks that are not `held`, from its rows (n, *row_shape): fewer than a chunk
        has in the last one only. May be called from several threads, in any order, for each chunk
        once, and instead of `append`.

        Raises:
            StoreTooLarge, OSError: see `append`.
        """
        self._splits[split].put(number, rows)
        self._note_chunks()

    def commit(self, notes: dict[str, float] | None = None) -> Store:
        """Declare the store complete: from here on it may be read, by this run and by others.

        `notes` are numbers that came up on the way and are worth keeping.
        """
        metadata = ["zarr.json", *(f"{name}/zarr.json" for name in self._splits)]
        for split in self._splits.values():
            assert len(split.chunks) == split.layout.chunks, "committed before all rows were in"
        manifest = {
            "format": FORMAT,
            "fingerprint": self.description.fingerprint,
            "sha256": {name: sha256((self.folder / name).read_bytes()) for name in metadata},
            "crc32c": {
                name: [checksum for _, (checksum, _) in sorted(split.chunks.items())]
                for name, split in self._splits.items()
            },
            "bytes": {
                name: [size for _, (_, size) in sorted(split.chunks.items())]
                for name, split in self._splits.items()
                if split.layout.compressed
            },
            "notes": notes or {},
        }
        content = json.dumps(manifest).encode()
        write_atomically(self.folder / "manifest.json", content)
        write_atomically(self.folder / "COMMITTED", sha256(content).encode())
        self._close_journal()
        (self.folder / JOURNAL).unlink()
        try:
            self._lock.share()
        except OSError:
            # What lies there now is another's.
            self._lock.release()
            self._lost = True
            raise
        return Store(self.folder, self._lock)

    def abort(self) -> None:
        """Remove what was written so far."""
        self._close_journal()
        if not self._lost:
            remove_locked(self.folder, self._lock)

    def suspend(self) -> None:
        """Leave what was written so far to a later writer."""
        self._close_journal()
        self._lock.release()

    def _whole_chunks(self) -> dict[str, list[Chunk]]:
        """Checksum and size of the chunks by split that a killed writer of the same rows left, as
        far as they are whole and follow one another."""
        about = self.description
        chunks: dict[str, list[Chunk]] = {name: [] for name in about.splits}
        try:
            if is_committed(self.folder):
                return chunks
            if replace(read_description(self.folder), created=about.created) != about:
                return chunks
            for name, layout in about.splits.items():
                check_array(self.folder / name, layout)
            journal = read_file(self.folder / JOURNAL, MANIFEST_BYTES).decode(errors="replace")
        except StoreError:
            return chunks
        lines = map(JOURNAL_LINE.fullmatch, journal.splitlines())
        for name, layout in about.splits.items():
            for number, line in zip(range(layout.chunks), lines, strict=False):
                if line is None or line[1] != name or int(line[2]) != number:
                    break  # the last line may be half written
                chunk = int(line[3]), int(line[4])
                if not layout.may_have_size(chunk[1]):
                    break
                chunks[name].append(chunk)
            checksums, sizes = ([chunk[i] for chunk in chunks[name]] for i in (0, 1))
            manifest = Manifest({name: checksums}, {name: sizes}, {})
            damage = next(split_reader(self.folder / name, layout, manifest).damage(), None)
            if damage is not None:
                del chunks[name][damage.chunk :]
            if len(chunks[name]) < layout.chunks:
                break
        return chunks

    def _start(self) -> None:
        """From nothing: remove what is there, and have zarr make the group and its arrays."""
        # The marker first: it must never stand over rows that are half removed.
        (self.folder / "COMMITTED").unlink(missing_ok=True)
        for entry in os.scandir(self.folder):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(Path(entry.path))
            elif entry.name != "lock":
                os.unlink(entry.path)
        attributes = {"cachefreeze": {"format": FORMAT, **asdict(self.description)}}
        group = zarr.create_group(self.folder, attributes=attributes)
        for name, layout in self.description.splits.items():
            group.create_array(
                name,
                shape=(layout.rows, *layout.row_shape),
                chunks=(layout.rows_per_chunk, *layout.row_shape),
                dtype=layout.dtype,
                filters=None,
                compressors=[*codec_for(layout.codec, layout.dtype).zarr, Crc32cCodec()],
                fill_value=FILL_VALUES[layout.dtype],
                chunk_key_encoding={"name": "default", "separator": "."},
                dimension_names=DIMENSIONS if layout.channels_last else None,
            )

    def _clear(self, chunks: dict[str, list[Chunk]]) -> None:
        """Remove whatever is neither metadata nor one of these chunks."""
        wanted = {self.folder / name for name in ("lock", "zarr.json", JOURNAL)}
        for name, layout in self.description.splits.items():
            wanted.add(self.folder / name / "zarr.json")
            wanted |= {
                self.folder / name / layout.chunk_name(chunk) for chunk in range(len(chunks[name]))
            }
        for entry in entries_below(self.folder):
            if Path(entry.path) not in wanted and not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)

    def _write_journal(self, chunks: dict[str, list[Chunk]]) -> None:
        """Anew: the last line of the old one may be half written."""
        lines = [
            _journal_line(name, number, chunk)
            for name, held in chunks.items()
            for number, chunk in enumerate(held)
        ]
        with write_partial(self.folder / JOURNAL, b"".join(lines)) as written:
            self._journal = FileIO(written, "a")
            written.replace(self.folder / JOURNAL)

    def _write_file(self, path: Path, content: Bytes) -> Chunk:
        size = len(content) + CHECKSUM_BYTES
        with self._accounts:
            if self.bytes + size > self.max_bytes:
                raise StoreTooLarge(self.max_bytes)
            self.bytes += size
        return write_chunk_file(path, content), size

    def _note_chunks(self) -> None:
        """In the journal, in their order: whoever goes on from there goes on where it ends."""
        assert self._journal is not None
        with self._accounts:
            while self._next_in_journal is not None:
                name, number = self._next_in_journal
                chunk = self._splits[name].chunks.get(number)
                if chunk is None:
                    break
                _write_all(self._journal, memoryview(_journal_line(name, number, chunk)))
                self._next_in_journal = next(self._not_in_journal, None)

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()


def _journal_line(split: str, number: int, chunk: Chunk) -> bytes:
    return f"{split} {number} {chunk[0]} {chunk[1]}\n".encode()


class _SplitWriter:
    """Collects rows into chunks, and writes each when it is whole.

    zarr makes the array; the chunk files, whose format is as plain as can be, are written here: by
    way of zarr's event loop and codecs it took twice the time.

    `chunks` are those that are there already; `write` takes path and encoded rows.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        chunks: list[Chunk],
        write: Callable[[Path, Bytes], Chunk],
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.codec = codec_for(layout.codec, layout.dtype)
        self.chunks: dict[int, Chunk] = dict(enumerate(chunks))
        self.write = write
        self.written = min(len(chunks) * layout.rows_per_chunk, layout.rows)
        self._chunk: NDArray[Any] | None = None

    def append(self, rows: NDArray[Any]) -> None:
        if self._chunk is None:
            self._chunk = self._empty_chunk()
        while len(rows):
            number, held = divmod(self.written, self.layout.rows_per_chunk)
            part = rows[: self.layout.rows_per_chunk - held]
            self._chunk[held : held + len(part)] = part
            held += len(part)
            self.written += len(part)
            rows = rows[len(part) :]
            if held == self.layout.rows_per_chunk or self.written == self.layout.rows:
                self.put(number, self._chunk[:held])

    def put(self, number: int, rows: NDArray[Any]) -> None:
        if len(rows) < self.layout.rows_per_chunk:
            chunk = self._empty_chunk()
            chunk[: len(rows)] = rows
            chunk[len(rows) :] = FILL_VALUES[self.layout.dtype]
            rows = chunk
        path = self.folder / self.layout.chunk_name(number)
        self.chunks[number] = self.write(path, self.codec.encode(rows))

    def _empty_chunk(self) -> NDArray[Any]:
        return np.empty((self.layout.rows_per_chunk, *self.layout.row_shape), self.layout.dtype)


def mend_chunk(store: Store, damage: Damage, rows: NDArray[Any]) -> bool:
    """Write a damaged chunk of a store once more, from its rows (n, *row_shape).

    Returns False, and writes nothing, if these are not the rows that were written: they do not have
    the checksum that the manifest lists.

    Raises:
        OSError: the disk is full, or fails.
    """
    reader = store.readers[damage.split]
    layout = reader.layout
    if (rows.dtype.name, rows.shape[1:]) != (layout.dtype, layout.row_shape):
        return False
    shape = (layout.rows_per_chunk, *layout.row_shape)
    chunk = np.full(shape, FILL_VALUES[layout.dtype], layout.dtype)
    chunk[: len(rows)] = rows
    content = codec_for(layout.codec, layout.dtype).encode(chunk)
    listed = reader.checksums[damage.chunk], reader.sizes[damage.chunk]
    if (CRC32C.checksum(content), len(content) + CHECKSUM_BYTES) != listed:
        return False
    reader.close()  # what is open is the old file
    path = reader.chunk_path(damage.chunk)
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    write_chunk_file(path, content)
    return True


def write_chunk_file(path: Path, content: Bytes) -> int:
    """Encoded rows and their checksum, which is returned. Whole or not there."""
    checksum = CRC32C.checksum(content)
    with partial_beside(path) as temporary:  # two runs may mend one chunk at a time
        with temporary.open("xb", buffering=0) as file:
            for start in range(0, len(content), WRITE_BYTES):
                _write_all(file, content[start : start + WRITE_BYTES].data)
            _write_all(file, memoryview(checksum.to_bytes(CHECKSUM_BYTES, "little")))
        temporary.rename(path)
    return checksum


def _write_all(file: FileIO, content: memoryview) -> None:
    # A nearly full disk takes a part first, and says why at the next attempt.
    while content:
        content = content[file.write(content) :]
