"""Whatever happens to the files of a segment: no wrong row is given out."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachefreeze.store import Directory, Row
from cachefreeze.store.inspect import inspect, verify
from cachefreeze.store.journal import Chunk

from .harness import (
    ABOUT,
    CHUNK_ROWS,
    NAME,
    ROW,
    files_below,
    keys_of,
    read,
    read_again,
    segments,
    write,
)

# Five full chunks and one that is not.
COUNT = 5 * CHUNK_ROWS + 3


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two segments with different rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cachefreeze.store.format.CHUNK_ROWS", CHUNK_ROWS)
        path = tmp_path_factory.mktemp("written") / "cache"
        write(path, np.arange(COUNT))
        write(path, np.arange(COUNT, 2 * COUNT))
    return path


@pytest.fixture
def copy(written: Path, path: Path) -> Path:
    """A copy of it to be damaged."""
    shutil.copytree(written, path)
    return path


def first(path: Path) -> Path:
    """The segment that holds the first rows."""
    one, other = segments(path)
    key = keys_of(np.array([0])).tobytes()
    return one if (one / "keys" / "c.0.0").read_bytes().startswith(key) else other


def flip(path: Path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= bit
    path.write_bytes(content)


VALUES, KEYS = "values/c.{}.0.0", "keys/c.{}.0"


def flipped(name: str, at: int) -> Callable[[Path], None]:
    return lambda folder: flip(folder / name.format(1), at)


def cut(name: str, by: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / name.format(1)
        os.truncate(file, max(file.stat().st_size - by, 0))

    return damage


def grown(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with (folder / name.format(1)).open("ab") as file:
            file.write(b"more")

    return damage


def lost(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name.format(1)).unlink()


def zeroed(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / name.format(1)
        file.write_bytes(bytes(file.stat().st_size))

    return damage


def swapped(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        one, other = folder / name.format(1), folder / name.format(2)
        other.rename(folder / "aside")
        one.rename(other)
        (folder / "aside").rename(one)

    return damage


def from_the_other_segment(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (other,) = (one for one in segments(folder.parents[1]) if one != folder)
        shutil.copy(other / name.format(1), folder / name.format(1))

    return damage


CHUNK_DAMAGE = {
    "a byte of a row": (flipped(VALUES, 50), 1),
    "a byte of a checksum": (flipped(VALUES, -2), 1),
    "a byte of a key": (flipped(KEYS, 20), 1),
    "values cut by a byte": (cut(VALUES, 1), 1),
    "values cut to nothing": (cut(VALUES, 10**6), 1),
    "keys cut": (cut(KEYS, 5), 1),
    "values grown": (grown(VALUES), 1),
    "keys grown": (grown(KEYS), 1),
    "values lost": (lost(VALUES), 1),
    "keys lost": (lost(KEYS), 1),
    "values zeroed": (zeroed(VALUES), 1),
    "keys zeroed": (zeroed(KEYS), 1),
    "values swapped": (swapped(VALUES), 2),
    "keys swapped": (swapped(KEYS), 2),
    "values of another segment": (from_the_other_segment(VALUES), 1),
    "keys of another segment": (from_the_other_segment(KEYS), 1),
}


@pytest.mark.parametrize("kind", CHUNK_DAMAGE)
def test_only_the_rows_of_damaged_chunks_are_lost(copy: Path, kind: str) -> None:
    damage, chunks = CHUNK_DAMAGE[kind]
    damage(first(copy))
    assert len(list(verify(copy))) == chunks
    directory = Directory(copy, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    numbers = np.arange(2 * COUNT)
    good = read(rows, numbers)
    assert np.flatnonzero(~good).tolist() == list(range(CHUNK_ROWS, CHUNK_ROWS * (1 + chunks)))
    # From then on they are unknown, and that was said once for each chunk.
    assert (rows.find(keys_of(numbers)) >= 0).tolist() == good.tolist()
    assert len(rows) == good.sum()
    assert read(rows, numbers).tolist() == good.tolist()
    assert len(directory.messages) == chunks
    assert all(str(copy) in sentence for sentence in directory.messages)
    directory.close()


def test_rows_that_were_lost_are_found_where_they_were_written_again(copy: Path) -> None:
    lost(VALUES)(first(copy))
    directory = Directory(copy, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    numbers = np.arange(COUNT)
    good = read(rows, numbers)
    assert not good.all()
    write(copy, numbers[~good])
    rows.refresh()
    assert read(rows, numbers).all()
    assert len(rows) == 2 * COUNT
    directory.close()


def test_a_file_that_is_exchanged_after_it_was_checked_is_checked_again(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefreeze.store.reading.OPEN_FILES", 1)
    directory = Directory(copy, None)
    rows = directory.rows(NAME, ROW, ABOUT)
    numbers = np.arange(2 * COUNT)
    assert read(rows, numbers).all()
    swapped(VALUES)(first(copy))
    assert int(read(rows, numbers).sum()) == 2 * (COUNT - CHUNK_ROWS)
    directory.close()


@pytest.mark.parametrize("line", [0, 3, 5])
def test_the_rows_of_a_damaged_journal_end_where_it_is_damaged(copy: Path, line: int) -> None:
    flip(first(copy) / "keys" / "journal", 41 * line + 12)
    found, messages = read_again(copy, 2 * COUNT)
    assert found == COUNT + line * CHUNK_ROWS
    (sentence,) = messages
    assert f"damaged in line {line + 1}" in sentence
    assert list(verify(copy)) == messages


@pytest.mark.parametrize(
    "lines", [[0, 2, 1, 3], [0, 0, 2, 3], [0, 1, 1]], ids=["swapped", "twice", "again"]
)
def test_lines_of_the_journal_stand_in_their_order(copy: Path, lines: list[int]) -> None:
    folder = first(copy)
    before = (folder / "keys" / "journal").read_bytes()
    content = b"".join(before[41 * line : 41 * (line + 1)] for line in lines)
    (folder / "keys" / "journal").write_bytes(content)
    found, messages = read_again(copy, 2 * COUNT)
    right = next(at for at, line in enumerate(lines) if at != line)
    assert found == COUNT + right * CHUNK_ROWS
    assert len(messages) == 1


def test_a_line_with_more_rows_than_a_chunk_has_is_none(copy: Path) -> None:
    folder = first(copy)
    line = Chunk(0, CHUNK_ROWS + 1, 1, 2).line(folder.name)
    (folder / "keys" / "journal").write_bytes(line)
    found, messages = read_again(copy, 2 * COUNT)
    assert found == COUNT
    assert "damaged in line 1" in messages[0]


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_flipped_bit_makes_a_wrong_row(written: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from([one for one in files_below(written) if one.stat().st_size]))
    at = data.draw(st.integers(0, file.stat().st_size - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    before = file.read_bytes()
    try:
        flip(file, at, bit)
        if file.name == "CACHEDIR.TAG":
            return
        # Neither those that were there nor others, and nothing raises.
        read_again(written, 3 * COUNT)
        list(verify(written))
        inspect(written)
    finally:
        file.write_bytes(before)


def paths_in(content: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where each field of a JSON document stands."""
    found = []
    items = list(content.items()) if isinstance(content, dict) else []
    items += list(enumerate(content)) if isinstance(content, list) else []
    for name, value in items:
        found += [(*before, name), *paths_in(value, (*before, name))]
    return found


def edits(value: Any) -> list[Any]:
    """Other values in the place of a value."""
    others: list[Any] = [None, {}, [], "", "pickle", True, -1, 0, 10**30, 1.5, [[]]]
    if isinstance(value, int):
        others += [value + 1, value * 2, float(value), str(value)]
    return [other for other in others if json.dumps(other) != json.dumps(value)]


@pytest.mark.parametrize("name", ["zarr.json", "values/zarr.json", "keys/zarr.json"])
def test_metadata_that_say_something_else_are_refused(copy: Path, name: str) -> None:
    file = first(copy) / name
    before = json.loads(file.read_text())
    for where in paths_in(before):
        content = json.loads(file.read_text())
        for edit in ["remove", "add", *edits(_at(content, where))]:
            content = json.loads(json.dumps(before))
            holder = _at(content, where[:-1])
            if edit == "remove":
                del holder[where[-1]]
            elif edit == "add":
                if not isinstance(holder, dict):
                    continue
                holder["also"] = where[-1]
            else:
                holder[where[-1]] = edit
            file.write_text(json.dumps(content))
            found, messages = read_again(copy, 2 * COUNT)
            # What is said for people may say anything, and the number of slots grows.
            free = "about" in where or (where == ("shape", 0) and _is_slots(edit))
            if not free:
                assert found == COUNT, f"{where} may be {edit!r}"
                (sentence,) = messages
                assert str(copy) in sentence
            file.write_text(json.dumps(before))


def _at(content: Any, where: tuple[Any, ...]) -> Any:
    for step in where:
        content = content[step]
    return content


def _is_slots(edit: Any) -> bool:
    return type(edit) is int and 0 <= edit < 10**12


def test_a_segment_of_another_set_is_not_read(copy: Path) -> None:
    other = copy / bytes(16).hex()
    shutil.copytree(copy / NAME.hex(), other)
    found, messages = read_again(copy, 2 * COUNT, name=bytes(16))
    assert found == 0
    assert all("another set" in sentence for sentence in messages)


def test_the_journal_of_another_segment_names_no_chunk(copy: Path) -> None:
    folder = first(copy)
    from_the_other_segment("keys/journal")(folder)
    found, messages = read_again(copy, 2 * COUNT)
    assert found == COUNT
    assert len(messages) == 1


def test_rows_of_another_shape_under_the_same_name_are_not_read(copy: Path) -> None:
    directory = Directory(copy, None)
    rows = directory.rows(NAME, Row((4, 3), "float32"), ABOUT)
    assert len(rows) == 0
    assert "another shape" in directory.messages[0]
    directory.close()
