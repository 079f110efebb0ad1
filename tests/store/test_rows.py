"""Rows that are appended come back, by plain zarr too, and whoever wrote them."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachefreeze.errors import UserError
from cachefreeze.store import Directory, Row
from cachefreeze.store import reading as store_reading

from .harness import (
    ABOUT,
    CHUNK_ROWS,
    NAME,
    ROW,
    forked,
    keys_of,
    read,
    read_again,
    rows_of,
    segments,
    write,
)

TYPES = ("bool", "uint8", "int64", "float16", "float32", "float64", "complex64", "bfloat16")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dims", [(), (7,), (2, 3, 5)])
def test_plain_zarr_opens_a_segment_and_finds_the_same_rows(
    path: Path, dims: tuple[int, ...], dtype: str
) -> None:
    row = Row(dims, dtype)
    numbers = np.arange(19)
    rows = rows_of(numbers, row)
    if dtype == "bool":
        rows &= 1
    directory = Directory(path, None)
    directory.rows(NAME, row, ABOUT).append(keys_of(numbers), rows)
    directory.close()
    (folder,) = segments(path)
    group = zarr.open_group(folder, mode="r")
    assert dict(group.arrays()).keys() == {"values", "keys"}  # and no warning of other files
    values = group["values"]
    assert values.shape == (19, *dims)
    assert values.dtype == np.dtype("uint16" if dtype == "bfloat16" else dtype)
    assert values.attrs.get("dtype") == ("bfloat16" if dtype == "bfloat16" else None)
    assert (values[:].reshape(19, -1).view(np.uint8) == rows).all()
    assert (group["keys"][:].view(np.uint64) == keys_of(numbers)).all()
    about = dict(group.attrs["cachefreeze"])
    assert about.pop("about") == ABOUT
    assert about == {
        "format": 2,
        "set": NAME.hex(),
        "dims": list(dims),
        "dtype": dtype,
        "chunk_rows": CHUNK_ROWS,
        "codec": "raw",
    }
    assert directory.messages == []


@pytest.mark.parametrize(
    ("dims", "chunk_rows"), [((384,), 4096), ((32768,), 64), ((3 * 2**20,), 1), ((), 4096)]
)
def test_a_chunk_file_is_the_bytes_of_whole_rows_and_their_checksum(
    path: Path, dims: tuple[int, ...], chunk_rows: int, real_chunks: None
) -> None:
    row = Row(dims, "float32")
    numbers = np.arange(chunk_rows + 1)
    write(path, numbers, row=row)
    (folder,) = segments(path)
    names = [f"c.{chunk}" + ".0" * len(dims) for chunk in (0, 1)]
    assert {one.name for one in (folder / "values").iterdir()} == {*names, "zarr.json"}
    expected = rows_of(numbers, row)
    for name, rows in zip(names, (expected[:-1], expected[-1:]), strict=True):
        content = (folder / "values" / name).read_bytes()
        assert content[: rows.size] == rows.tobytes()
        assert not any(content[rows.size : -4])
        assert int.from_bytes(content[-4:], "little") == google_crc32c.value(content[:-4])
        assert len(content) == chunk_rows * row.nbytes + 4
    # The rest of the last chunk is a hole.
    assert os.stat(folder / "values" / names[1]).st_blocks * 512 <= row.nbytes + 12_288


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.lists(st.integers(0, 90), max_size=20)),
            st.just(("reopen", [])),
            st.tuples(st.just("read"), st.lists(st.integers(0, 90), max_size=40)),
        ),
        max_size=12,
    )
)
def test_what_is_found_is_what_a_dict_would_hold(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("model") / "cache"
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    on_disk: set[int] = set()
    appended: set[int] = set()
    for step, listed in steps:
        numbers = np.array(listed, dtype=np.int64)
        if step == "append":
            new = np.array(sorted(set(listed) - on_disk - appended), dtype=np.int64)
            rows.append(keys_of(new), rows_of(new))
            appended.update(new.tolist())
        elif step == "reopen":
            directory.close()
            on_disk |= appended
            appended = set()
            directory = Directory(path, None)
            rows = directory.rows(NAME, ROW, ABOUT)
            assert len(rows) == len(on_disk)
        else:
            rows.refresh()
            found = set(numbers[read(rows, numbers)].tolist())
            assert on_disk & set(listed) <= found <= (on_disk | appended) & set(listed)
    directory.close()
    assert directory.messages == []
    assert read_again(path, 91) == (len(on_disk | appended), [])


def test_rows_are_found_while_the_writer_goes_on(path: Path) -> None:
    writing, reading = Directory(path, None), Directory(path, None)
    found = reading.rows(NAME, ROW, ABOUT)
    numbers = np.arange(3 * CHUNK_ROWS + 3)
    writing.rows(NAME, ROW, ABOUT).append(keys_of(numbers), rows_of(numbers))
    end = time.monotonic() + 10
    while len(found) < 3 * CHUNK_ROWS and time.monotonic() < end:
        time.sleep(0.01)
        found.refresh()
    # The chunk that is not full comes with the end of the writer.
    assert read(found, numbers).tolist() == [True] * 3 * CHUNK_ROWS + [False] * 3
    writing.close()
    found.refresh()
    assert read(found, numbers).all()
    reading.close()


@pytest.mark.parametrize("end", ["close", "withdraw", "forget"])
def test_rows_that_fill_no_chunk_are_found_once_they_are_published(path: Path, end: str) -> None:
    writing, reading = Directory(path, None), Directory(path, None)
    rows, found = writing.rows(NAME, ROW, ABOUT), reading.rows(NAME, ROW, ABOUT)
    for start in (0, 5, 10):  # the last rows wait
        numbers = np.arange(start, start + 5)
        rows.append(keys_of(numbers), rows_of(numbers))
        if start < 10:
            rows.publish()
    deadline = time.monotonic() + 10
    while len(found) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
        found.refresh()
    assert read(found, np.arange(15)).tolist() == [True] * 10 + [False] * 5
    if end == "close":
        writing.close()
        assert read_again(path, 15) == (15, [])
        # No segment has a chunk in its middle that is not full.
        assert sorted(len(list((one / "keys").glob("c.*"))) for one in segments(path)) == [1] * 3
    else:
        getattr(rows, end)()
        writing.close()
        found.refresh()
        assert not read(found, np.arange(15)).any()
        assert read_again(path, 15)[0] == 0
    reading.close()


def test_looking_again_reads_nothing_that_was_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, np.arange(30))
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)

    def no_read(*args: object) -> bytes:
        raise AssertionError("read once more")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", no_read)
        rows.refresh()
    assert len(rows) == 30
    directory.close()


def test_the_rest_of_a_chunk_that_is_not_full_is_zero(path: Path) -> None:
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    rows.append(keys_of(np.arange(CHUNK_ROWS)), rows_of(np.arange(CHUNK_ROWS)))
    while not len(rows):
        time.sleep(0.01)
        rows.refresh()
    time.sleep(0.05)  # the memory of the first chunk is taken again
    rows.append(keys_of(np.arange(50, 51)), rows_of(np.arange(50, 51)))
    directory.close()
    (folder,) = segments(path)
    for name, used in (("values/c.1.0.0", ROW.nbytes), ("keys/c.1.0", 16)):
        assert not any((folder / name).read_bytes()[used:-4])
    assert read_again(path, CHUNK_ROWS) == (CHUNK_ROWS, [])


def test_two_processes_write_at_once_and_a_third_reads(path: Path) -> None:
    def write_from(start: int) -> None:
        directory = Directory(path, None)
        rows = directory.rows(NAME, ROW, ABOUT)
        for first in range(start, start + 2000, 50):
            numbers = np.arange(first, first + 50)
            rows.append(keys_of(numbers), rows_of(numbers))
        directory.close()

    def read_all() -> None:
        directory = Directory(path, None)
        rows = directory.rows(NAME, ROW, ABOUT)
        seen, end = [0], time.monotonic() + 30
        while seen[-1] < 3000 and time.monotonic() < end:
            rows.refresh()
            good = read(rows, np.random.default_rng(len(seen)).permutation(3000))
            seen.append(int(good.sum()))
        assert seen == sorted(seen)
        assert seen[-1] == 3000
        assert directory.messages == []
        directory.close()

    # A thousand rows are written by both.
    with forked(lambda: write_from(0), lambda: write_from(1000), read_all):
        pass
    directory = Directory(path, None)
    assert len(directory.rows(NAME, ROW, ABOUT)) == 3000
    directory.close()
    assert len(segments(path)) == 2


def test_rows_that_lie_in_several_segments_count_once(path: Path) -> None:
    write(path, np.arange(20))
    write(path, np.arange(10, 30))
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    assert len(rows) == 30
    assert read(rows, np.arange(30)).all()
    directory.close()


def test_sets_of_other_names_do_not_see_each_other(path: Path) -> None:
    other = bytes(16)
    write(path, np.arange(20))
    write(path, np.arange(20, 40), name=other, row=Row((2,), "float16"))
    assert read_again(path, 40) == (20, [])


def test_appending_copies_the_rows(path: Path) -> None:
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    numbers = np.arange(5)
    keys, values = keys_of(numbers), rows_of(numbers)
    rows.append(keys, values)
    keys[:], values[:] = 0, 0
    directory.close()
    assert read_again(path, 5) == (5, [])


def test_appending_does_not_wait_for_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, fsync = threading.Event(), os.fsync
    directory = Directory(path, None)
    monkeypatch.setattr(os, "fsync", lambda file: (disk.wait(5), fsync(file)))
    rows = directory.rows(NAME, ROW, ABOUT)
    numbers = np.arange(3 * CHUNK_ROWS + 1)
    begin = time.perf_counter()
    rows.append(keys_of(numbers), rows_of(numbers))  # one in the disk, two in the queue
    assert time.perf_counter() - begin < 2
    disk.set()
    directory.close()
    assert read_again(path, len(numbers)) == (len(numbers), [])


def test_few_files_are_open_whatever_the_number_of_chunks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_reading, "OPEN_FILES", 16)
    write(path, np.arange(800))
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert read(rows, np.random.default_rng(0).permutation(800)).all()
    assert len(os.listdir("/proc/self/fd")) <= before + 17  # and the lock
    directory.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_program_that_ends_without_closing_has_written_its_rows(
    path: Path, real_chunks: None
) -> None:
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from tests.store.harness import *\n"
        "directory = Directory(Path(sys.argv[1]), None)\n"
        "rows = directory.rows(NAME, ROW, ABOUT)\n"
        "rows.append(keys_of(np.arange(5)), rows_of(np.arange(5)))\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=root)
    assert read_again(path, 5) == (5, [])


def test_what_the_user_named_wrongly_is_said_in_a_sentence(path: Path) -> None:
    path.write_text("a file")
    with pytest.raises(UserError, match="it is a file"):
        Directory(path, None)
    with pytest.raises(UserError, match="cannot hold activations"):
        Directory(path / "below", None)
    path.unlink()
    path.mkdir()
    (path / "thesis.tex").write_text("do not remove")
    with pytest.raises(UserError, match="holds other files"):
        Directory(path, None)


def test_rows_that_zarr_has_no_type_for_are_refused(path: Path) -> None:
    for dims, dtype in (((2,), "float8"), ((2, 0), "float32"), ((-1,), "float32")):
        with pytest.raises(ValueError, match="cannot be stored"):
            Row(dims, dtype)
    directory = Directory(path, None)
    with pytest.raises(ValueError, match="not plain JSON"):
        directory.rows(NAME, ROW, {"a set": {1, 2}})
    directory.rows(NAME, ROW, ABOUT)
    with pytest.raises(ValueError, match="and not"):
        directory.rows(NAME, Row((1,), "float32"), ABOUT)
    directory.close()
