"""Fixtures of the cache's tests."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cachefreeze.cache import lazy_loading
from tests.cache.loading import ROWS, save_picture


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Has every test run on one thread: to the bit is promised for that."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_item_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items of tests are small, and how fast they load must decide nothing."""
    monkeypatch.setattr(lazy_loading, "_CHEAP", 0.0)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures that have not just been written."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(ROWS):
        save_picture(folder / f"{number:02d}.jpg", number)
    time.sleep(0.15)
    return folder
