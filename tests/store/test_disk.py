"""A disk that is full, fails or may not be written to: training goes on, and it is said once."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cachefreeze.store import Directory, Row
from cachefreeze.store.inspect import verify

from ..conftest import file_size_limit
from .harness import (
    ABOUT,
    CHUNK_ROWS,
    NAME,
    ROW,
    files_below,
    keys_of,
    read,
    read_again,
    rows_of,
    write,
)

COUNT = 10 * CHUNK_ROWS


def append_one_by_one(directory: Directory, count: int = COUNT) -> None:
    """Row after row, as many as there are, whatever the disk says."""
    rows = directory.rows(NAME, ROW, ABOUT)
    for number in range(count):
        rows.append(keys_of(np.array([number])), rows_of(np.array([number])))


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir", "pwrite"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("after", [0, 1, 7, 20])
def test_a_disk_that_fails_stops_the_writing_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, after: int
) -> None:
    directory = Directory(path, None)
    real: Callable[..., Any] = getattr(os, call)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        append_one_by_one(directory)
        directory.close()
    if calls <= after:
        assert directory.messages == []
        return
    (sentence,) = directory.messages
    assert sentence == f"no further rows are written to {path} ({os.strerror(number)})"
    found, messages = read_again(path, COUNT)
    assert messages == []
    assert found % CHUNK_ROWS == 0
    assert list(verify(path)) == []


def test_a_disk_that_is_full_in_the_middle_of_a_chunk_keeps_those_before(
    path: Path, real_chunks: None
) -> None:
    row = Row((256,), "float32")
    numbers = np.arange(100)
    write(path, numbers, row=row)
    directory = Directory(path, None)
    rows = directory.rows(NAME, row, ABOUT)
    with file_size_limit(100_000):
        new = np.arange(100, 9000)
        rows.append(keys_of(new), rows_of(new, row))
        directory.close()
    (sentence,) = directory.messages
    assert "File too large" in sentence
    assert not [file for file in files_below(path) if file.name.endswith(".partial")]
    directory = Directory(path, None)
    rows = directory.rows(NAME, row, ABOUT)
    assert len(rows) == 100
    assert read(rows, numbers).all()
    directory.close()


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_disk_that_cannot_be_read_loses_rows_and_raises_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    writing = Directory(path, None)
    writing.rows(NAME, ROW, ABOUT, codec).append(
        keys_of(np.arange(COUNT)), rows_of(np.arange(COUNT))
    )
    writing.close()
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    numbers = np.arange(COUNT)
    assert read(rows, numbers).all()
    for call in (os.preadv, os.pread):

        def failing(file: int, what: Any, offset: int, call: Any = call) -> Any:
            if os.readlink(f"/proc/self/fd/{file}").endswith("c.3.0.0"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(file, what, offset)

        monkeypatch.setattr(os, call.__name__, failing)
    good = read(rows, numbers)
    assert np.flatnonzero(~good).tolist() == list(range(3 * CHUNK_ROWS, 4 * CHUNK_ROWS))
    (sentence,) = directory.messages
    assert "Input/output error" in sentence
    monkeypatch.undo()
    assert read(rows, numbers).tolist() == good.tolist()
    directory.close()


def test_a_directory_that_may_only_be_read_is_read(path: Path, ordinary_user: None) -> None:
    write(path, np.arange(COUNT))
    folders = [path, *(one for one in path.rglob("*") if one.is_dir())]
    before = {file: file.read_bytes() for file in files_below(path)}
    for folder in folders:
        folder.chmod(0o555)
    for file in before:
        file.chmod(0o444)
    try:
        directory = Directory(path, 10**9)
        rows = directory.rows(NAME, ROW, ABOUT)
        assert read(rows, np.arange(COUNT)).all()
        new = np.arange(COUNT, 2 * COUNT)
        rows.append(keys_of(new), rows_of(new))
        directory.close()
        (sentence,) = directory.messages
        assert "cannot be written to (no permission to write" in sentence
        assert {file: file.read_bytes() for file in files_below(path)} == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_permission_that_is_lost_on_the_way_stops_the_writing(
    path: Path, ordinary_user: None
) -> None:
    write(path, np.arange(COUNT))
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    (path / NAME.hex()).chmod(0o555)
    try:
        new = np.arange(COUNT, 2 * COUNT)
        rows.append(keys_of(new), rows_of(new))
        directory.close()
        (sentence,) = directory.messages
        assert "Permission denied" in sentence
    finally:
        (path / NAME.hex()).chmod(0o755)
    assert read_again(path, 2 * COUNT) == (COUNT, [])


def test_a_directory_that_is_removed_while_it_is_used_raises_nothing(path: Path) -> None:
    write(path, np.arange(COUNT))
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    new = np.arange(COUNT, COUNT + CHUNK_ROWS)
    rows.append(keys_of(new), rows_of(new))
    while len(rows) < COUNT + CHUNK_ROWS:
        time.sleep(0.01)
        rows.refresh()
    shutil.rmtree(path)
    rows.refresh()
    assert not read(rows, np.arange(COUNT)).any()
    append_one_by_one(directory)
    rows.refresh()
    directory.close()
    (sentence,) = directory.messages
    assert "No such file" in sentence
