"""Rows of one run are found by the next one, on another machine, through an object store."""

import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import ObjectStore

from cachefreeze.store import Directory, segment
from cachefreeze.store.format import JOURNAL, read_head
from cachefreeze.store.journal import read_lines
from cachefreeze.store.reading import read_chunk
from tests.store.harness import (
    ABOUT,
    CHUNK_ROWS,
    NAME,
    ROW,
    keys_of,
    read,
    read_again,
    rows_of,
    segments,
)
from tests.store.harness import write as write_folder
from tests.support.object_server import Proxy

from .harness import found, opened, write

SET = NAME.hex()
pytestmark = pytest.mark.usefixtures("small_chunks")


def test_another_machine_finds_all_rows(url: str, tmp_path: Path) -> None:
    assert write(url, tmp_path / "a", np.arange(100)) == []
    assert write(url, tmp_path / "a", np.arange(100, 130)) == []
    assert found(url, tmp_path / "b", 130) == (130, [])
    assert write(url, tmp_path / "c", np.arange(130, 140)) == []
    assert found(url, tmp_path / "b", 140) == (140, [])


def test_memory_and_files_are_object_stores_too(tmp_path: Path) -> None:
    for url in (f"memory://{uuid.uuid4()}", f"file://{tmp_path}/far"):
        locals_ = [tmp_path / f"{url[:4]}{number}" for number in range(2)]
        assert write(url, locals_[0], np.arange(50)) == []
        assert found(url, locals_[1], 50) == (50, [])


def test_a_warm_folder_asks_for_new_commits_only(url: str, proxy: Proxy, tmp_path: Path) -> None:
    write(url, tmp_path / "a", np.arange(100))
    proxy.requests.clear()
    directory = opened(url, tmp_path / "a")
    rows = directory.rows(NAME, ROW, ABOUT)
    assert [path.rsplit("/", 1)[-1] for _, path in proxy.requests] == [
        "cachefreeze.json",
        f"{len(list(_commits(tmp_path / 'a'))):08}",
    ]
    for _ in range(3):
        assert read(rows, np.arange(100)).all()
    directory.close()
    assert len(proxy.requests) == 2


def _commits(local: Path) -> list[bytes]:
    return (local / "remote" / SET).read_bytes().splitlines()


def test_rows_of_a_run_that_goes_on_are_found(url: str, tmp_path: Path) -> None:
    writer, reader = opened(url, tmp_path / "a"), opened(url, tmp_path / "b")
    theirs, ours = (one.rows(NAME, ROW, ABOUT) for one in (writer, reader))
    theirs.append(keys_of(np.arange(40)), rows_of(np.arange(40)))
    theirs.publish()
    for _ in range(100):
        threading.Event().wait(0.05)
        ours.refresh()
        if len(ours) == 40:
            break
    assert read(ours, np.arange(40)).all()
    writer.close()
    reader.close()


def test_zarr_alone_reads_a_segment_in_the_store(url: str, server: int, tmp_path: Path) -> None:
    from obstore.store import from_url

    write(url, tmp_path / "a", np.arange(20))
    (folder,) = segments(tmp_path / "a")
    endpoint = f"http://127.0.0.1:{server}"
    store = from_url(
        f"{url}/{SET}/{folder.name}", endpoint=endpoint, client_options={"allow_http": True}
    )
    group = zarr.open_group(ObjectStore(store, read_only=True), mode="r")
    assert group["values"][:].tobytes() == rows_of(np.arange(20)).tobytes()
    assert (group["keys"][:].view("uint64") == keys_of(np.arange(20))).all()


KILLED = """
import os, sys, numpy as np
from pathlib import Path
from cachefreeze.store import bucket, format
from tests.objects.harness import write
format.CHUNK_ROWS = {chunk_rows}
bucket.Bucket.commit = lambda *words: os._exit(7)
write({url!r}, Path({local!r}), np.arange(20))
"""


def test_a_writer_that_is_killed_before_its_commit_loses_nothing(url: str, tmp_path: Path) -> None:
    code = KILLED.format(url=url, local=str(tmp_path / "a"), chunk_rows=CHUNK_ROWS)
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, check=False)
    assert ended.returncode == 7
    assert found(url, tmp_path / "b", 20, 0) == (0, []), "its chunks do not count"
    good, _ = found(url, tmp_path / "a", 20, 0)
    assert good >= CHUNK_ROWS
    assert found(url, tmp_path / "b", good) == (good, []), "the next run there has sent them"


def test_of_two_writers_of_one_segment_one_wins(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directories = [opened(url, tmp_path / name) for name in "ab"]
    same = uuid.uuid4()
    with monkeypatch.context() as patch:
        patch.setattr(segment.uuid, "uuid4", lambda: same)
        for number, one in enumerate(directories):
            numbers = np.arange(24) + 1000 * number
            one.rows(NAME, ROW, ABOUT).append(keys_of(numbers), rows_of(numbers))
        closing = [threading.Thread(target=one.close) for one in directories]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()
    told = [sentence for one in directories for sentence in one.messages]
    assert 1 <= len(told) <= 2
    assert all("has another writer" in sentence for sentence in told)
    reader = opened(url, tmp_path / "c")
    rows = reader.rows(NAME, ROW, ABOUT)
    good = [int(read(rows, np.arange(24) + start).sum()) for start in (0, 1000)]
    assert sorted(good)[0] == 0
    assert sum(good) <= 24
    reader.close()


def test_a_forked_process_makes_no_request(url: str, proxy: Proxy, tmp_path: Path) -> None:
    write(url, tmp_path / "a", np.arange(40))
    directory = opened(url, tmp_path / "a")
    rows = directory.rows(NAME, ROW, ABOUT)
    proxy.requests.clear()
    if not (pid := os.fork()):
        try:
            began = time.monotonic()
            good = read(rows, np.arange(40)).all()
            rows.refresh()
            directory.rows(bytes(16), ROW, ABOUT).append(keys_of([1]), rows_of([1]))
            directory.close()
            os._exit(0 if good and time.monotonic() - began < 0.5 else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    assert proxy.requests == []
    numbers = np.arange(40, 60)
    rows.append(keys_of(numbers), rows_of(numbers))
    directory.close()
    assert found(url, tmp_path / "b", 60) == (60, []), "the parent goes on"


def test_a_run_in_a_forked_process_goes_on_without_the_store(
    url: str, proxy: Proxy, tmp_path: Path
) -> None:
    write(url, tmp_path / "a", np.arange(20))
    proxy.requests.clear()
    if not (pid := os.fork()):
        try:
            began = time.monotonic()
            good, told = found(url, tmp_path / "b", 20, 0)
            right = good == 0 and "forked" in told[0] and time.monotonic() - began < 2
            os._exit(0 if right else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0


WRITES = """
import numpy as np
from pathlib import Path
from cachefreeze.store import format
from tests.objects.harness import write
format.CHUNK_ROWS = {chunk_rows}
numbers = np.arange({start}, {start} + 100)
for part in np.split(numbers, 5):
    assert write({url!r}, Path({local!r}), part) == []
"""


def test_processes_share_a_local_folder(url: str, tmp_path: Path) -> None:
    root, local = Path(__file__).parents[2], str(tmp_path / "a")
    codes = [
        WRITES.format(url=url, local=local, chunk_rows=CHUNK_ROWS, start=start)
        for start in (0, 100, 50)
    ]
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=root) for code in codes]
    assert [one.wait() for one in running] == [0, 0, 0]
    assert found(url, tmp_path / "a", 200) == (200, [])
    assert found(url, tmp_path / "b", 200) == (200, [])


def test_only_what_the_store_has_is_evicted(
    url: str, proxy: Proxy, tmp_path: Path, hasty: None
) -> None:
    limit = 12_000  # a chunk and its metadata take a third of it
    proxy.fail("503", "/values/")
    told = write(url, tmp_path / "a", np.arange(30), limit)
    assert any("30 rows are not in" in sentence for sentence in told)
    for start in (100, 200, 300):
        write(url, tmp_path / "a", np.arange(start, start + 30), limit)
    assert found(url, tmp_path / "a", 30)[0] == 30, "they are nowhere else"
    proxy.fail(None)
    write(url, tmp_path / "a", np.arange(400, 430), limit)
    for start in (500, 600, 700):
        told = write(url, tmp_path / "a", np.arange(start, start + 30), limit)
        assert all("has no room" in sentence for sentence in told), "others made room"
    assert len(segments(tmp_path / "a")) < 8
    assert found(url, tmp_path / "b", 30) == (30, [])


def test_a_folder_without_room_serves_what_fits_and_sends_what_is_new(
    url: str, proxy: Proxy, tmp_path: Path
) -> None:
    write(url, tmp_path / "a", np.arange(800))
    proxy.requests.clear()
    directory = opened(url, tmp_path / "b", 44_000)
    rows = directory.rows(NAME, ROW, ABOUT)
    until = time.monotonic() + 10
    while not any("keys/c.99.0" in path for _, path in proxy.requests):
        assert time.monotonic() < until
        time.sleep(0.02)
    rows.refresh()
    numbers = np.arange(808)
    missing = numbers[rows.find(keys_of(numbers)) < 0]
    assert 0 < read(rows, numbers).sum() < 800
    rows.append(keys_of(missing[-24:]), rows_of(missing[-24:]))
    directory.close()
    assert len(directory.messages) == 1
    assert "has no room" in directory.messages[0]
    sent = [path for method, path in proxy.requests if method == "PUT" and "values/c" in path]
    assert len(sent) == 1, "of 24 rows, 8 are new"
    assert found(url, tmp_path / "c", 808) == (808, [])


def test_rows_that_were_wrong_are_not_fetched(url: str, tmp_path: Path) -> None:
    write(url, tmp_path / "a", np.arange(40))
    directory = opened(url, tmp_path / "b")
    directory.rows(NAME, ROW, ABOUT).forget()
    directory.close()
    assert found(url, tmp_path / "c", 40, 0) == (0, [])
    assert write(url, tmp_path / "c", np.arange(50)) == []
    assert found(url, tmp_path / "d", 50) == (50, [])


def test_a_store_that_was_emptied_gets_all_rows_again(
    url: str, tmp_path: Path, server: int
) -> None:
    from obstore.store import from_url

    write(url, tmp_path / "a", np.arange(40))
    options = {"allow_http": True}
    store = from_url(url, endpoint=f"http://127.0.0.1:{server}", client_options=options)
    store.delete([one["path"] for page in store.list() for one in page])
    assert found(url, tmp_path / "a", 40) == (40, [])
    assert found(url, tmp_path / "b", 40) == (40, [])


def test_rows_that_were_on_their_way_are_not_sent_again(
    url: str, proxy: Proxy, tmp_path: Path, hasty: None
) -> None:
    write(url, tmp_path / "a", np.arange(80))
    proxy.fail("slow")
    proxy.requests.clear()
    directory = opened(url, tmp_path / "b")
    rows = directory.rows(NAME, ROW, ABOUT)
    missing = np.arange(100)[rows.find(keys_of(np.arange(100))) < 0]
    assert len(missing) > 24
    rows.append(keys_of(missing), rows_of(missing))
    for _ in range(200):
        if any("/commits/" in path and method == "PUT" for method, path in proxy.requests):
            break
        threading.Event().wait(0.05)
    proxy.fail(None)
    directory.close()
    assert directory.messages == []
    new = [path for method, path in proxy.requests if method == "PUT" and "values/c" in path]
    assert 3 <= len(new) <= 4, "chunks of which some rows are new"
    assert found(url, tmp_path / "c", 100) == (100, [])
    assert found(url, tmp_path / "b", 100) == (100, [])


def test_a_chunk_follows_the_one_before_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", np.arange(20))
    (folder,) = segments(tmp_path / "a")
    head = read_head(folder, SET)
    chunks = read_lines(folder / JOURNAL, folder.name, 0, CHUNK_ROWS)
    contents = [read_chunk(folder, head.layout, chunk) for chunk in chunks]
    Directory(tmp_path / "b", None).close()
    other = tmp_path / "b" / SET / folder.name
    # As when another process removes a segment while it is fetched.
    assert not segment.add_chunk(other, head, chunks[1], contents[1])
    for chunk, content in zip(chunks, contents, strict=True):
        assert segment.add_chunk(other, head, chunk, content)
        assert segment.add_chunk(other, head, chunk, content), "twice is once"
    assert read_again(tmp_path / "b", 20) == (20, [])


def test_small_files_are_shared_between_machines(url: str, tmp_path: Path) -> None:
    def agreed(local: str, content: bytes, right: bool = True) -> bytes | None:
        directory = opened(url, tmp_path / local)
        found = directory.agree("x.json", content, lambda other: right)
        directory.close()
        return found

    assert agreed("a", b"1") == b"1"
    assert agreed("b", b"2") == b"1"
    assert agreed("b", b"3") == b"1"
    assert agreed("c", b"4", right=False) == b"4"
