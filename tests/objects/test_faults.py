"""Faults of an object store: nothing wrong is served, one line says so, and nobody waits long."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cachefreeze.errors import UserError
from cachefreeze.store import Row, objects, open_directory
from cachefreeze.store.commits import Record, content_of, parse
from cachefreeze.store.format import Layout, metadata
from cachefreeze.store.journal import Chunk
from tests.store.harness import ABOUT, NAME, ROW, keys_of, rows_of, segments
from tests.support.object_server import FAULTS, SLOW_SECONDS, Proxy, ask

from .harness import found, opened, write

pytestmark = pytest.mark.usefixtures("small_chunks", "hasty")
# Faults that a client cannot tell from a wrong address or wrong credentials at its first request.
AT_FIRST = ("missing", "expired")


@pytest.mark.parametrize("where", ["all", "commits", "values"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_rows_and_never_serves_wrong_ones(
    url: str, proxy: Proxy, tmp_path: Path, fault: str, where: str
) -> None:
    write(url, tmp_path / "a", np.arange(40))
    if where == "all":
        if fault in AT_FIRST:
            pytest.skip("a sentence at the start, which another test reads")
        proxy.fail(fault)
    else:
        proxy.fail(fault, where, methods="GET")
    began = time.monotonic()
    good, told = found(url, tmp_path / "b", 40, 0)
    seconds = time.monotonic() - began
    assert seconds < 6
    if fault == "slow":
        assert told == []
    elif fault == "missing" and where == "commits":
        assert (good, told) == (0, []), "a commit that is missing is one that is not there yet"
    else:
        assert good == 0
        assert len(told) == 1
    proxy.fail(None)
    # A run that is told of damage does not ask for the same chunks again. The next one does.
    assert found(url, tmp_path / "b", 40) == (40, [])


@pytest.mark.parametrize("fault", ["cut", "500", "503", "missing", "expired", "stalled"])
def test_rows_that_cannot_be_sent_are_sent_by_the_next_run(
    url: str, proxy: Proxy, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "REQUEST_SECONDS", 30.0)  # the end of a run does not wait for it
    directory = opened(url, tmp_path / "a")
    rows = directory.rows(NAME, ROW, ABOUT)
    proxy.fail(fault, methods="PUT")
    rows.append(keys_of(np.arange(40)), rows_of(np.arange(40)))
    began = time.monotonic()
    directory.close()
    assert time.monotonic() - began < 6
    assert "40 rows are not in" in directory.messages[-1]
    assert len(directory.messages) <= 2
    proxy.fail(None)
    assert found(url, tmp_path / "b", 40, 0) == (0, [])
    assert found(url, tmp_path / "a", 40) == (40, [])
    assert found(url, tmp_path / "b", 40) == (40, [])


def test_rows_come_once_the_store_works_again(url: str, proxy: Proxy, tmp_path: Path) -> None:
    write(url, tmp_path / "a", np.arange(40))
    directory = opened(url, tmp_path / "b")
    proxy.fail("503")
    rows = directory.rows(NAME, ROW, ABOUT)
    assert len(rows) == 0
    proxy.fail(None)
    until = time.monotonic() + 10
    while len(rows) < 40 and time.monotonic() < until:
        time.sleep(0.05)
        rows.refresh()
    assert len(rows) == 40
    directory.close()
    assert len(directory.messages) == 1


def test_a_store_that_fails_is_asked_ever_less_often(
    url: str, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.fail("503")
    directory = opened(url, tmp_path / "a")
    rows = directory.rows(NAME, ROW, ABOUT)
    proxy.requests.clear()
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        rows.refresh()
        time.sleep(0.01)
    assert 1 <= len(proxy.requests) <= 6
    directory.close()


def test_a_chunk_that_is_damaged_here_is_not_sent(url: str, proxy: Proxy, tmp_path: Path) -> None:
    proxy.fail("503", methods="PUT")
    write(url, tmp_path / "a", np.arange(40))
    proxy.fail(None)
    (folder,) = segments(tmp_path / "a")
    damaged = folder / "values" / "c.1.0.0"
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    good, told = found(url, tmp_path / "a", 40, 1)
    assert good == 32
    assert len(told) == 2, "whoever sends it and whoever reads it"
    assert all("values/c.1.0.0" in sentence for sentence in told)
    assert found(url, tmp_path / "b", 40, 1) == (32, [])


def test_damage_at_rest_costs_its_chunk_only(
    url: str, server: int, proxy: Proxy, tmp_path: Path
) -> None:
    write(url, tmp_path / "a", np.arange(40))
    (values,) = [path for _, path in proxy.requests if path.endswith("values/c.1.0.0")]
    assert ask(server, "PUT", values, b"x" * 100)[0] == 200
    good, told = found(url, tmp_path / "b", 40, 1)
    assert good == 32
    assert len(told) == 1
    assert "values/c.1.0.0" in told[0]
    assert write(url, tmp_path / "b", np.arange(8, 16)) != [], "the next run tries again"
    assert found(url, tmp_path / "c", 40)[0] == 40, "rows that were computed again are elsewhere"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3:/rows/x", "begins with one of"),
        ("ftp://rows/x", "begins with one of"),
        ("s3://", "names no bucket"),
        ("s3://rows/../x", "dots"),
        ("file://x", "file:///"),
        ("s3://no-such-bucket/x", "create it first"),
        ("az://rows/x", "AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
def test_a_wrong_url_is_one_sentence(proxy: Proxy, tmp_path: Path, url: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        open_directory(url, None, tmp_path / "a")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", AT_FIRST)
def test_credentials_that_do_not_work_are_one_sentence(
    url: str, proxy: Proxy, tmp_path: Path, fault: str
) -> None:
    proxy.fail(fault)
    with pytest.raises(UserError) as error:
        open_directory(url, None, tmp_path / "a")
    words = "create it first" if fault == "missing" else "credentials have expired"
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_no_credentials_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="there are no credentials"):
        open_directory("s3://rows/x", None, tmp_path / "a")


def test_a_missing_obstore_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UserError, match="pip install 'cachefreeze"):
        open_directory("memory://x", None, tmp_path / "a")


def test_a_local_folder_belongs_to_one_store(tmp_path: Path) -> None:
    opened("memory://one", tmp_path / "a").close()
    with pytest.raises(UserError, match="copies of memory://one: give another"):
        opened("memory://two", tmp_path / "a")
    with pytest.raises(UserError, match="leave it out"):
        open_directory(tmp_path / "b", None, tmp_path / "a")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 100,
        b"../../../../../../../../../../etc0" + b" 00000000 0008 00000000 00000000 00000000\n",
        b"0" * 32 + b" 00000000 0008 00000000 00000000 00000000\n",
        b"0" * 32 + b" removed 00000000\n",
        (b"0" * 32 + b" removed 00000000\n") * 1000,
    ],
)
def test_a_commit_that_cachefreeze_did_not_write_says_nothing(content: bytes) -> None:
    assert parse(content) is None


def test_a_commit_that_is_cut_anywhere_says_nothing() -> None:
    records = [Record("0" * 32, Chunk(number, 8, 1, 2)) for number in range(3)]
    content = content_of(records)
    assert parse(content) == records
    assert all(parse(content[:end]) is None for end in range(len(content)))
    lines = content.splitlines(keepends=True)
    assert parse(b"".join(lines[1:])) is None


@pytest.mark.parametrize("said", ["dims", "set", "about"])
def test_metadata_of_a_stranger_are_not_read(
    url: str, server: int, proxy: Proxy, tmp_path: Path, said: str
) -> None:
    write(url, tmp_path / "a", np.arange(40))
    (head,) = {path for _, path in proxy.requests if path.count("/") == 6 and "zarr.json" in path}
    content = ask(server, "GET", head)[1].decode()
    large = metadata(NAME.hex(), Layout.of(Row((2**29,), "float32")), ABOUT, 0)["zarr.json"]
    wrong, words = {
        "dims": (large, "1 GiB"),
        "set": (content.replace(NAME.hex(), "../../x"), "another set"),
        "about": ("[" * 10**6, "not written by cachefreeze"),
    }[said]
    assert wrong != content
    assert ask(server, "PUT", head, wrong.encode())[0] == 200
    good, told = found(url, tmp_path / "b", 40, 0)
    assert good == 0
    assert len(told) == 1
    assert words in told[0]


def test_a_slow_store_does_not_hold_a_run_up(url: str, proxy: Proxy, tmp_path: Path) -> None:
    write(url, tmp_path / "a", np.arange(200))
    proxy.fail("slow")
    directory = opened(url, tmp_path / "b")
    began = time.monotonic()
    rows = directory.rows(NAME, ROW, ABOUT)
    for _ in range(20):
        rows.refresh()
    assert time.monotonic() - began < 0.5 + SLOW_SECONDS
    directory.close()
