"""A server of objects for all tests, a proxy for each, and small chunks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefreeze.store import format as store_format
from cachefreeze.store import mirror, objects
from tests.store.harness import CHUNK_ROWS
from tests.support.object_server import BUCKET, Proxy, environment, moto


@pytest.fixture(scope="session")
def server() -> Iterator[int]:
    pytest.importorskip("obstore")
    with moto() as port:
        yield port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    one = Proxy(server)
    for name, value in environment(one.port).items():
        monkeypatch.setenv(name, value)
    yield one
    one.close()
    listings = [path for method, path in one.requests if method == "GET" and "?" in path]
    assert not listings, "nothing is listed in the path of training"


@pytest.fixture
def url(proxy: Proxy, tmp_path: Path) -> str:
    """URL that no other test uses."""
    return f"s3://{BUCKET}/{tmp_path.name}/cache"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of so few rows that a test has many."""
    monkeypatch.setattr(store_format, "CHUNK_ROWS", CHUNK_ROWS)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests and waits that end early, so that tests of faults do."""
    monkeypatch.setattr(objects, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(mirror, "START_SECONDS", 1.5)
    monkeypatch.setattr(mirror, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(mirror, "CLOSE_SECONDS", 2.0)
    monkeypatch.setattr(mirror, "SILENT_SECONDS", 1.5)
    monkeypatch.setattr(mirror, "FAILED_CLOSE_SECONDS", 1.0)
