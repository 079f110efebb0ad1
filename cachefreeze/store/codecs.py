"""How the bytes of a chunk are encoded: not at all, with LZ4, or with Zstandard.

zarr knows the same codecs by the same settings, so it reads what is encoded here.
"""

from typing import Any, Protocol

import numpy as np
import zarr.codecs
from numcodecs import Blosc, Zstd
from numpy.typing import NDArray
from zarr.abc.codec import BytesBytesCodec

Bytes = NDArray[np.uint8]

# CRC32C, after the encoded bytes in every chunk file.
CHECKSUM_BYTES = 4
# Of a Blosc frame: where it says how many bytes it holds and how many it takes (uint32 each).
BLOSC_HEADER_BYTES, BLOSC_DECODED, BLOSC_ENCODED = 16, slice(4, 8), slice(12, 16)
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class Codec(Protocol):
    """Encodes chunks of one element type; `zarr` is what the array's metadata say of it."""

    zarr: tuple[BytesBytesCodec, ...]

    def encode(self, rows: NDArray[Any]) -> Bytes:
        """The bytes of a chunk file, less its checksum."""

    def decode(self, encoded: Bytes, out: Bytes) -> None:
        """Into `out`, which must have exactly the size of what was encoded.

        Raises:
            ValueError: these are not the encoded bytes of that many bytes. What they claim is
                compared with `out` first: no claim makes it take memory.
        """


class Raw:
    """The bytes of the rows as they are."""

    zarr: tuple[BytesBytesCodec, ...] = ()

    def encode(self, rows: NDArray[Any]) -> Bytes:
        return rows.reshape(-1).view(np.uint8)

    def decode(self, encoded: Bytes, out: Bytes) -> None:
        if len(encoded) != len(out):
            raise ValueError(f"it holds {len(encoded)} bytes instead of {len(out)}")
        out[:] = encoded


class Lz4:
    """LZ4 by way of Blosc, which sorts the bytes of all elements by their significance first."""

    def __init__(self, itemsize: int) -> None:
        codec = zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=itemsize)
        self.zarr: tuple[BytesBytesCodec, ...] = (codec,)
        self._blosc = Blosc("lz4", clevel=5, shuffle=Blosc.SHUFFLE, typesize=itemsize)

    def encode(self, rows: NDArray[Any]) -> Bytes:
        return np.frombuffer(self._blosc.encode(rows.reshape(-1).view(np.uint8)), np.uint8)

    def decode(self, encoded: Bytes, out: Bytes) -> None:
        header = encoded[:BLOSC_HEADER_BYTES].tobytes()
        _check_claim(int.from_bytes(header[BLOSC_DECODED], "little"), out)
        # Blosc believes its header, and would read beyond the end of a frame that was cut.
        if int.from_bytes(header[BLOSC_ENCODED], "little") != len(encoded):
            raise ValueError("it is not as long as it claims")
        _decode(self._blosc, encoded, out)


class Zstandard:
    """Zstandard at its fastest plain level, with its own checksum."""

    def __init__(self) -> None:
        codec = zarr.codecs.ZstdCodec(level=1, checksum=True)
        self.zarr: tuple[BytesBytesCodec, ...] = (codec,)
        self._zstd = Zstd(level=1, checksum=True)

    def encode(self, rows: NDArray[Any]) -> Bytes:
        return np.frombuffer(self._zstd.encode(rows.reshape(-1).view(np.uint8)), np.uint8)

    def decode(self, encoded: Bytes, out: Bytes) -> None:
        _check_claim(zstd_content_size(encoded[:18].tobytes()), out)
        _decode(self._zstd, encoded, out)


def zstd_content_size(header: bytes) -> int | None:
    """Bytes that a Zstandard frame claims to hold; None if it does not say (RFC 8878, 3.1.1.1)."""
    if header[:4] != ZSTD_MAGIC or len(header) < 5:
        return None
    descriptor = header[4]
    single_segment = descriptor >> 5 & 1
    size_bytes = (single_segment, 2, 4, 8)[descriptor >> 6]
    # Between them: a byte for the window of a frame in several segments, a dictionary's number.
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    field = header[start : start + size_bytes]
    if size_bytes == 0 or len(field) < size_bytes:
        return None
    return int.from_bytes(field, "little") + (256 if size_bytes == 2 else 0)


def _check_claim(claimed: int | None, out: Bytes) -> None:
    if claimed != len(out):
        raise ValueError(f"it claims to hold {claimed} bytes instead of {len(out)}")


def _decode(codec: Any, encoded: Bytes, out: Bytes) -> None:
    try:
        codec.decode(encoded, out)
    except (RuntimeError, ValueError) as error:
        raise ValueError("it cannot be decoded") from error


# In the order of their cost.
CODECS = ("raw", "lz4", "zstd")


def codec_for(codec: str, dtype: str) -> Codec:
    """The codec of this name (one of `CODECS`) for elements of this type."""
    if codec == "raw":
        return Raw()
    if codec == "lz4":
        return Lz4(np.dtype(dtype).itemsize)
    assert codec == "zstd", codec
    return Zstandard()


def encoded_bytes(rows: NDArray[Any], codec: str) -> int:
    """Size of the chunk file that these rows would make, with its checksum."""
    return len(codec_for(codec, rows.dtype.name).encode(rows)) + CHECKSUM_BYTES
