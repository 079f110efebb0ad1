"""What the disk under a cache takes, measured with a scratch store in the cache's own folder."""

import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cachefreeze.files import locked_folder, size_of_tree
from cachefreeze.store import (
    SCRATCH,
    Description,
    Layout,
    StoreError,
    StoreWriter,
    is_cache_dir,
)

FIRST_SCRATCH_BYTES, MAX_SCRATCH_BYTES = 2**16, 256 * 2**20
# Too little for any store.
LEAST_BYTES = 2**16
MAX_SECONDS = 2.0


@dataclass(frozen=True)
class Disk:
    """Seconds a byte; `store` is seconds. `problem`: why nothing can be kept at all."""

    write: float = 0.0
    read: float = 0.0
    verify: float = 0.0
    store: float = 0.0
    problem: str | None = None


# A slow disk, where nothing can be tried. The first store that is filled tells how it is.
ASSUMED = Disk(write=1e-8, read=1e-9, verify=1e-9, store=0.02)


def measure_disk(directory: Path, row_bytes: int, max_bytes: float, seconds: float) -> Disk:
    """Write a scratch store into the cache's folder and read it, for about as long as given.

    Args:
        directory: of the cache, or whatever folder is on the same disk.
        row_bytes: of the rows to try with.
        max_bytes: that the folder may hold, with all that it holds already.
        seconds: to spend; no more than `MAX_SECONDS`.
    """
    if max_bytes < LEAST_BYTES:
        return Disk(problem="--cache-max-gb leaves no room")
    held = size_of_tree(directory) if is_cache_dir(directory) else 0
    most = _rows_that_fit(min(max_bytes - held, MAX_SCRATCH_BYTES), row_bytes)
    few = min(max(FIRST_SCRATCH_BYTES // row_bytes, 1), most)
    if few < 1:
        # What earlier runs left goes when a store needs the room, but not for a measurement.
        return ASSUMED
    try:
        start = time.perf_counter()
        disk = _measure_scratch(directory, few, row_bytes)
    except (OSError, StoreError) as error:
        if isinstance(error, FileNotFoundError | StoreError) and directory.is_dir():
            return ASSUMED  # somebody removed it under our hands
        reason = getattr(error, "strerror", None) or error
        return Disk(problem=f"the cache folder cannot be written: {reason}")
    left = min(seconds, MAX_SECONDS) - (time.perf_counter() - start)
    per_row = (disk.write + disk.read + disk.verify) * row_bytes
    rows = int(min(most, left / per_row))
    if rows > 2 * few:
        with contextlib.suppress(OSError, StoreError):  # the disk is fuller than we may fill it
            disk = _measure_scratch(directory, rows, row_bytes)
    return disk


def _rows_that_fit(room: float, row_bytes: int) -> int:
    """Most rows whose store takes no more than `room` bytes."""
    rows = max(int(room) // row_bytes, 0)
    while rows > 0:
        layout = Layout.of(rows, (row_bytes,), "uint8")
        if layout.bytes + layout.overhead_bytes <= room:
            break
        rows -= max(rows // 50, 1)
    return max(rows, 0)


def _measure_scratch(directory: Path, rows: int, row_bytes: int) -> Disk:
    # Named so that what a killed run leaves of it is removed with the rest of its rubbish, and
    # locked so that it is not before.
    with (
        tempfile.TemporaryDirectory(prefix=SCRATCH, dir=directory) as folder,
        locked_folder(Path(folder)),
    ):
        layout = Layout.of(rows, (row_bytes,), "uint8")
        name = "0" * 32
        about = Description(name, "", 0, "", "uint8", "uint8", time.time(), {"train": layout}, {})
        content = np.random.default_rng(0).integers(0, 256, (min(rows, 64), row_bytes), np.uint8)
        mark = time.perf_counter()
        writer = StoreWriter(Path(folder), about)
        store_seconds = time.perf_counter() - mark
        try:
            mark = time.perf_counter()
            for start in range(0, rows, len(content)):
                writer.append("train", content[: rows - start])
            write = time.perf_counter() - mark
            mark = time.perf_counter()
            store = writer.commit()
        except BaseException:
            writer.abort()
            raise
        store_seconds += time.perf_counter() - mark
        try:
            mark = time.perf_counter()
            damage = next(store.damage(), None)
            verify = time.perf_counter() - mark
            if damage is not None:
                raise OSError(str(damage))
            order = np.random.default_rng(0).permutation(rows)
            mark = time.perf_counter()
            for batch in np.array_split(order, -(-rows // 64)):
                # Into new memory, as in training.
                store.readers["train"].read(batch, np.empty((len(batch), row_bytes), np.uint8))
            read = time.perf_counter() - mark
        finally:
            store.close()
    size = rows * row_bytes
    return Disk(write / size, read / size, verify / size, store_seconds)
