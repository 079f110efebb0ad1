"""Directories that somebody forged: nothing is run, followed, waited for or believed."""

import json
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cachefreeze.store import Directory
from cachefreeze.store.format import Layout, Row, metadata
from cachefreeze.store.inspect import inspect, prune, verify
from cachefreeze.store.journal import Chunk

from .harness import ABOUT, CHUNK_ROWS, NAME, ROW, keys_of, read, segments, write

COUNT = 3 * CHUNK_ROWS
MOST_MEMORY = 12 * 2**20

# To a segment and a folder outside of the directory.
Forge = Callable[[Path, Path], None]


def moved_out(name: str) -> Forge:
    """A link leads to the file or folder, which lies outside."""

    def forge(folder: Path, outside: Path) -> None:
        target = outside / "moved"
        (folder / name).rename(target)
        (folder / name).symlink_to(target)

    return forge


def pipe(name: str) -> Forge:
    def forge(folder: Path, outside: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return forge


def a_folder(name: str) -> Forge:
    def forge(folder: Path, outside: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return forge


def a_file(name: str) -> Forge:
    def forge(folder: Path, outside: Path) -> None:
        shutil.rmtree(folder / name)
        (folder / name).write_text("no folder")

    return forge


def holding(name: str, content: bytes) -> Forge:
    return lambda folder, outside: (folder / name).write_bytes(content) and None


def huge(name: str) -> Forge:
    """A terabyte of nothing."""
    return lambda folder, outside: os.truncate(folder / name, 2**40)


def claiming(dims: tuple[int, ...], chunk_rows: int) -> Forge:
    """All metadata agree on this shape."""

    def forge(folder: Path, outside: Path) -> None:
        layout = Layout(Row(dims, "float32"), chunk_rows)
        for name, content in metadata(folder.parent.name, layout, {}, 10**11).items():
            (folder / name).write_text(content)

    return forge


def lines(count: int) -> Forge:
    """The journal names chunks that are not there, with checksums that agree."""

    def forge(folder: Path, outside: Path) -> None:
        named = (Chunk(number, CHUNK_ROWS, 1, 2) for number in range(count))
        journal = b"".join(chunk.line(folder.name) for chunk in named)
        (folder / "keys" / "journal").write_bytes(journal)

    return forge


def python_codec(folder: Path, outside: Path) -> None:
    """A codec that would unpickle the chunk."""
    file = folder / "values" / "zarr.json"
    content = json.loads(file.read_text())
    content["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]
    file.write_text(json.dumps(content))


FORGED: dict[str, Forge] = {
    **{f"link: {name}": moved_out(name) for name in (".", "values", "keys", "zarr.json")},
    **{f"link: {name}": moved_out(name) for name in ("values/c.0.0.0", "keys/c.0.0")},
    **{f"link: {name}": moved_out(name) for name in ("keys/journal", "keys/lock", "keys/used")},
    **{f"pipe: {name}": pipe(name) for name in ("zarr.json", "values/zarr.json", "keys/c.1.0")},
    **{f"pipe: {name}": pipe(name) for name in ("values/c.1.0.0", "keys/journal", "keys/lock")},
    **{f"folder: {name}": a_folder(name) for name in ("zarr.json", "keys/journal", "keys/lock")},
    **{f"folder: {name}": a_folder(name) for name in ("values/c.1.0.0", "keys/c.1.0")},
    **{f"file: {name}": a_file(name) for name in ("values", "keys")},
    **{f"huge: {name}": huge(name) for name in ("zarr.json", "keys/zarr.json", "keys/journal")},
    **{f"huge: {name}": huge(name) for name in ("values/c.0.0.0", "keys/c.0.0", "keys/used")},
    "deep JSON": holding("zarr.json", b"[" * 500_000),
    "deep JSON of an array": holding("values/zarr.json", b'{"a":' * 100_000),
    "wide JSON": holding("keys/zarr.json", b"[" + b"{}," * 300_000 + b"{}]"),
    "a long number": holding("zarr.json", b'{"zarr_format":' + b"9" * 900_000 + b"}"),
    "no JSON": holding("zarr.json", b"\x80\x04\x95"),
    "no text in the journal": holding("keys/journal", b"\xff" * 4100),
    "a huge row": claiming((2**38,), 1),
    "many dimensions": claiming((2,) * 30, 1),
    "many rows in a chunk": claiming((3, 4), CHUNK_ROWS * 1000),
    "chunks that are not there": lines(2_000),
    "a codec that runs code": python_codec,
}


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Opening a pipe would wait for ever, and a hole may be read for as long."""
    signal.alarm(30)
    yield
    signal.alarm(0)
    tracemalloc.stop()


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Content and time of all files."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_segment_gives_no_row_and_does_no_harm(
    path: Path, tmp_path: Path, kind: str
) -> None:
    write(path, np.arange(COUNT))
    (forged,) = segments(path)
    write(path, np.arange(COUNT, 2 * COUNT))
    outside = tmp_path / "outside"
    outside.mkdir()
    if kind == "link: .":
        forged.rename(outside / "moved")
        forged.symlink_to(outside / "moved")
    else:
        FORGED[kind](forged, outside)
    before = snapshot(outside)
    tracemalloc.start()
    directory = Directory(path, 10**6)
    rows = directory.rows(NAME, ROW, ABOUT)
    numbers = np.arange(3 * COUNT)
    good = read(rows, numbers)
    assert good[COUNT : 2 * COUNT].all()  # those of the other segment
    if kind in ("link: .", "link: values", "link: keys"):
        assert not good[:COUNT].any()
    new = numbers[~good]
    rows.append(keys_of(new), np.zeros((len(new), ROW.nbytes), np.uint8))
    directory.close()
    inspect(path)
    list(verify(path))
    prune(path, 10**6)
    prune(path, 0)

    assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    assert snapshot(outside) == before
    left = path / NAME.hex()
    assert not left.exists() or [one for one in segments(path) if not one.is_symlink()] == []


def test_a_set_that_is_a_link_is_neither_read_nor_written(path: Path, tmp_path: Path) -> None:
    write(path, np.arange(COUNT))
    outside = tmp_path / "outside"
    (path / NAME.hex()).rename(outside)
    (path / NAME.hex()).symlink_to(outside)
    before = snapshot(outside)
    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    assert not read(rows, np.arange(COUNT)).any()
    numbers = np.arange(COUNT)
    rows.append(keys_of(numbers), np.zeros((COUNT, ROW.nbytes), np.uint8))
    directory.close()
    prune(path, 0)
    assert any("is not a folder" in sentence for sentence in directory.messages)
    assert snapshot(outside) == before


def test_other_files_in_a_directory_are_left_alone(path: Path) -> None:
    write(path, np.arange(COUNT))
    (path / "notes.txt").write_text("mine")
    (path / NAME.hex() / "notes.txt").write_text("mine, too")
    (path / "photos").mkdir()
    (path / "photos" / "cat.jpg").write_text("a cat")
    prune(path, 0)
    assert {file.name for file in path.rglob("*") if file.is_file()} == {
        "CACHEDIR.TAG",
        "notes.txt",
        "cat.jpg",
    }
    assert [one.name for one in segments(path)] == ["notes.txt"]
