"""Rows in memory and on the disk below it: where they are read from, and what that costs."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cachefreeze.cache.entries import Entries
from cachefreeze.cache.row_table import RowTable
from cachefreeze.lineage import devices
from cachefreeze.store import Directory
from cachefreeze.store import format as store_format
from tests.support.simulated_device import SimulatedQueue

NAME, WIDTH, CHUNK_ROWS = bytes(16), 12, 8
COUNT = 5 * CHUNK_ROWS
VALUES = torch.randn(COUNT, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_format, "CHUNK_ROWS", CHUNK_ROWS)


def keys_of(numbers: np.ndarray) -> np.ndarray:
    return np.stack([numbers * 977, numbers], axis=1).astype(np.uint64)


def opened(path: Path, max_bytes: int, values: torch.Tensor = VALUES) -> tuple[Entries, RowTable]:
    entries = Entries(max_bytes, Directory(path, None))
    table = entries.open(NAME, (values.shape[1],), values.dtype, torch.device("cpu"), {})
    assert table is not None
    return entries, table


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A directory that an earlier run has left."""
    entries, _ = opened(tmp_path / "cache", 0)
    assert entries.write(NAME, keys_of(np.arange(COUNT)), VALUES) == COUNT
    entries.close()
    return tmp_path / "cache"


def read(entries: Entries, table: RowTable, numbers: np.ndarray) -> torch.Tensor | None:
    keys = keys_of(numbers)
    return entries.read(NAME, keys, table.find(keys))


def test_a_row_that_is_read_from_the_disk_brings_its_chunk_into_memory(path: Path) -> None:
    entries, table = opened(path, 1 << 20)
    assert torch.equal(read(entries, table, np.array([3])), VALUES[[3]])
    assert len(table) == CHUNK_ROWS
    # What is in memory is not read again.
    (chunk,) = path.glob(f"{NAME.hex()}/*/values/c.0.0")
    chunk.write_bytes(b"")
    assert torch.equal(read(entries, table, np.arange(CHUNK_ROWS)), VALUES[:CHUNK_ROWS])
    entries.close()
    assert entries.messages == []


def test_no_more_comes_into_memory_than_has_room(path: Path) -> None:
    chunk_bytes = CHUNK_ROWS * (VALUES[0].nbytes + 16) + 8
    entries, table = opened(path, 2 * chunk_bytes + 4000)
    everything = np.random.default_rng(0).permutation(COUNT)
    for _ in range(3):
        assert torch.equal(read(entries, table, everything), VALUES[everything])
        assert 0 < len(table) < COUNT
        assert entries.nbytes <= entries.max_bytes
    entries.close()


def test_without_any_room_all_rows_come_from_the_files(path: Path) -> None:
    entries, table = opened(path, 0)
    assert torch.equal(read(entries, table, np.arange(COUNT)), VALUES)
    assert len(table) == 0
    entries.close()


def test_rows_in_memory_and_rows_in_files_make_one_batch(path: Path) -> None:
    entries, table = opened(path, 1 << 20)
    read(entries, table, np.array([0]))
    entries.max_bytes = 0
    mixed = np.array([COUNT - 1, 1, CHUNK_ROWS, 0])
    assert torch.equal(read(entries, table, mixed), VALUES[mixed])
    entries.close()


def test_of_a_damaged_chunk_no_row_comes_into_memory(path: Path) -> None:
    (chunk,) = path.glob(f"{NAME.hex()}/*/values/c.1.0")
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    entries, table = opened(path, 1 << 20)
    assert read(entries, table, np.arange(COUNT)) is None
    good = np.setdiff1d(np.arange(COUNT), np.arange(CHUNK_ROWS, 2 * CHUNK_ROWS))
    assert torch.equal(read(entries, table, good), VALUES[good])
    assert len(table) == len(good)
    assert (table.find(keys_of(np.arange(CHUNK_ROWS, 2 * CHUNK_ROWS))) == -1).all()
    entries.close()
    (sentence,) = entries.messages
    assert "c.1.0 has a wrong checksum" in sentence


def test_rows_that_two_runs_wrote_come_into_memory_once(path: Path) -> None:
    first, _ = opened(path, 0)
    second, _ = opened(path, 0)
    new = torch.randn(CHUNK_ROWS, WIDTH)
    for entries in (first, second):
        entries.write(NAME, keys_of(np.arange(COUNT, COUNT + CHUNK_ROWS)), new)
    first.close()
    second.close()
    entries, table = opened(path, 1 << 20)
    numbers = np.arange(COUNT + CHUNK_ROWS)
    assert torch.equal(read(entries, table, numbers), torch.cat([VALUES, new]))
    assert len(table) == len(numbers)
    entries.close()


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_rows_that_are_read_ahead_are_those_that_are_read_later(
    path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = torch.randn(3 * CHUNK_ROWS, 1024)
    name = bytes([7] * 16)
    writing = Entries(0, Directory(path, None), codec)
    assert writing.open(name, (1024,), wide.dtype, torch.device("cpu"), {}) is not None
    writing.write(name, keys_of(np.arange(len(wide))), wide)
    writing.close()
    advised: list[tuple[str, int, int]] = []

    def advise(file: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        advised.append((Path(os.readlink(f"/proc/self/fd/{file}")).name, start, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    entries = Entries(0, Directory(path, None))
    table = entries.open(name, (1024,), wide.dtype, torch.device("cpu"), {})
    assert table is not None
    some = np.array([2 * CHUNK_ROWS + 1, 3, 5])
    entries.prefetch(name, table.find(keys_of(some)))
    # A chunk that was not read yet is read as a whole.
    assert advised == [("c.2.0", 0, 0), ("c.0.0", 0, 0)]
    entries.read(name, keys_of(some), table.find(keys_of(some)))
    advised.clear()
    entries.prefetch(name, table.find(keys_of(some)))
    assert [chunk for chunk, _, _ in advised] == ["c.2.0", "c.0.0", "c.0.0"]
    if codec == "raw":
        assert [(start, length) for _, start, length in advised] == [
            (4096, 4096), (3 * 4096, 4096), (5 * 4096, 4096)
        ]  # fmt: skip
    # Unknown rows, a chunk that is gone, and rows in memory are left out.
    for chunk in path.glob(f"{name.hex()}/*/values/c.*"):
        chunk.unlink()
    advised.clear()
    entries.prefetch(name, table.find(keys_of(np.array([900, 3, CHUNK_ROWS]))))
    entries.prefetch(b"another", table.find(keys_of(some)))
    assert all(chunk.startswith("c.0.0") for chunk, _, _ in advised)
    entries.close()


def test_rows_in_memory_are_not_read_ahead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries, table = opened(path, 1 << 20)
    read(entries, table, np.arange(COUNT))
    monkeypatch.setattr(os, "posix_fadvise", None)
    entries.prefetch(NAME, table.find(keys_of(np.arange(COUNT))))
    entries.close()


def test_rows_of_a_gpu_take_a_quarter_of_its_free_memory_and_the_rest_is_in_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(devices.QUEUES, "cpu", SimulatedQueue(7))
    free = 4 * 10 * VALUES[0].nbytes
    monkeypatch.setattr("cachefreeze.cache.entries.free_device_memory", lambda device: free)
    for _ in range(2):  # the second time from disk
        entries, table = opened(tmp_path / "cache", 1 << 20)
        for some in np.array_split(np.arange(COUNT), 5):
            entries.write(NAME, keys_of(some), VALUES[some])
        assert torch.equal(read(entries, table, np.arange(COUNT)), VALUES)
        assert (len(table), table.rows_on_device) == (COUNT, 10)
        # Another kind of value has what is left.
        assert entries.write(b"other", keys_of(np.arange(3)), torch.zeros(3, 5)) == 3
        other = entries.table(b"other")
        assert other is not None
        assert (len(other), other.rows_on_device) == (3, 0)
        entries.close()
