"""The journal of a segment: one line for each complete chunk."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from cachefreeze.store.files import open_regular
from cachefreeze.store.format import SegmentError

# Fields: number of the chunk, number of rows, CRC32C of the rows, of the keys, and of the line.
_LINE = re.compile(rb"(\d{8} (\d{4}) ([0-9a-f]{8}) ([0-9a-f]{8})) ([0-9a-f]{8})\n")
# All lines have the same length, so the size of the file gives their number.
LINE_BYTES = 41
MOST_CHUNKS = 10**8
_PIECE = 1024 * LINE_BYTES


@dataclass(frozen=True)
class Chunk:
    """A complete chunk.

    Args:
        number: Number of the chunk in its segment.
        rows: Number of rows in the chunk.
        values: CRC32C of the rows.
        keys: CRC32C of the keys.
    """

    number: int
    rows: int
    values: int
    keys: int

    def line(self, segment: str) -> bytes:
        """Returns the line for this chunk in the journal of a segment."""
        text = f"{self.number:08} {self.rows:04} {self.values:08x} {self.keys:08x}"
        return f"{text} {_checksum(text.encode(), segment):08x}\n".encode()


class Content(NamedTuple):
    """Contents of the two files of a chunk.

    Args:
        values: Content of the file of values.
        keys: Content of the file of keys.
    """

    values: bytes
    keys: bytes


def _checksum(text: bytes, segment: str) -> int:
    # The name is included, so that the journal of another segment is not accepted.
    return google_crc32c.value(text + segment.encode())


def read_lines(path: Path, segment: str, start: int, most_rows: int) -> list[Chunk]:
    """Reads complete lines from a journal, and returns their chunks.

    The last line may be half written. It is left for the next call.

    Args:
        path: Path of the journal.
        segment: Name of the segment.
        start: Number of lines that earlier calls have read.
        most_rows: Number of rows in a full chunk.

    Raises:
        SegmentError: A line is damaged. The second argument of the error has the chunks before it.
        OSError: The journal cannot be read.
    """
    chunks: list[Chunk] = []
    file = open_regular(path, os.O_RDONLY)
    try:
        while True:
            offset = (start + len(chunks)) * LINE_BYTES
            piece = os.pread(file, _PIECE, offset)
            whole = len(piece) // LINE_BYTES
            for number in range(whole):
                line = piece[number * LINE_BYTES : (number + 1) * LINE_BYTES]
                chunk = parse_line(line, segment, start + len(chunks), most_rows)
                if chunk is None:
                    where = start + len(chunks)
                    sentence = f"{path} is damaged in line {where + 1}: later rows are not read"
                    raise SegmentError(sentence, chunks)
                chunks.append(chunk)
            if whole < _PIECE // LINE_BYTES:
                return chunks
    finally:
        os.close(file)


def parse_line(line: bytes, segment: str, number: int, most_rows: int) -> Chunk | None:
    """Returns the chunk of a line, or None if the line is damaged.

    Args:
        line: Line of a journal.
        segment: Name of the segment.
        number: Number that the chunk must have.
        most_rows: Number of rows in a full chunk.
    """
    found = _LINE.fullmatch(line)
    if found is None or _checksum(found[1], segment) != int(found[5], 16):
        return None
    chunk = Chunk(int(line[:8]), int(found[2]), int(found[3], 16), int(found[4], 16))
    return chunk if chunk.number == number and 1 <= chunk.rows <= most_rows else None
