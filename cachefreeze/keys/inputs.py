"""Keys of rows: hashes of the bytes that a model is given."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from cachefreeze.keys.bits import bits_of
from cachefreeze.keys.device_digests import row_digests, tensor_digest
from cachefreeze.lineage.devices import HostCopy

Tensor = torch.Tensor


def row_keys(
    rows: Sequence[Tensor | np.ndarray],
    shared: Sequence[Tensor | np.ndarray],
    count: int,
    lengths: np.ndarray | None = None,
    padded: int = 0,
) -> np.ndarray:
    """Hashes each row of a batch with xxh3-128.

    Args:
        rows: Inputs whose first dimension counts rows. A numpy array holds the hashes that
            `rows_hashed` or `device_hashes` returned for an input.
        shared: Inputs that belong to the whole batch, or their hashes. They are part of every key.
        count: Number of rows in the batch.
        lengths: Length of each row without its padding. If None, the padding is part of the row.
        padded: Length that rows are padded to. An input whose second dimension has this size is
            hashed up to the row's own length.

    Returns:
        Keys as uint64, of shape (count, 2).
    """
    start = b"".join(
        one.tobytes() if isinstance(one, np.ndarray) else xxhash.xxh3_128_digest(_bytes(one))
        for one in shared
    )
    tensors = [one for one in rows if isinstance(one, Tensor)]
    if len(tensors) < len(rows):
        assert lengths is None, "a row that is already hashed cannot be hashed without its padding"
        hashed = [
            [key.tobytes() for key in one]
            if isinstance(one, np.ndarray)
            else _hashes(_part_of(one, count))
            for one in rows
        ]
        return _joined(hashed, start, count)
    parts = [_part_of(tensor, count) for tensor in tensors]
    if lengths is not None:
        hashed = [
            _hashes_up_to(part, lengths, padded)
            if tensor.dim() > 1 and tensor.shape[1] == padded
            else _hashes(part)
            for tensor, part in zip(tensors, parts, strict=True)
        ]
        start += b"own length"
    else:
        if len(parts) > 1 and sum(part.shape[1] for part in parts) <= SMALL:
            parts = [np.concatenate(parts, axis=1)]
        hashed = [_hashes(part) for part in parts]
    return _joined(hashed, start, count)


def rows_hashed(tensor: Tensor) -> np.ndarray:
    """Hashes each row of a tensor. `row_keys` takes the result in place of the tensor.

    Args:
        tensor: Tensor whose rows are larger than `SMALL` bytes.

    Returns:
        Hashes as uint64, of shape (rows, 2).
    """
    return row_keys([tensor], [], len(tensor))


def device_hashes(rows: Sequence[Tensor], shared: Sequence[Tensor], count: int) -> list[np.ndarray]:
    """Hashes inputs on the devices that they are on, if these run behind the host.

    The host waits once for each device.

    Args:
        rows: Inputs whose first dimension counts rows.
        shared: Inputs that belong to the whole batch.
        count: Number of rows in the batch.

    Returns:
        Hashes of each input, first of `rows` and then of `shared`, as uint64 of shape (rows, 2) or
        (1, 2). `row_keys` takes them in place of the tensors.
    """
    hashes = [row_digests(one, count) for one in rows]
    hashes += [tensor_digest(bits_of(one)) for one in shared]
    copies = {
        device: HostCopy(torch.cat([one for one in hashes if one.device == device]))
        for device in {one.device for one in hashes}
    }
    found = {device: copy.get().numpy().view(np.uint64) for device, copy in copies.items()}
    result = []
    for one in hashes:
        there = found[one.device]
        result.append(there[: len(one)])
        found[one.device] = there[len(one) :]
    return result


def _joined(hashed: Sequence[Sequence[bytes]], start: bytes, count: int) -> np.ndarray:
    if len(hashed) == 1 and not start:
        digests = hashed[0]
    else:
        by_row = zip(*hashed, strict=True) if hashed else [()] * count
        digests = [xxhash.xxh3_128_digest(b"".join((start, *one))) for one in by_row]
    return np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(count, 2)


def batch_key(keys: np.ndarray) -> np.ndarray:
    """Returns the key of a whole batch, of shape (1, 2).

    Args:
        keys: Keys of its rows in their order, of shape (rows, 2).
    """
    digest = xxhash.xxh3_128_digest(np.ascontiguousarray(keys).data)
    return np.frombuffer(digest, dtype=np.uint64).reshape(1, 2)


# Small rows of several inputs are copied side by side and hashed in one call if they have at most
# so many bytes together: a call takes as long as hashing some hundred bytes.
SMALL = 4096


def _hashes(rows: np.ndarray) -> list[bytes]:
    width, flat = rows.shape[1], np.ascontiguousarray(rows).data.cast("B")
    digest = xxhash.xxh3_128_digest
    return [digest(flat[place : place + width]) for place in range(0, len(flat), width or 1)]


def _hashes_up_to(rows: np.ndarray, lengths: np.ndarray, padded: int) -> list[bytes]:
    width, flat = rows.shape[1], np.ascontiguousarray(rows).data.cast("B")
    step, digest = width // padded, xxhash.xxh3_128_digest
    return [
        digest(flat[row * width : row * width + int(length) * step])
        for row, length in enumerate(lengths)
    ]


def _part_of(tensor: Tensor, count: int) -> Any:
    return _bytes(tensor).reshape(count, -1)


def _bytes(tensor: Tensor) -> Any:
    return bits_of(tensor).cpu().numpy()
