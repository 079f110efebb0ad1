"""What the files of a segment are called and say, and how that is checked before it is believed."""

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
# Rows as they are, or compressed one by one.
CODECS = ("raw", "zstd")
# Higher levels take twice the time and gain nothing: activations repeat nothing but zeros.
ZSTD_LEVEL = 1
# Few files, and no more than a killed run may lose.
CHUNK_BYTES, CHUNK_ROWS = 8 * 2**20, 4096
# A raw chunk file is its rows' bytes, and their CRC32C.
CHECKSUM_BYTES = 4
KEY_BYTES = 16
# The name of a set, and of a segment. Nothing else is served, counted or removed.
NAME = re.compile(r"[0-9a-f]{32}")
# What is being made and what is being removed: invisible to readers.
NEW, TRASH = ".new-", ".trash-"
# Files of a segment that are not zarr's. They lie in the folder of an array, where zarr takes no
# notice of them; in that of a group it warns.
JOURNAL, LOCK, USED, REFUSED = "keys/journal", "keys/lock", "keys/used", "keys/refused"
# Nothing that is written here comes near: what is larger is not parsed. An object in JSON takes 30
# times its size in memory.
METADATA_BYTES, METADATA_BRACKETS = 2**20, 10_000
MOST_DIMS, MOST_ROW_BYTES = 32, 2**40
# Digits of the number of slots in an array's metadata: it is written over as the array grows.
SLOT_DIGITS = 12
# A fill value that no activation is taken for: zarr gives it for a chunk that is missing.
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
    """A segment that must not be read. One sentence, with the path."""


@dataclass(frozen=True)
class Row:
    """How one row of a value lies in memory.

    Args:
        dims: Sizes in the order of memory, the outermost first.
        dtype: Type of the elements: a name of numpy's, or `bfloat16`.

    Raises:
        ValueError: a row of no bytes, or a type that zarr does not have.
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
        """Type of the array's elements. zarr has no bfloat16: its bits stand there."""
        return "uint16" if self.dtype == "bfloat16" else self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return prod(self.dims) * np.dtype(self.stored).itemsize


@dataclass(frozen=True)
class Layout:
    """How the rows of a segment are divided into chunks.

    Args:
        row: How one row lies in memory.
        chunk_rows: Number of rows in a chunk.
        codec: How rows are written, one of `CODECS`.
    """

    row: Row
    chunk_rows: int
    codec: str = "raw"

    @classmethod
    def of(cls, row: Row, codec: str = "raw") -> "Layout":
        """The layout that is written for such rows."""
        return cls(row, min(max(CHUNK_BYTES // row.nbytes, 1), CHUNK_ROWS), codec)

    @property
    def values_bytes(self) -> int:
        """Largest number of bytes of a chunk file of values. If raw, all have so many."""
        if self.codec == "raw":
            return self.chunk_rows * self.row.nbytes + CHECKSUM_BYTES
        # zstd adds a 256th and 64 bytes at most to what it cannot compress.
        most = self.row.nbytes + self.row.nbytes // 256 + 64
        return self.chunk_rows * most + self.index_bytes

    @property
    def index_bytes(self) -> int:
        """Bytes at the end of a compressed chunk file that say where rows lie in it."""
        return 16 * self.chunk_rows + CHECKSUM_BYTES

    @property
    def keys_bytes(self) -> int:
        """Bytes of a chunk file of keys."""
        return self.chunk_rows * KEY_BYTES + CHECKSUM_BYTES

    def values_name(self, chunk: int) -> str:
        """Path of a chunk file of values, inside the segment."""
        return f"values/c.{chunk}" + ".0" * len(self.row.dims)

    def keys_name(self, chunk: int) -> str:
        """Path of a chunk file of keys, inside the segment."""
        return f"keys/c.{chunk}.0"


@dataclass(frozen=True)
class Head:
    """What the metadata of a segment say.

    Attributes:
        layout: How its rows lie.
        about: What the writer said about the value, for people.
    """

    layout: Layout
    about: dict[str, Any]


def metadata(name: str, layout: Layout, about: Mapping[str, Any], slots: int) -> dict[str, str]:
    """Returns the metadata files of a segment, by path.

    Args:
        name: Name of the set.
        layout: How the rows lie.
        about: What to say about the value, as plain JSON.
        slots: Number of rows in the arrays.

    Raises:
        ValueError: `about` is no plain JSON, or too much of it.
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
        raise ValueError(f"what is said about a value is no plain JSON: {error}") from error
    if len(content) > METADATA_BYTES or _brackets(content.encode()) > METADATA_BRACKETS:
        raise ValueError("what is said about a value is longer than a megabyte")
    return {
        "zarr.json": content,
        "values/zarr.json": _array(layout, slots),
        "keys/zarr.json": _array(Layout(Row((KEY_BYTES,), "uint8"), layout.chunk_rows), slots),
    }


def slots_offset(content: str) -> int:
    """Returns where the number of slots stands in an array's metadata."""
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
    """Returns what the metadata of a segment say, once they are what is written for such rows.

    The number of slots is not compared: it grows while others read, and nothing here goes by it.

    Args:
        folder: Folder of the segment.
        name: Name of the set that it must belong to.

    Raises:
        SegmentError: they are not.
    """
    for part in (folder, folder / "values", folder / "keys"):
        if not is_folder(part):
            raise SegmentError(f"{part} is no folder: this segment is not read")
    path = folder / "zarr.json"
    group = _parse(path)
    try:
        said = group["attributes"]["cachefreeze"]
        if said["format"] != FORMAT:
            found = f"{said['format']!r:.40}"
            raise SegmentError(f"{path} has format {found}, and this version reads {FORMAT}")
        if said["set"] != name:
            raise SegmentError(f"{path} belongs to another set: this segment is not read")
        row = Row(tuple(said["dims"]), str(said["dtype"]))
        if said["codec"] not in CODECS:
            found = f"{said['codec']!r:.40}"
            raise SegmentError(f"{path} has the codec {found}: this segment is not read")
        head = Head(Layout(row, said["chunk_rows"], said["codec"]), dict(said["about"]))
        most = Layout.of(row).chunk_rows
        if type(head.layout.chunk_rows) is not int or not 1 <= head.layout.chunk_rows <= most:
            raise ValueError("no chunk has so many rows")
        expected = metadata(name, head.layout, head.about, 0)
        _compare(group, expected["zarr.json"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SegmentError(f"{path} is not what cachefreeze writes: not read") from error
    for array_name in ("values", "keys"):
        path = folder / array_name / "zarr.json"
        array = _parse(path)
        try:
            slots = array["shape"][0]
            if type(slots) is not int or not 0 <= slots < 10**SLOT_DIGITS:
                raise ValueError("no array has so many slots")
            array["shape"][0] = 0
            _compare(array, expected[f"{array_name}/zarr.json"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise SegmentError(f"{path} is not what cachefreeze writes: not read") from error
    return head


def is_folder(path: Path) -> bool:
    """Whether a path is a folder itself, and no link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def read_small(path: Path, most: int = METADATA_BYTES) -> bytes:
    """Returns the content of a file that others may have put there.

    Raises:
        SegmentError: it is no regular file, too large, or cannot be read.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            # Not `most` at once, which would be taken from memory whatever there is to read.
            content = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    except OSError as error:
        raise SegmentError(f"{path} cannot be read ({error.strerror})") from error
    if len(content) > most:
        raise SegmentError(f"{path} is too large to be one of cachefreeze: not read")
    return content


def _parse(path: Path) -> Any:
    content = read_small(path)
    if _brackets(content) > METADATA_BRACKETS:
        raise SegmentError(f"{path} is not what cachefreeze writes: not read")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SegmentError(f"{path} is not JSON: not read") from error


def _brackets(content: bytes) -> int:
    return content.count(b"[") + content.count(b"{")


def _compare(found: Any, expected: str) -> None:
    # As text: in python 1, 1.0 and True are equal.
    if json.dumps(found, sort_keys=True) != json.dumps(json.loads(expected), sort_keys=True):
        raise ValueError("it says something else")
