"""Runs that write and read numbered rows in an object store."""

import time
from pathlib import Path

import numpy as np

from cachefreeze.store import Directory, open_directory
from tests.store.harness import ABOUT, NAME, ROW, keys_of, read, rows_of


def opened(url: str, local: Path, max_bytes: int | None = None) -> Directory:
    directory = open_directory(url, max_bytes, local)
    assert directory is not None
    return directory


def write(url: str, local: Path, numbers: np.ndarray, max_bytes: int | None = None) -> list[str]:
    """Writes rows as one run. Returns what it says."""
    directory = opened(url, local, max_bytes)
    directory.rows(NAME, ROW, ABOUT).append(keys_of(numbers), rows_of(numbers))
    directory.close()
    return directory.messages


def found(url: str, local: Path, count: int, seconds: float = 10.0) -> tuple[int, list[str]]:
    """Returns how many of the first rows a new run finds, and what it says.

    It waits for all of them for some seconds. All rows that it finds are right."""
    directory = opened(url, local)
    rows, until = directory.rows(NAME, ROW, ABOUT), time.monotonic() + seconds
    good = read(rows, np.arange(count)).sum()
    while good < count and time.monotonic() < until:
        time.sleep(0.05)
        rows.refresh()
        good = read(rows, np.arange(count)).sum()
    directory.close()
    return int(good), directory.messages
