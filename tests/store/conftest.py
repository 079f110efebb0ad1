"""Small chunks, so that a few rows fill many."""

from pathlib import Path

import pytest

from cachefreeze.store import format as store_format

from .harness import CHUNK_ROWS


@pytest.fixture(autouse=True)
def _small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_chunks" not in request.fixturenames:
        monkeypatch.setattr(store_format, "CHUNK_ROWS", CHUNK_ROWS)


@pytest.fixture
def real_chunks() -> None:
    """Chunks of the size that users have."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Folder of a directory that is not there yet."""
    return tmp_path / "cache"
