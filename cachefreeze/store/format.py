"""The store's format: what its files say, and how they are checked before they are believed."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
CHECKSUM_BYTES = 4
# Whole rows, near this size: few files, and not much more than a split that is small.
CHUNK_BYTES = 8 * 2**20
# Nothing that we write comes near: a larger file is not ours, and is not parsed.
METADATA_BYTES = 64 * 2**20
# The type of the activations, and that of the array which holds them.
ARRAY_TYPES = {
    "float16": "float16",
    "float32": "float32",
    "float64": "float64",
    "bfloat16": "uint16",
}
# Array element types by name, with a fill value that no finite activation can be mistaken for;
# bfloat16 travels as its bits, where 0x7FC0 is NaN.
FILL_VALUES: dict[str, float | int] = {
    "float16": float("nan"),
    "float32": float("nan"),
    "float64": float("nan"),
    "uint16": 0x7FC0,
}


class StoreError(Exception):
    """A store that must not be read, and why."""


@dataclass(frozen=True)
class Layout:
    """How one split lies on disk: `rows` rows of `row_shape`, `rows_per_chunk` to a file."""

    rows: int
    row_shape: tuple[int, ...]
    dtype: str
    rows_per_chunk: int

    @classmethod
    def of(cls, rows: int, row_shape: Sequence[int], dtype: str) -> "Layout":
        """Chunks of a few MB, of whole rows, and as even as can be."""
        row_bytes = max(prod(row_shape) * np.dtype(dtype).itemsize, 1)
        chunks = -(-rows // max(CHUNK_BYTES // row_bytes, 1))
        return cls(rows, tuple(row_shape), dtype, -(-rows // max(chunks, 1)))

    @property
    def row_bytes(self) -> int:
        return prod(self.row_shape) * np.dtype(self.dtype).itemsize

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.rows_per_chunk)

    @property
    def chunk_file_bytes(self) -> int:
        """Of every chunk file; the last one is filled up."""
        return self.rows_per_chunk * self.row_bytes + CHECKSUM_BYTES

    @property
    def bytes(self) -> int:
        return self.chunks * self.chunk_file_bytes

    def chunk_name(self, chunk: int) -> str:
        return ".".join(["c", str(chunk), *("0" for _ in self.row_shape)])

    def is_chunk_name(self, name: str) -> bool:
        match = re.fullmatch(r"c\.(\d{1,12})((?:\.0)*)", name)
        return (
            match is not None
            and int(match[1]) < self.chunks
            and name == self.chunk_name(int(match[1]))
        )


@dataclass(frozen=True)
class Description:
    """What a store holds, as its group's attributes say it.

    `values` is the tensors' type (bfloat16 is stored as uint16); `details` are for people only.
    """

    fingerprint: str
    network: str
    boundary: int
    unit: str
    values: str
    created: float
    splits: dict[str, Layout]
    details: dict[str, str]

    @property
    def bytes(self) -> int:
        """Of all chunk files; the metadata beside them are a few kB."""
        return sum(layout.bytes for layout in self.splits.values())


def read_description(folder: Path) -> Description:
    """What a store, committed or not, says of itself.

    Raises:
        StoreError: it says nothing that we would have written.
    """
    group = _read_json(folder / "zarr.json")
    try:
        attributes = dict(group["attributes"]["cachefreeze"])
        version = attributes.pop("format")
        if version != FORMAT:
            raise StoreError(f"its format is {version!r}, and this version reads {FORMAT}")
        splits = {
            str(name): Layout(
                rows=_whole(split["rows"]),
                row_shape=tuple(_whole(size) for size in split["row_shape"]),
                dtype=str(split["dtype"]),
                rows_per_chunk=_whole(split["rows_per_chunk"]),
            )
            for name, split in attributes.pop("splits").items()
        }
        description = Description(splits=splits, **attributes)
        for field in ("fingerprint", "network", "unit", "values"):
            if not isinstance(getattr(description, field), str):
                raise TypeError(field)
        _whole(description.boundary, least=0)
        float(description.created)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError("its zarr.json does not describe a store of cachefreeze") from error
    for name, layout in splits.items():
        known = layout.dtype == ARRAY_TYPES.get(description.values)
        if not known or not re.fullmatch(r"[a-z]+", name):
            raise StoreError("its zarr.json describes an array that cachefreeze does not write")
    if description.fingerprint != folder.name:
        raise StoreError("its fingerprint is not the name of its folder")
    return description


@dataclass(frozen=True)
class Manifest:
    """What was written: the CRC32C of every chunk by split, and the writer's notes."""

    checksums: dict[str, list[int]]
    notes: dict[str, float]


def read_manifest(folder: Path, description: Description) -> Manifest:
    """The manifest of a committed store, once marker, manifest and metadata agree.

    Raises:
        StoreError: they do not.
    """
    content = _read_file(folder / "manifest.json")
    if _read_file(folder / "COMMITTED") != sha256(content).encode():
        raise StoreError("its marker does not fit its manifest")
    manifest = _parse(content, "manifest.json")
    try:
        for name in ["zarr.json", *(f"{split}/zarr.json" for split in description.splits)]:
            if sha256(_read_file(folder / name)) != manifest["sha256"][name]:
                raise StoreError(f"its {name} was changed after it was committed")
        checksums = {
            name: [_whole(checksum, least=0) for checksum in manifest["crc32c"][name]]
            for name in description.splits
        }
        notes = {str(name): float(value) for name, value in manifest["notes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError("its manifest.json is not one of cachefreeze") from error
    for name, layout in description.splits.items():
        if len(checksums[name]) != layout.chunks:
            raise StoreError(f"its manifest does not list the chunks of {name}")
    return Manifest(checksums, notes)


def _whole(value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value < 2**40:
        raise ValueError(f"{value!r} is not a whole number that a store can have")
    return value


def _read_json(path: Path) -> Any:
    return _parse(_read_file(path), path.name)


def _read_file(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=open_without_following) as file:
            content = file.read(METADATA_BYTES + 1)
    except OSError as error:
        raise StoreError(f"its {path.name} cannot be read ({error.strerror})") from error
    if len(content) > METADATA_BYTES:
        raise StoreError(f"its {path.name} is too large to be one of cachefreeze")
    return content


def _parse(content: bytes, name: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"its {name} is not JSON") from error


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def open_without_following(path: str | Path, flags: int) -> int:
    """A symbolic link in a store is not ours, and may lead anywhere."""
    return os.open(path, flags | os.O_NOFOLLOW)
