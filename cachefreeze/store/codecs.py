"""Rows in a chunk file that are compressed one by one, so that one can be read alone.

Such a file is a shard of zarr's `sharding_indexed`: a zstd frame for each row, then where each of
them lies, then the CRC32C of that.
"""

import google_crc32c
import numpy as np
from numcodecs import zstd

from cachefreeze.store.format import CHECKSUM_BYTES, ZSTD_LEVEL, Layout, SegmentError

# The place of a row that is not there, in zarr's words.
_MISSING = 2**64 - 1


def compress(layout: Layout, rows: np.ndarray) -> bytes:
    """Returns the content of a chunk file.

    Args:
        layout: How the rows lie.
        rows: Rows, uint8 of shape (n, row_bytes).
    """
    frames = [zstd.compress(row, ZSTD_LEVEL) for row in rows]
    index = np.full((layout.chunk_rows, 2), _MISSING, dtype="<u8")
    lengths = np.array([len(frame) for frame in frames], dtype=np.int64)
    index[: len(frames), 0] = np.cumsum(lengths) - lengths
    index[: len(frames), 1] = lengths
    checksum = google_crc32c.value(index.reshape(-1).view(np.uint8))
    return b"".join([*frames, index.tobytes(), checksum.to_bytes(CHECKSUM_BYTES, "little")])


def places(layout: Layout, rows: int, size: int, tail: bytes) -> list[tuple[int, int]]:
    """Returns where each row begins in a chunk file, and its length.

    Args:
        layout: How the rows lie.
        rows: Number of rows in the chunk.
        size: Bytes of the file.
        tail: Last `layout.index_bytes` of the file.

    Raises:
        SegmentError: they lie outside of the file, or are too long.
    """
    index = np.frombuffer(tail, dtype="<u8", count=2 * layout.chunk_rows).reshape(-1, 2)[:rows]
    most = size - layout.index_bytes
    if (index > most).any() or (index.sum(axis=1) > most).any():
        raise SegmentError("has a wrong index")
    return [(int(start), int(length)) for start, length in index]


def decompress(frame: bytes, out: np.ndarray) -> None:
    """Writes a row into memory.

    Args:
        frame: What was written for the row.
        out: Memory of the row, uint8.

    Raises:
        SegmentError: the frame is no row.
    """
    try:
        # Also that of a forged frame: what it would decode to is never allocated.
        if _content_bytes(frame) == len(out):
            zstd.decompress(frame, out)
            return
    except (ValueError, RuntimeError, IndexError) as error:
        raise SegmentError("has a row that cannot be decoded") from error
    raise SegmentError("has a row of another size")


def _content_bytes(frame: bytes) -> int:
    """Returns the size that the header of a zstd frame (RFC 8878, 3.1.1.1) names."""
    flags = frame[4]
    single = flags >> 5 & 1
    width = (single, 2, 4, 8)[flags >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    size = int.from_bytes(frame[start : start + width], "little")
    return size + 256 if width == 2 else size
