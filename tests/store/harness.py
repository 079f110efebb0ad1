"""Rows that tell by themselves whether they are right, and processes that write them."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cachefreeze.store import Directory, Row, Rows

NAME = bytes(range(16))
ROW = Row((3, 4), "float32")
CHUNK_ROWS = 8
ABOUT = {"model": "a small one", "modules": ["stem", "blocks.0"]}


def keys_of(numbers: np.ndarray) -> np.ndarray:
    """Keys of numbered rows: no two are equal, and some share their first half."""
    numbers = np.asarray(numbers, dtype=np.uint64)
    return np.stack([(numbers // np.uint64(2)) * np.uint64(0x9E3779B97F4A7C15), numbers], axis=1)


def rows_of(numbers: np.ndarray, row: Row = ROW) -> np.ndarray:
    """Numbered rows, as bytes. Each byte depends on the number."""
    numbers = np.asarray(numbers, dtype=np.uint64)
    wide = -(-row.nbytes // 8)
    mixed = (numbers[:, None] + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)
    mixed = mixed * (2 * np.arange(wide, dtype=np.uint64) + np.uint64(1))
    return mixed.view(np.uint8).reshape(len(numbers), 8 * wide)[:, : row.nbytes].copy()


def write(path: Path, numbers: np.ndarray, name: bytes = NAME, row: Row = ROW) -> list[str]:
    """Writes rows into a directory, as one run. Returns what it says."""
    directory = Directory(path, None)
    directory.rows(name, row, ABOUT).append(keys_of(numbers), rows_of(numbers, row))
    directory.close()
    return directory.messages


def read(rows: Rows, numbers: np.ndarray) -> np.ndarray:
    """Returns which of the rows are there. Those that are there must be right."""
    places = rows.find(keys_of(numbers))
    out = np.zeros((len(numbers), rows.row.nbytes), dtype=np.uint8)
    good = rows.read(places, out)
    assert (places >= 0)[good].all()
    assert (out[good] == rows_of(numbers, rows.row)[good]).all(), "a wrong row was given out"
    return good


def read_again(path: Path, count: int, name: bytes = NAME) -> tuple[int, list[str]]:
    """Returns how many of the first rows a new run finds, and what it says."""
    directory = Directory(path, None)
    good = read(directory.rows(name, ROW, ABOUT), np.arange(count))
    directory.close()
    return int(good.sum()), directory.messages


def segments(path: Path, name: bytes = NAME) -> list[Path]:
    """Folders of the segments of a set."""
    folder = path / name.hex()
    return sorted(one for one in folder.iterdir() if not one.name.startswith("."))


def files_below(path: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(one for one in path.rglob("*") if one.is_file())


def fork(function: Callable[[], object]) -> int:
    """Runs a function in a forked process. Returns the process's number.

    A new python would import torch first, which takes longer than these tests.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    signal.alarm(60)  # when the test that waits for it has failed
    try:
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Returns the exit code of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def forked(*functions: Callable[[], object]) -> Iterator[list[int]]:
    """Runs functions in processes of their own; all of them must succeed."""
    pids = [fork(function) for function in functions]
    try:
        yield pids
    finally:
        codes = [wait(pid) for pid in pids]
    assert codes == [0] * len(codes)
