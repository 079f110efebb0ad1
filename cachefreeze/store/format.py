"""The files of a segment: their names, their metadata, and the checks of both."""

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from cachefreeze.store.files import open_regular

FORMAT = 2
# Rows are written as they are, or each row is compressed alone.
CODECS = ("raw", "zstd")
# Higher levels take twice the time and save nothing: activations repeat nothing but zeros.
ZSTD_LEVEL = 1
# Large enough for few files. Small enough, since a killed run loses up to one chunk.
CHUNK_BYTES, CHUNK_ROWS = 8 * 2**20, 4096
# A raw chunk file holds the bytes of its rows, then their CRC32C.
CHECKSUM_BYTES = 4
KEY_BYTES = 16
# Name of a set or a segment. Folders with other names are not read, counted or removed.
NAME = re.compile(r"[0-9a-f]{32}")
# Prefixes of folders that are being made or removed. Readers ignore them.
NEW, TRASH = ".new-", ".trash-"
# Files that zarr does not know. They are in the folder of an array, where zarr ignores them. In the
# folder of a group it would warn.
JOURNAL, LOCK, USED, REFUSED = "keys/journal", "keys/lock", "keys/used", "keys/refused"
# Larger metadata files are not parsed, since JSON objects take 30 times their size in memory. The
# store writes much smaller ones.
METADATA_BYTES, METADATA_BRACKETS = 2**20, 10_000
MOST_DIMS, MOST_ROW_BYTES = 32, 2**40
# Width of the number of slots in the metadata of an array. It is overwritten in place.
SLOT_DIGITS = 12
# zarr returns the fill value for a missing chunk, so it is one that no activation has.
_FILL: dict[str, object] = {
    "bool": False,
    **dict.fromkeys(("int8", "int16", "int32", "int64"), 0),
    **dict.fromkeys(("uint8", "uint16", "uint32", "uint64"), 0),
    **dict.fromkeys(("float16", "float32", "float64"), "NaN"),
    "complex64": ["NaN", "NaN"],
    "complex128": ["NaN", "NaN"],
    "bfloat16": 0x7FC0,
}


class SegmentError(Exception):
    """A segment or a part of it cannot be read. The message is one sentence with the path."""


@dataclass(frozen=True)
class Row:
    """Sizes and type of one row of a value.

    Args:
        dims: Sizes of the dimensions in the order of memory, the outermost first.
        dtype: Type of the elements: the name of a numpy type, or `bfloat16`.

    Raises:
        ValueError: The row is empty or too large, or zarr does not have the type.
    """

    dims: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in _FILL:
            raise ValueError(f"rows of type {self.dtype!r} cannot be stored")
        if len(self.dims) > MOST_DIMS or not all(type(d) is int and d > 0 for d in self.dims):
            raise ValueError(f"rows of the sizes {self.dims!r:.200} cannot be stored")
        if self.nbytes > MOST_ROW_BYTES:
            raise ValueError(f"rows of {self.nbytes} bytes cannot be stored")

    @property
    def stored(self) -> str:
        """Type of the elements in the array.

        zarr has no bfloat16, so its bits are stored as uint16.
        """
        return "uint16" if self.dtype == "bfloat16" else self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return prod(self.dims) * np.dtype(self.stored).itemsize


@dataclass(frozen=True)
class Layout:
    """Division of the rows of a segment into chunks.

    Args:
        row: Sizes and type of one row.
        chunk_rows: Number of rows in a chunk.
        codec: Name of the codec, one of `CODECS`.
    """

    row: Row
    chunk_rows: int
    codec: str = "raw"

    @classmethod
    def of(cls, row: Row, codec: str = "raw") -> "Layout":
        """Returns the layout in which new rows are written.

        Args:
            row: Sizes and type of one row.
            codec: Name of the codec, one of `CODECS`.
        """
        return cls(row, min(max(CHUNK_BYTES // row.nbytes, 1), CHUNK_ROWS), codec)

    @property
    def values_bytes(self) -> int:
        """Largest size of a chunk file of values, in bytes. All raw chunk files have this size."""
        if self.codec == "raw":
            return self.chunk_rows * self.row.nbytes + CHECKSUM_BYTES
        # zstd adds at most 64 bytes and a 256th of the size to data that it cannot compress.
        most = self.row.nbytes + self.row.nbytes // 256 + 64
        return self.chunk_rows * most + self.index_bytes

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of a compressed chunk file."""
        return 16 * self.chunk_rows + CHECKSUM_BYTES

    @property
    def keys_bytes(self) -> int:
        """Bytes of a chunk file of keys."""
        return self.chunk_rows * KEY_BYTES + CHECKSUM_BYTES

    def values_name(self, chunk: int) -> str:
        """Returns the path of a chunk file of values inside the segment."""
        return f"values/c.{chunk}" + ".0" * len(self.row.dims)

    @staticmethod
    def keys_name(chunk: int) -> str:
        """Returns the path of a chunk file of keys inside the segment."""
        return f"keys/c.{chunk}.0"


@dataclass(frozen=True)
class Head:
    """Contents of the metadata of a segment.

    Attributes:
        layout: Division of the rows into chunks.
        about: Description of the value that the writer gave, for people.
    """

    layout: Layout
    about: dict[str, Any]


def metadata(name: str, layout: Layout, about: Mapping[str, Any], slots: int) -> dict[str, str]:
    """Returns the contents of the metadata files of a segment, by path.

    Args:
        name: Name of the set.
        layout: Division of the rows into chunks.
        about: Description of the value for people, as plain JSON.
        slots: Number of rows in the arrays.

    Raises:
        ValueError: The description is not plain JSON, or is longer than a megabyte.
    """
    row = layout.row
    attributes = {
        "format": FORMAT,
        "set": name,
        "dims": list(row.dims),
        "dtype": row.dtype,
        "chunk_rows": layout.chunk_rows,
        "codec": layout.codec,
        "about": dict(about),
    }
    group = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"cachefreeze": attributes},
    }
    try:
        content = json.dumps(group, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the description of a value is not plain JSON: {error}") from error
    if len(content) > METADATA_BYTES or _brackets(content.encode()) > METADATA_BRACKETS:
        raise ValueError("the description of a value is longer than a megabyte")
    return {
        "zarr.json": content,
        "values/zarr.json": _array(layout, slots),
        "keys/zarr.json": _array(Layout(Row((KEY_BYTES,), "uint8"), layout.chunk_rows), slots),
    }


def slots_offset(content: str) -> int:
    """Returns the position of the number of slots in the metadata of an array."""
    return content.index('"shape": [') + len('"shape": [')


def _array(layout: Layout, slots: int) -> str:
    row = layout.row
    order = {"configuration": {"endian": "little"}}
    many_bytes = np.dtype(row.stored).itemsize > 1
    to_bytes = {"name": "bytes", **(order if many_bytes else {})}
    codecs: list[dict[str, Any]] = [to_bytes, {"name": "crc32c"}]
    if layout.codec == "zstd":
        shard = {
            "chunk_shape": [1, *row.dims],
            "codecs": [
                to_bytes,
                {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}},
            ],
            "index_codecs": [{"name": "bytes", **order}, {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": shard}]
    found = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": ["slots", *row.dims],
        "data_type": row.stored,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [layout.chunk_rows, *row.dims]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": _FILL[row.dtype],
        "codecs": codecs,
        "attributes": {"dtype": "bfloat16"} if row.dtype == "bfloat16" else {},
    }
    return json.dumps(found).replace('"slots"', f"{slots:>{SLOT_DIGITS}}", 1)


def read_head(folder: Path, name: str) -> Head:
    """Reads and checks the metadata of a segment.

    They must be equal to what the store writes for such rows, apart from the number of slots. That
    number grows while others read, and the store does not use it.

    Args:
        folder: Folder of the segment.
        name: Name of the set that the segment must belong to.

    Raises:
        SegmentError: The metadata are missing, cannot be read, or say something else.
    """
    for part in (folder, folder / "values", folder / "keys"):
        if not is_folder(part):
            raise SegmentError(f"{part} is not a folder: this segment is not read")
    path = folder / "zarr.json"
    head = parse_head(read_small(path), path, name)
    expected = metadata(name, head.layout, head.about, 0)
    for array_name in ("values", "keys"):
        path = folder / array_name / "zarr.json"
        array = _parse(read_small(path), path)
        try:
            slots = array["shape"][0]
            if type(slots) is not int or not 0 <= slots < 10**SLOT_DIGITS:
                raise ValueError("the number of slots is out of range")
            array["shape"][0] = 0
            _compare(array, expected[f"{array_name}/zarr.json"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise SegmentError(f"{path} was not written by cachefreeze: not read") from error
    return head


def parse_head(content: bytes, path: str | Path, name: str) -> Head:
    """Checks the metadata of the group of a segment.

    Args:
        content: Content of the file `zarr.json` of the group.
        path: Place of the file, for messages.
        name: Name of the set that the segment must belong to.

    Raises:
        SegmentError: The metadata say anything but what the store writes.
    """
    group = _parse(content, path)
    try:
        said = group["attributes"]["cachefreeze"]
        if said["format"] != FORMAT:
            found = f"{said['format']!r:.40}"
            raise SegmentError(
                f"{path} has format {found}, and this version reads format {FORMAT}: not read"
            )
        if said["set"] != name:
            raise SegmentError(f"{path} belongs to another set: this segment is not read")
        row = Row(tuple(said["dims"]), str(said["dtype"]))
        if said["codec"] not in CODECS:
            found = f"{said['codec']!r:.40}"
            raise SegmentError(f"{path} has the codec {found}: this segment is not read")
        head = Head(Layout(row, said["chunk_rows"], said["codec"]), dict(said["about"]))
        most = Layout.of(row).chunk_rows
        if type(head.layout.chunk_rows) is not int or not 1 <= head.layout.chunk_rows <= most:
            raise ValueError("chunk_rows is out of range")
        _compare(group, metadata(name, head.layout, head.about, 0)["zarr.json"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SegmentError(f"{path} was not written by cachefreeze: not read") from error
    return head


def is_folder(path: Path) -> bool:
    """Returns whether a path is a folder, and not a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def read_small(path: Path, most: int = METADATA_BYTES) -> bytes:
    """Reads a file that another program may have written.

    Args:
        path: Path of the file.
        most: Largest number of bytes.

    Raises:
        SegmentError: The file is too large, cannot be read, or is not a regular file.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            # `read(most)` would take that much memory, however small the file is.
            content = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    except OSError as error:
        raise SegmentError(f"{path} cannot be read ({error.strerror})") from error
    if len(content) > most:
        raise SegmentError(f"{path} is larger than any file that cachefreeze writes: not read")
    return content


def _parse(content: bytes, path: str | Path) -> Any:
    if _brackets(content) > METADATA_BRACKETS:
        raise SegmentError(f"{path} was not written by cachefreeze: not read")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SegmentError(f"{path} is not JSON: not read") from error


def _brackets(content: bytes) -> int:
    return content.count(b"[") + content.count(b"{")


def _compare(found: Any, expected: str) -> None:
    # Compared as text, since 1, 1.0 and True are equal in Python.
    if json.dumps(found, sort_keys=True) != json.dumps(json.loads(expected), sort_keys=True):
        raise ValueError("the metadata say something else")
