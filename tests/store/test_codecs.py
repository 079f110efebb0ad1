"""Compressed rows: the bits that were written, in less room, and no row of a damaged chunk."""

import os
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from cachefreeze.store import Directory, Row
from cachefreeze.store import format as store_format
from cachefreeze.store.codecs import compress, decompress, places
from cachefreeze.store.format import JOURNAL, Layout, SegmentError
from cachefreeze.store.inspect import inspect, verify
from cachefreeze.store.journal import Chunk

from .harness import ABOUT, CHUNK_ROWS, NAME, ROW, files_below, keys_of, read, rows_of, segments

COUNT = 2 * CHUNK_ROWS + 3


def write(path: Path, numbers: np.ndarray, codec: str, row: Row = ROW) -> None:
    directory = Directory(path, None)
    rows = directory.rows(NAME, row, ABOUT, codec)
    rows.append(keys_of(numbers), rows_of(numbers, row))
    directory.close()
    assert directory.messages == []


def found(path: Path, numbers: np.ndarray, row: Row = ROW) -> tuple[list[bool], list[str]]:
    """Which rows are read, one by one and by whole chunks, and what is said."""
    directory = Directory(path, None)
    rows = directory.rows(NAME, row, ABOUT)
    places = rows.find(keys_of(numbers))
    for chunk in rows.chunks(places[places >= 0]):
        loaded = rows.load(chunk)
        if loaded is not None:
            keys, values = loaded
            assert (values == rows_of(keys[:, 1], row)).all(), "a wrong row was given out"
    directory.close()
    directory = Directory(path, None)
    good = read(directory.rows(NAME, row, ABOUT), numbers)
    directory.close()
    return good.tolist(), directory.messages


@pytest.mark.parametrize("row", [ROW, Row((1,), "uint8"), Row((5,), "bfloat16"), Row((), "int64")])
def test_compressed_rows_come_back_as_they_were_also_by_zarr_alone(path: Path, row: Row) -> None:
    numbers = np.arange(COUNT)
    write(path, numbers, "zstd", row)
    assert found(path, numbers, row) == ([True] * COUNT, [])
    (folder,) = segments(path)
    segment = zarr.open_group(folder, mode="r")
    assert segment["values"].shape == (COUNT, *row.dims)
    values = np.ascontiguousarray(segment["values"][:]).reshape(COUNT, -1).view(np.uint8)
    keys = segment["keys"][:].view("uint64")
    assert (values == rows_of(keys[:, 1], row)).all()
    assert list(verify(path)) == []


def test_zeros_take_little_room_and_noise_takes_little_more_than_it_is(path: Path) -> None:
    row, dice = Row((1000,), "float32"), np.random.default_rng(0)
    noise = dice.integers(0, 256, (CHUNK_ROWS, row.nbytes), dtype=np.uint8)
    layout = Layout.of(row, "zstd")
    assert len(compress(layout, np.zeros_like(noise))) < 0.1 * noise.nbytes
    assert noise.nbytes < len(compress(layout, noise)) <= layout.values_bytes


def test_a_set_holds_segments_of_both_kinds_and_all_are_read(path: Path) -> None:
    write(path, np.arange(10), "raw")
    write(path, np.arange(10, 30), "zstd")
    assert found(path, np.arange(30)) == ([True] * 30, [])
    (report,) = inspect(path)
    assert (report.rows, report.segments, report.problems) == (30, 2, [])


def _flip(at: int) -> Callable[[bytearray], None]:
    def damage(content: bytearray) -> None:
        content[at] ^= 1

    return damage


DAMAGE: dict[str, Callable[[bytearray], None]] = {
    "a frame": _flip(20),
    "the place of a row": _flip(-16 * CHUNK_ROWS - 4),
    "the checksum of the index": _flip(-1),
    "cut": lambda content: content.__delitem__(slice(-1, None)),
    "cut to nothing": lambda content: content.clear(),
    "grown": lambda content: content.extend(b"more"),
    "grown by much": lambda content: content.extend(bytes(10**6)),
    "zeroed": lambda content: content.__setitem__(slice(None), bytes(len(content))),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_no_row_of_a_damaged_chunk_is_given_out(path: Path, name: str) -> None:
    write(path, np.arange(COUNT), "zstd")
    (folder,) = segments(path)
    chunk = folder / "values" / "c.1.0.0"
    content = bytearray(chunk.read_bytes())
    DAMAGE[name](content)
    chunk.write_bytes(content)
    good, messages = found(path, np.arange(COUNT))
    assert good == [not CHUNK_ROWS <= number < 2 * CHUNK_ROWS for number in range(COUNT)]
    assert len(messages) == 1
    assert str(chunk) in messages[0]
    (sentence,) = verify(path)
    assert str(chunk) in sentence


def _forge(path: Path, frames: list[bytes], index: np.ndarray) -> None:
    """Puts other frames in the place of the first chunk, with all checksums right."""
    (folder,) = segments(path)
    tail = index.astype("<u8").tobytes()
    content = b"".join(frames) + tail + google_crc32c.value(tail).to_bytes(4, "little")
    (folder / "values" / "c.0.0.0").write_bytes(content)
    journal = folder / JOURNAL
    old = journal.read_bytes()
    keys = int(old[23:31], 16)
    line = Chunk(0, CHUNK_ROWS, google_crc32c.value(content), keys).line(folder.name)
    journal.write_bytes(line + old[len(line) :])


def _index(frames: list[bytes]) -> np.ndarray:
    lengths = np.array([len(frame) for frame in frames], dtype=np.uint64)
    return np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)


def _frames(size: int) -> list[bytes]:
    from numcodecs import zstd

    return [zstd.compress(bytes(size), 1)] * CHUNK_ROWS


@pytest.mark.parametrize(
    "kind", ["larger", "bombs", "smaller", "empty", "no frames", "outside", "overflow", "long"]
)
def test_a_forged_chunk_is_neither_believed_nor_decoded_to_more_than_its_rows(
    path: Path, kind: str
) -> None:
    write(path, np.arange(COUNT), "zstd")
    sizes = {"larger": ROW.nbytes + 1, "bombs": 2**20, "smaller": ROW.nbytes - 1, "empty": 0}
    frames = _frames(sizes.get(kind, ROW.nbytes))
    if kind == "no frames":
        frames = [b"x" * 40] * CHUNK_ROWS
    index = _index(frames)
    if kind == "outside":
        index[:, 0] += np.uint64(10**6)
    elif kind == "overflow":
        index[:, 0] = np.uint64(2**64 - 1)
    elif kind == "long":
        index[:, 1] = np.uint64(2**63)
    _forge(path, frames, index)
    good, messages = found(path, np.arange(COUNT))
    assert good == [number >= CHUNK_ROWS for number in range(COUNT)]
    assert len(messages) == 1
    assert "c.0.0.0" in messages[0]


def test_a_frame_that_names_no_size_is_refused() -> None:
    out = np.zeros(10, dtype=np.uint8)
    for frame in (b"", b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd\x00\x58\x51\x00\x00" + bytes(10)):
        with pytest.raises(SegmentError):
            decompress(frame, out)


def test_a_codec_that_is_not_known_is_not_read(path: Path) -> None:
    write(path, np.arange(COUNT), "zstd")
    (folder,) = segments(path)
    file = folder / "zarr.json"
    file.write_text(file.read_text().replace('"codec": "zstd"', '"codec": "pickle"'))
    good, messages = found(path, np.arange(COUNT))
    assert not any(good)
    assert "has the codec 'pickle'" in messages[0]


def test_a_raw_segment_that_says_it_is_compressed_is_not_read(path: Path) -> None:
    write(path, np.arange(COUNT), "raw")
    (folder,) = segments(path)
    file = folder / "zarr.json"
    file.write_text(file.read_text().replace('"codec": "raw"', '"codec": "zstd"'))
    good, messages = found(path, np.arange(COUNT))
    assert not any(good)
    assert len(messages) == 1


def test_a_full_disk_ends_the_writing_of_compressed_rows_and_what_is_there_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, np.arange(CHUNK_ROWS), "zstd")
    real = os.write

    def full(file: int, content: bytes) -> int:
        if len(content) > 64:
            raise OSError(28, "No space left on device")
        return real(file, content)

    directory = Directory(path, None)
    rows = directory.rows(NAME, ROW, ABOUT, "zstd")
    monkeypatch.setattr(os, "write", full)
    rows.append(keys_of(np.arange(100, 140)), rows_of(np.arange(100, 140)))
    directory.close()
    monkeypatch.undo()
    monkeypatch.setattr(store_format, "CHUNK_ROWS", CHUNK_ROWS)
    assert any("No space left on device" in one for one in directory.messages)
    assert [one for one in files_below(path) if one.suffix == ".partial"] == []
    assert found(path, np.arange(CHUNK_ROWS)) == ([True] * CHUNK_ROWS, [])


def test_places_of_all_rows_of_a_real_chunk(real_chunks: None) -> None:
    layout = Layout.of(Row((4,), "uint8"), "zstd")
    rows = rows_of(np.arange(layout.chunk_rows), layout.row)
    content = compress(layout, rows)
    out = np.empty_like(rows)
    where = places(layout, len(rows), len(content), content[-layout.index_bytes :])
    for row, (start, length) in zip(out, where, strict=True):
        decompress(content[start : start + length], row)
    assert (out == rows).all()
