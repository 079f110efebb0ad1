"""Chunk files with compressed rows. Each row is compressed alone, so that it can be read alone.

Such a file is a shard of zarr's `sharding_indexed` codec: one zstd frame for each row, then an
index with the position of each frame, then the CRC32C of the index.
"""

import google_crc32c
import numpy as np
from numcodecs import zstd

from cachefreeze.store.format import CHECKSUM_BYTES, ZSTD_LEVEL, Layout, SegmentError

# Position of a missing row, as zarr defines it.
_MISSING = 2**64 - 1


def compress(layout: Layout, rows: np.ndarray) -> bytes:
    """Returns the content of a chunk file.

    Args:
        layout: Division of the rows into chunks.
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
    """Returns the offset and the length of each row in a chunk file.

    Args:
        layout: Division of the rows into chunks.
        rows: Number of rows in the chunk.
        size: Bytes of the file.
        tail: Last `layout.index_bytes` of the file.

    Raises:
        SegmentError: A row is outside the file.
    """
    index = np.frombuffer(tail, dtype="<u8", count=2 * layout.chunk_rows).reshape(-1, 2)[:rows]
    most = size - layout.index_bytes
    if (index > most).any() or (index.sum(axis=1) > most).any():
        raise SegmentError("has a wrong index")
    return [(int(start), int(length)) for start, length in index]


def decompress(frame: bytes, out: np.ndarray) -> None:
    """Decompresses a row.

    Args:
        frame: Compressed row.
        out: Memory for the row, uint8.

    Raises:
        SegmentError: The frame cannot be decoded, or is a row of another size.
    """
    try:
        # Compared first, so that a forged frame cannot make zstd allocate its size.
        if _content_bytes(frame) == len(out):
            zstd.decompress(frame, out)
            return
    except (ValueError, RuntimeError, IndexError) as error:
        raise SegmentError("has a row that cannot be decoded") from error
    raise SegmentError("has a row of another size")


def _content_bytes(frame: bytes) -> int:
    """Returns the decoded size from the header of a zstd frame (RFC 8878, 3.1.1.1)."""
    flags = frame[4]
    single = flags >> 5 & 1
    width = (single, 2, 4, 8)[flags >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    size = int.from_bytes(frame[start : start + width], "little")
    return size + 256 if width == 2 else size
