"""The store's format: what its files say, and how they are checked before they are believed."""

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from cachefreeze.files import open_regular
from cachefreeze.store.codecs import CHECKSUM_BYTES, CODECS, codec_for

FORMAT = 3
# Whole rows, near this size: few files, and not much more than a split that is small.
CHUNK_BYTES = 8 * 2**20
# Nothing that we write comes near: a larger file is not ours, and is not parsed. (A manifest has
# 12 bytes or so for each chunk: this is enough for tens of terabytes.)
METADATA_BYTES, MANIFEST_BYTES = 2**20, 2**24
MAX_DIMENSIONS = 8
# Lists and objects in a metadata file, and characters in a name.
MAX_BRACKETS, MAX_NAME = 1000, 200
# Nor does a row, and a chunk is larger than `CHUNK_BYTES` only if a row is: one that claims more is
# neither read nor decoded.
MAX_CHUNK_BYTES = 2**30
# What the rows are for those who read them: uint8 is pixels.
VALUES = ("float16", "float32", "float64", "bfloat16", "uint8")
# What may be stored instead of floating-point values, at a loss.
LOSSY = ("float16", "bfloat16", "int8")
# What is stored, and the element type of the array that holds it.
ARRAY_TYPES = {
    "float16": "float16",
    "float32": "float32",
    "float64": "float64",
    "bfloat16": "uint16",
    "int8": "int8",
    "uint8": "uint8",
}
# Array element types by name, with a fill value that no finite activation can be mistaken for;
# bfloat16 travels as its bits, where 0x7FC0 is NaN. In a byte no value is impossible.
FILL_VALUES: dict[str, float | int] = {
    "float16": float("nan"),
    "float32": float("nan"),
    "float64": float("nan"),
    "uint16": 0x7FC0,
    "int8": 0,
    "uint8": 0,
}


# Of an array of images.
DIMENSIONS = ["row", "y", "x", "channel"]
# Of each split beside its chunks: metadata, the manifest's and the journal's checksums and sizes,
# ranges of int8.
OVERHEAD_BYTES, OVERHEAD_BYTES_A_CHUNK, OVERHEAD_BYTES_A_CHANNEL = 8_000, 80, 80


class StoreError(Exception):
    """A store that must not be read, and why."""


@dataclass(frozen=True)
class Layout:
    """How one split lies on disk: `rows` rows of `row_shape`, `rows_per_chunk` to a file.

    Every chunk file is encoded with `codec`, one of `CODECS`. Rows that are `channels_last` are
    stored as (H, W, C), and (C, H, W) for those who read them.
    """

    rows: int
    row_shape: tuple[int, ...]
    dtype: str
    rows_per_chunk: int
    codec: str = "raw"
    channels_last: bool = False

    @classmethod
    def of(
        cls,
        rows: int,
        row_shape: Sequence[int],
        dtype: str,
        codec: str = "raw",
        *,
        channels_last: bool = False,
    ) -> "Layout":
        """Chunks of a few MB before encoding, of whole rows, and as even as can be."""
        row_bytes = max(prod(row_shape) * np.dtype(dtype).itemsize, 1)
        chunks = -(-rows // max(CHUNK_BYTES // row_bytes, 1))
        rows_per_chunk = -(-rows // max(chunks, 1))
        return cls(rows, tuple(row_shape), dtype, rows_per_chunk, codec, channels_last)

    @property
    def compressed(self) -> bool:
        """Whether rows have to be decoded: single rows cannot be read from the files then."""
        return self.codec != "raw"

    @property
    def row_bytes(self) -> int:
        return prod(self.row_shape) * np.dtype(self.dtype).itemsize

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.rows_per_chunk)

    @property
    def chunk_bytes(self) -> int:
        """Of the rows of every chunk; the last one is filled up."""
        return self.rows_per_chunk * self.row_bytes

    @property
    def chunk_file_bytes(self) -> int:
        """Of every chunk file; if `compressed`, before compression."""
        return self.chunk_bytes + CHECKSUM_BYTES

    def may_have_size(self, size: int) -> bool:
        """Whether a chunk file can be of so many bytes."""
        if not self.compressed:
            return size == self.chunk_file_bytes
        # No codec makes a chunk larger by more than a percent, and a header of a few bytes.
        return size <= 2 * self.chunk_file_bytes + 128

    @property
    def bytes(self) -> int:
        """Of all chunk files; if `compressed`, before compression."""
        return self.chunks * self.chunk_file_bytes

    @property
    def memory_bytes(self) -> int:
        """That reading takes: all rows if they have to be decoded, otherwise none."""
        return self.chunks * self.chunk_bytes if self.compressed else 0

    @property
    def overhead_bytes(self) -> int:
        """No more than what describing this split takes on disk."""
        channels = self.row_shape[-1] if self.dtype == "int8" and self.row_shape else 0
        return (
            OVERHEAD_BYTES
            + OVERHEAD_BYTES_A_CHUNK * self.chunks
            + OVERHEAD_BYTES_A_CHANNEL * channels
        )

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
class Quantization:
    """What int8 elements stand for, by channel (the last axis): stored * scale + offset."""

    scale: tuple[float, ...]
    offset: tuple[float, ...]


@dataclass(frozen=True)
class Description:
    """What a store holds, as its group's attributes say it.

    Attributes:
        values: the rows' type for those who read them, one of `VALUES`.
        stored: what the arrays' elements encode, a key of `ARRAY_TYPES`: `values` itself, or
            something smaller that loses precision.
        details: for people only.
        quantization: of rows that are stored as int8, and only of those.
    """

    fingerprint: str
    network: str
    boundary: int
    unit: str
    values: str
    stored: str
    created: float
    splits: dict[str, Layout]
    details: dict[str, str]
    quantization: Quantization | None = None

    @property
    def codec(self) -> str:
        """Of all splits."""
        return next(iter(self.splits.values())).codec

    @property
    def channels_last(self) -> bool:
        """Of all splits, see `Layout`."""
        return next(iter(self.splits.values())).channels_last

    @property
    def lossy(self) -> bool:
        """Whether the rows that are read are not, to the last bit, those that were computed."""
        return self.stored != self.values

    @property
    def bytes(self) -> int:
        """Of all chunk files, before compression; the metadata beside them are a few kB."""
        return sum(layout.bytes for layout in self.splits.values())

    @property
    def overhead_bytes(self) -> int:
        """No more than what the store takes on disk beside its chunk files."""
        return sum(layout.overhead_bytes for layout in self.splits.values())

    @property
    def memory_bytes(self) -> int:
        """That reading the store takes, see `Layout.memory_bytes`."""
        return sum(layout.memory_bytes for layout in self.splits.values())


def read_description(folder: Path) -> Description:
    """What a store, committed or not, says of itself.

    Raises:
        StoreError: it says nothing that we would have written.
    """
    if folder.is_symlink():
        raise StoreError("it is a symbolic link")
    group = _parse(read_file(folder / "zarr.json"), "zarr.json")
    try:
        attributes = dict(group["attributes"]["cachefreeze"])
        version = attributes.pop("format")
        if version != FORMAT:
            raise StoreError(f"its format is {version!r:.40}, and this version reads {FORMAT}")
        splits = {
            str(name): Layout(
                rows=_whole(split["rows"]),
                row_shape=tuple(_whole(size) for size in split["row_shape"]),
                dtype=str(split["dtype"]),
                rows_per_chunk=_whole(split["rows_per_chunk"]),
                codec=str(split["codec"]),
                channels_last=split["channels_last"],
            )
            for name, split in attributes.pop("splits").items()
        }
        quantization = _read_quantization(attributes.pop("quantization"))
        description = Description(splits=splits, quantization=quantization, **attributes)
        names = [getattr(description, field) for field in ("network", "unit")]
        for name in (*names, *description.details.keys(), *description.details.values()):
            if label(name) != name:
                raise TypeError("a name is none")
        _whole(description.boundary, least=0)
        _finite(description.created)
        # And says nothing besides.
        if not _is_the_same(group, group_metadata(description)):
            raise TypeError("not as it would be written")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreError("its zarr.json does not describe a store of cachefreeze") from error
    if not _is_written(description):
        raise StoreError("its zarr.json describes an array that cachefreeze does not write")
    if not _is_quantized_rightly(description):
        raise StoreError("its zarr.json does not say what its int8 elements stand for")
    if description.fingerprint != folder.name:
        raise StoreError("its fingerprint is not the name of its folder")
    for name in description.splits:
        if (folder / name).is_symlink():
            raise StoreError(f"its folder {name} is a symbolic link")
    return description


def check_array(folder: Path, layout: Layout) -> None:
    """See that the zarr array of a split is the one that we write for this layout.

    Its rows are read and decoded by the layout alone; but what other tools would read by these
    metadata must be the same rows, and must not make them run anything.

    Raises:
        StoreError: it is not.
    """
    found = _parse(read_file(folder / "zarr.json"), f"{folder.name}/zarr.json")
    if not _is_the_same(found, array_metadata(layout)):
        raise StoreError(
            f"its {folder.name}/zarr.json describes an array that cachefreeze does not write"
        )


def group_metadata(description: Description) -> dict[str, Any]:
    """What zarr writes for the group of a store (zarr v3, core protocol)."""
    about = json.loads(json.dumps({"format": FORMAT, **asdict(description)}))
    return {"zarr_format": 3, "node_type": "group", "attributes": {"cachefreeze": about}}


def array_metadata(layout: Layout) -> dict[str, Any]:
    """What zarr writes for the array of a split."""
    fill = FILL_VALUES[layout.dtype]
    order = {"configuration": {"endian": "little"}}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [layout.rows, *layout.row_shape],
        "data_type": layout.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [layout.rows_per_chunk, *layout.row_shape]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if math.isnan(fill) else fill,
        "codecs": [
            {"name": "bytes", **(order if np.dtype(layout.dtype).itemsize > 1 else {})},
            *(codec.to_dict() for codec in codec_for(layout.codec, layout.dtype).zarr),
            {"name": "crc32c"},
        ],
        "dimension_names": DIMENSIONS if layout.channels_last else None,
    }


def _is_the_same(found: Any, expected: dict[str, Any]) -> bool:
    """Whether metadata are as expected, and what they say besides is nothing: versions of zarr
    differ in whether they write down what is empty."""
    found = {name: value for name, value in dict(found).items() if value not in (None, [], {})}
    expected = {name: value for name, value in expected.items() if value is not None}
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


def label(text: str) -> str:
    """A name as it may be written down: for people, on one line."""
    return "".join(filter(str.isprintable, text))[:MAX_NAME]


def _read_quantization(content: Any) -> Quantization | None:
    if content is None:
        return None
    return Quantization(**{name: tuple(map(_finite, numbers)) for name, numbers in content.items()})


def _is_written(description: Description) -> bool:
    """Whether it is of splits and types that a store can have."""
    values, stored = description.values, description.stored
    return (
        values in VALUES
        and (stored == values or (values != "uint8" and stored in LOSSY))
        and len({(each.codec, each.channels_last) for each in description.splits.values()}) == 1
        and all(
            re.fullmatch(r"[a-z]+", name)
            and layout.codec in CODECS
            and layout.dtype == ARRAY_TYPES[stored]
            and len(layout.row_shape) <= MAX_DIMENSIONS
            and type(layout.channels_last) is bool
            and (len(layout.row_shape) == 3 or not layout.channels_last)
            and layout.chunk_bytes <= MAX_CHUNK_BYTES
            for name, layout in description.splits.items()
        )
    )


def _is_quantized_rightly(description: Description) -> bool:
    quantization = description.quantization
    if quantization is None or description.stored != "int8":
        return quantization is None and description.stored != "int8"
    channels = {layout.row_shape[-1:] for layout in description.splits.values()}
    return channels == {(len(quantization.scale),)} == {(len(quantization.offset),)}


@dataclass(frozen=True)
class Manifest:
    """What was written: by split the CRC32C and the file's size of every chunk, and notes."""

    checksums: dict[str, list[int]]
    sizes: dict[str, list[int]]
    notes: dict[str, float]


def read_manifest(folder: Path, description: Description) -> Manifest:
    """The manifest of a committed store, once marker, manifest and metadata agree.

    Raises:
        StoreError: they do not.
    """
    content = read_file(folder / "manifest.json", MANIFEST_BYTES)
    if read_file(folder / "COMMITTED") != sha256(content).encode():
        raise StoreError("its marker does not fit its manifest")
    manifest = _parse(content, "manifest.json")
    try:
        for name in ["zarr.json", *(f"{split}/zarr.json" for split in description.splits)]:
            if sha256(read_file(folder / name)) != manifest["sha256"][name]:
                raise StoreError(f"its {name} was changed after it was committed")
        checksums = {
            name: [_whole(checksum, least=0) for checksum in manifest["crc32c"][name]]
            for name in description.splits
        }
        sizes = {
            name: _sizes(manifest["bytes"][name], layout)
            if layout.compressed
            else [layout.chunk_file_bytes] * len(checksums[name])
            for name, layout in description.splits.items()
        }
        notes = {str(name): _finite(value) for name, value in manifest["notes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreError("its manifest.json is not one of cachefreeze") from error
    for name, layout in description.splits.items():
        if not len(checksums[name]) == len(sizes[name]) == layout.chunks:
            raise StoreError(f"its manifest does not list the chunks of {name}")
        check_array(folder / name, layout)
    return Manifest(checksums, sizes, notes)


def _sizes(sizes: Any, layout: Layout) -> list[int]:
    if not all(layout.may_have_size(_whole(size)) for size in sizes):
        raise ValueError("a chunk file is larger than a codec makes it")
    return list(sizes)


def _whole(value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value < 2**40:
        raise ValueError(f"{value!r} is not a whole number that a store can have")
    return value


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def read_file(path: Path, most: int = METADATA_BYTES) -> bytes:
    try:
        with open(path, "rb", opener=open_regular) as file:
            # Not `most` at once, which would be taken from memory whatever there is to read.
            content = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    except OSError as error:
        raise StoreError(f"its {path.name} cannot be read ({error.strerror})") from error
    if len(content) > most:
        raise StoreError(f"its {path.name} is too large to be one of cachefreeze")
    return content


def _parse(content: bytes, name: str) -> Any:
    if content.count(b"[") + content.count(b"{") > MAX_BRACKETS:  # each takes 30 times its size
        raise StoreError(f"its {name} is not JSON of cachefreeze")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"its {name} is not JSON") from error


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
