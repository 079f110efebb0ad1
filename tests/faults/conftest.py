"""Fixtures of the tests of faults."""

from collections.abc import Iterator

import pytest
import torch

from cachefreeze.cache import route


@pytest.fixture(autouse=True)
def every_share_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares are of measured times, and other processes may hold up any operation."""
    monkeypatch.setattr(route, "LEAST_SHARE", 0.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Has every test run on one thread: to the bit is promised for that."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
