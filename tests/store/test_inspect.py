"""What lies in a directory is told, also when something is missing or goes meanwhile."""

import os
import time
from math import inf
from pathlib import Path

import numpy as np
import pytest

from cachefreeze.store import inspect as store_inspect
from cachefreeze.store.budget import disk_bytes
from cachefreeze.store.format import JOURNAL, USED
from cachefreeze.store.inspect import inspect, prune, verify
from cachefreeze.store.locks import refuse, remove

from .harness import NAME, segments, write


def test_a_segment_that_goes_while_somebody_looks_is_no_problem(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, np.arange(20))
    write(path, np.arange(20, 25))
    gone, left = segments(path)

    def count_and_remove(folder: Path) -> int:
        nbytes = disk_bytes(folder)
        if folder == gone:
            remove(folder)
        return nbytes

    monkeypatch.setattr(store_inspect, "disk_bytes", count_and_remove)
    (report,) = inspect(path)
    assert (report.problems, report.segments) == ([], 1)
    assert report.nbytes == disk_bytes(left)


def test_a_segment_without_a_journal_is_named_in_a_sentence(path: Path) -> None:
    write(path, np.arange(20))
    (segment,) = segments(path)
    (segment / JOURNAL).unlink()
    sentence = f"{segment}/keys/journal cannot be read (No such file or directory)"
    (report,) = inspect(path)
    assert (report.problems, report.segments, report.rows) == ([sentence], 1, 0)
    assert list(verify(path)) == [sentence]


def test_removed_rows_are_counted_by_set(path: Path) -> None:
    write(path, np.arange(20))
    write(path, np.arange(20, 25))
    write(path, np.arange(7), name=bytes(16))
    for segment in (*segments(path), *segments(path, bytes(16))):
        os.utime(segment / USED, (time.time() - 1000,) * 2)
    write(path, np.arange(3), name=bytes(16))
    pruned = prune(path, 500)
    assert pruned.rows == {NAME.hex(): 25, bytes(16).hex(): 7}
    assert pruned.segments == 3


def test_only_wrong_rows_go_where_no_age_is_too_old(path: Path) -> None:
    write(path, np.arange(20))
    write(path, np.arange(20, 25))
    wrong, right = segments(path)
    for segment in (wrong, right):
        os.utime(segment / USED, (0, 0))
    assert refuse(wrong, "wrong")
    assert prune(path, inf).segments == 1
    assert segments(path) == [right]
