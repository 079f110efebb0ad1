"""Hashes that a device computes: no two rows that differ have the same one."""

import itertools

import pytest
import torch

from cachefreeze.keys.device_digests import row_digests, tensor_digest
from cachefreeze.keys.device_watch import DeviceWatch, read


def distinct(digests: torch.Tensor) -> int:
    """Returns how many digests differ in both of their halves."""
    return min(len(set(digests[:, half].tolist())) for half in range(2))


def test_any_one_or_two_bits_of_a_row_change_both_halves_of_its_digest() -> None:
    words = 6
    pairs = list(itertools.combinations_with_replacement(range(32 * words), 2))
    masks = torch.zeros(1 + len(pairs), words, dtype=torch.int64)
    for row, (one, other) in enumerate(pairs, start=1):
        masks[row, one // 32] |= 1 << one % 32
        masks[row, other // 32] |= 1 << other % 32
    bits = torch.randn(words, generator=torch.Generator().manual_seed(0)).view(torch.int32)
    rows = (bits ^ masks.to(torch.int32)).view(torch.float32)
    assert distinct(row_digests(rows, len(rows))) == 1 + len(pairs)


def test_simple_changes_of_numbers_change_the_digest() -> None:
    x = torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    changed = [
        x, -x, x.abs(), x + 1, 2 * x, x.flip(1), x.roll(1, 1), x.roll(2, 1), torch.zeros_like(x),
        -torch.zeros_like(x), torch.ones_like(x), x.sort(1).values,
    ]  # fmt: skip
    assert distinct(torch.cat([row_digests(one, 1) for one in changed])) == len(changed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [0, 1, 3, 8, 13])
def test_a_row_has_the_same_digest_wherever_it_lies(dtype: torch.dtype, width: int) -> None:
    x = torch.arange(7 * (width + 1)).view(7, width + 1).to(dtype)
    whole = row_digests(x[:, 1:], 7)
    for row in range(7):
        assert torch.equal(row_digests(x[row : row + 1, 1:], 1)[0], whole[row])
    if width:
        assert distinct(whole) == 7


def test_rows_that_end_in_zeros_differ_from_shorter_ones() -> None:
    digests = [row_digests(torch.zeros(1, width, dtype=torch.uint8), 1) for width in range(40)]
    assert distinct(torch.cat(digests)) == 40


def test_large_tensors_are_hashed_in_pieces() -> None:
    bits = torch.zeros((1 << 23) * 2 + 77, dtype=torch.uint8)
    digests = [tensor_digest(bits)]
    for place in (0, (1 << 23) - 1, 1 << 23, len(bits) - 1):
        bits[place] = 1
        digests.append(tensor_digest(bits))
        bits[place] = 0
    assert distinct(torch.cat(digests)) == 5
    assert torch.equal(tensor_digest(bits), digests[0])


def test_a_watch_finds_a_change_of_one_bit_as_soon_as_it_has_hashed_the_tensor() -> None:
    tensors = [torch.zeros(size, dtype=torch.uint8) for size in (5, 4096, 100_000, 0)]
    watch = DeviceWatch(read(tensors))
    watch.ask()
    assert not watch.differs(wait=True)
    tensors[2][12_345] = 1
    watch.ask()
    assert not watch.differs(wait=True)  # it lies between the places that are compared
    found = []
    for _ in tensors:
        watch.hash_next()
        found.append(watch.differs(wait=True))
    assert found == [False, False, True, True]
