"""Hashes of tensors on a device, computed there.

To hash rows of a GPU on the host, all their bytes would have to be copied back, and the host would
wait for them. Here, a row is read as words of 64 bits. Each word is mixed with its position, so
that every bit of it changes about half of the bits of the result, and the results are added up. The
mixing is the finaliser of MurmurHash3 (multiply, shift, exclusive or), with other numbers.

These hashes differ from the xxh3 of the same bytes, but depend on nothing but the bytes.
"""

import functools

import torch

from cachefreeze.keys.bits import bits_of

Tensor = torch.Tensor

_WORD = 8
# Odd numbers of 64 bits, as signed integers: multiples of the golden ratio and of square roots.
_GOLDEN, _FIRST, _SECOND, _THIRD = (
    -0x61C8864680B583EB,
    -0x40A7B892E31B1A47,
    -0x6B2FB644ECCEEE15,
    -0x0A5F3F8E0D2C4B91,
)
_LOW_32, _LOW_35 = (1 << 32) - 1, (1 << 35) - 1
# Bytes of a large tensor that are mixed at a time. Several copies of them exist for a moment.
_PIECE = 1 << 23


def row_digests(tensor: Tensor, count: int) -> Tensor:
    """Hashes each row of a tensor on the tensor's own device.

    Args:
        tensor: Tensor of any type, whose first dimension counts rows.
        count: Number of rows.

    Returns:
        Hashes on the same device, as int64 of shape (rows, 2).
    """
    return _mixed(bits_of(tensor).view(count, -1))


def tensor_digest(bits: Tensor) -> Tensor:
    """Hashes all bytes of a tensor on the tensor's own device.

    Args:
        bits: Bytes, as a tensor of one dimension.

    Returns:
        Hash on the same device, as int64 of shape (1, 2).
    """
    pieces = [_mixed(piece[None]) for piece in bits.split(_PIECE)]
    return pieces[0] if len(pieces) == 1 else row_digests(torch.cat(pieces, dim=1), 1)


def _mixed(rows: Tensor) -> Tensor:
    """Hashes rows of bytes, of shape (rows, bytes of a row)."""
    width = rows.shape[1]
    if missing := -width % _WORD if width else _WORD:
        rows = torch.nn.functional.pad(rows, (0, missing))
    elif rows.storage_offset() % _WORD:
        rows = rows.clone()
    words = rows.view(torch.int64)
    mixed = words ^ _places(words.shape[1], words.device)
    mixed.mul_(_FIRST)
    mixed ^= (mixed >> 32).bitwise_and_(_LOW_32)
    mixed.mul_(_SECOND)
    mixed ^= (mixed >> 29).bitwise_and_(_LOW_35)
    one = mixed.sum(1)
    mixed.mul_(_THIRD)
    mixed ^= (mixed >> 32).bitwise_and_(_LOW_32)
    # Rows that were filled up with zeros differ from those that end in zeros.
    return torch.stack([one, mixed.sum(1)], dim=1).add_(width)


@functools.lru_cache(maxsize=8)
def _places(width: int, device: torch.device) -> Tensor:
    """Returns a number for each position of a word, of which any two differ in many bits."""
    places = torch.arange(1, width + 1, dtype=torch.int64, device=device) * _GOLDEN
    places ^= (places >> 29) & _LOW_35
    return places.mul_(_FIRST)
