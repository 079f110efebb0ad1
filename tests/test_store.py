"""The store holds what was written, says so to any zarr tool, and is whole or not used."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from cachefreeze.files import locked_folder
from cachefreeze.store import (
    Description,
    Layout,
    Store,
    StoreError,
    StoreWriter,
    open_store,
    prepare_cache_dir,
    remove_rubbish,
    remove_store,
    store_folders,
)
from cachefreeze.store import format as store_format
from cachefreeze.store import read as store_read

NAME = "0123456789abcdef" * 2
RANDOM = np.random.default_rng(0)
ROWS = {
    "train": RANDOM.normal(size=(100, 3, 5, 4)).astype(np.float32),
    "val": RANDOM.normal(size=(7, 3, 5, 4)).astype(np.float32),
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_format, "CHUNK_BYTES", 16 * 240)  # 240 bytes a row


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    prepare_cache_dir(tmp_path / "cache")
    return tmp_path / "cache"


def describe(rows: dict[str, np.ndarray], values: str = "float32", name: str = NAME) -> Description:
    splits = {
        split: Layout.of(
            len(array), array.shape[1:], array.dtype.name, channels_last=array.ndim == 4
        )
        for split, array in rows.items()
    }
    return Description(name, "wrn16_2", 3, "group1_block2", values, values, time.time(), splits, {})


def write(cache_dir: Path, rows: dict[str, np.ndarray] = ROWS, **about: str) -> Store:
    writer = StoreWriter(cache_dir, describe(rows, **about))
    for split, array in rows.items():
        for start in range(0, len(array), 9):  # no multiple of a chunk
            writer.append(split, array[start : start + 9])
    return writer.commit()


def read(store: Store, split: str, indices: np.ndarray) -> np.ndarray:
    layout = store.description.splits[split]
    out = np.empty((len(indices), layout.row_bytes), np.uint8)
    store.readers[split].read(indices, out)
    return out.view(layout.dtype).reshape(len(indices), *layout.row_shape)


def chunk_files(cache_dir: Path, split: str = "train") -> list[Path]:
    return sorted((cache_dir / NAME / split).glob("c.*"))


def test_rows_come_back_in_any_order(cache_dir: Path) -> None:
    store = write(cache_dir)
    for split, array in ROWS.items():
        indices = RANDOM.permutation(np.r_[: len(array), : len(array)])
        assert np.array_equal(read(store, split, indices), array[indices])


@pytest.mark.parametrize(
    ("dtype", "values"),
    [("float16", "float16"), ("float64", "float64"), ("uint16", "bfloat16")],
)
def test_every_bit_pattern_survives(cache_dir: Path, dtype: str, values: str) -> None:
    bits = RANDOM.integers(0, 256, (50, 6, np.dtype(dtype).itemsize), np.uint8)
    array = bits.view(dtype)[..., 0]
    store = write(cache_dir, {"train": array}, values=values)
    assert read(store, "train", np.arange(50)).tobytes() == array.tobytes()


def test_any_zarr_tool_opens_it_and_sees_the_same(cache_dir: Path) -> None:
    write(cache_dir).close()
    group = zarr.open_group(cache_dir / NAME, mode="r")
    for split, array in ROWS.items():
        assert np.array_equal(group[split][:], array)
        assert group[split].metadata.dimension_names == ("row", "y", "x", "channel")
    assert group.attrs["cachefreeze"]["unit"] == "group1_block2"


def test_rows_that_are_all_zero_or_all_fill_are_on_disk_like_others(cache_dir: Path) -> None:
    rows = {
        "train": np.zeros((64, 3, 5, 4), np.float32),
        "val": np.full((5, 3, 5, 2), np.nan, "f4"),
    }
    store = write(cache_dir, rows)
    assert len(chunk_files(cache_dir)) == store.description.splits["train"].chunks == 4
    assert list(store.damage()) == []
    assert not read(store, "train", np.arange(64)).any()


def test_what_fills_the_last_chunk_can_be_mistaken_for_nothing(cache_dir: Path) -> None:
    store = write(cache_dir)
    layout = store.description.splits["train"]
    last = store.folder / "train" / layout.chunk_name(layout.chunks - 1)
    held = 100 - (layout.chunks - 1) * layout.rows_per_chunk
    tail = np.frombuffer(last.read_bytes()[:-4], np.float32)[held * 60 :]
    assert tail.size == 5 * 60
    assert np.isnan(tail).all()
    store.close()


def test_chunks_are_a_few_mb_of_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for row_bytes in (4, 3000, 128 * 1024, 70 * 2**20):
        layout = Layout.of(10_000, (row_bytes // 4,), "float32")
        assert layout.chunks * layout.rows_per_chunk >= 10_000
        assert layout.rows_per_chunk == 1 or layout.chunk_file_bytes <= 2**23 + 4
        assert layout.bytes <= 1.1 * 10_000 * row_bytes + 4 * layout.chunks


def test_a_store_without_its_marker_is_not_opened(cache_dir: Path) -> None:
    writer = StoreWriter(cache_dir, describe(ROWS))
    for split, array in ROWS.items():
        writer.append(split, array)
    assert open_store(cache_dir, NAME) is None
    writer.commit().close()
    reopened = open_store(cache_dir, NAME)
    assert reopened is not None
    reopened.close()
    (cache_dir / NAME / "COMMITTED").unlink()
    assert open_store(cache_dir, NAME) is None


def test_committing_before_all_rows_are_in_is_a_bug(cache_dir: Path) -> None:
    writer = StoreWriter(cache_dir, describe(ROWS))
    writer.append("train", ROWS["train"][:50])
    with pytest.raises(AssertionError):
        writer.commit()
    writer.suspend()
    assert not (cache_dir / NAME / "COMMITTED").exists()


def flip_a_bit(cache_dir: Path) -> None:
    path = chunk_files(cache_dir)[2]
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(content)


def cut_short(cache_dir: Path) -> None:
    path = chunk_files(cache_dir)[2]
    path.write_bytes(path.read_bytes()[:-240])


def delete_a_chunk(cache_dir: Path) -> None:
    chunk_files(cache_dir)[2].unlink()


def swap_two_chunks(cache_dir: Path) -> None:
    first, second = chunk_files(cache_dir)[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def fill_with_zeros(cache_dir: Path) -> None:
    path = chunk_files(cache_dir)[0]
    path.write_bytes(bytes(path.stat().st_size))


def link_a_chunk_elsewhere(cache_dir: Path) -> None:
    path = chunk_files(cache_dir)[0]
    path.rename(cache_dir / "elsewhere")
    path.symlink_to(cache_dir / "elsewhere")


@pytest.mark.parametrize(
    "hurt",
    [
        flip_a_bit,
        cut_short,
        delete_a_chunk,
        swap_two_chunks,
        fill_with_zeros,
        link_a_chunk_elsewhere,
    ],
)
def test_damaged_chunks_are_found(cache_dir: Path, hurt: Callable[[Path], None]) -> None:
    write(cache_dir).close()
    hurt(cache_dir)
    store = open_store(cache_dir, NAME)
    assert store is not None
    damage = list(store.damage())
    assert len(damage) == (2 if hurt is swap_two_chunks else 1)
    assert str(damage[0]).startswith("train: c.")


def edit(file: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def hurt(cache_dir: Path) -> None:
        path = cache_dir / NAME / file
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return hurt


def rewrite(file: str, content: str) -> Callable[[Path], None]:
    return lambda cache_dir: (cache_dir / NAME / file).write_text(content) and None


def about(content: dict) -> dict:
    return content["attributes"]["cachefreeze"]


@pytest.mark.parametrize(
    ("hurt", "sentence"),
    [
        (edit("manifest.json", lambda c: c["crc32c"]["train"].pop()), "marker does not fit"),
        (edit("train/zarr.json", lambda c: c.update(fill_value=0)), "changed after"),
        (edit("zarr.json", lambda c: about(c).update(unit="stem")), "changed after"),
        (edit("zarr.json", lambda c: about(c).update(format=99)), "format is 99"),
        (edit("zarr.json", lambda c: about(c).update(fingerprint="f" * 32)), "name of its folder"),
        (edit("zarr.json", lambda c: about(c).update(values="load")), "does not write"),
        (edit("zarr.json", lambda c: about(c)["splits"]["val"].update(rows=2**60)), "describe"),
        (edit("zarr.json", lambda c: about(c).update(splits={"../x": about(c)["splits"]["val"]})),
         "does not write"),
        (edit("zarr.json", lambda c: c.pop("attributes")), "does not describe"),
        (rewrite("zarr.json", "[" * 100_000), "not JSON"),
        (rewrite("zarr.json", "[]"), "does not describe"),
        (rewrite("manifest.json", "{}"), "marker does not fit"),
        (rewrite("COMMITTED", ""), "marker does not fit"),
    ],
)  # fmt: skip
def test_metadata_that_are_not_ours_are_refused(
    cache_dir: Path, hurt: Callable[[Path], None], sentence: str
) -> None:
    write(cache_dir).close()
    hurt(cache_dir)
    with pytest.raises(StoreError, match=sentence):
        open_store(cache_dir, NAME)


@pytest.mark.parametrize("file", ["zarr.json", "train/zarr.json", "manifest.json", "COMMITTED"])
def test_metadata_too_large_to_be_ours_are_not_parsed(cache_dir: Path, file: str) -> None:
    write(cache_dir).close()
    with (cache_dir / NAME / file).open("ab") as file_on_disk:
        file_on_disk.write(b" " * 2**24)
    with pytest.raises(StoreError, match="too large"):
        open_store(cache_dir, NAME)


def test_reading_a_chunk_that_was_cut_short_meanwhile_raises(cache_dir: Path) -> None:
    store = write(cache_dir)
    os.truncate(chunk_files(cache_dir)[0], 10)
    with pytest.raises(OSError, match="cut short"):
        read(store, "train", np.arange(3))


def test_a_store_that_is_read_is_not_removed_and_one_that_is_not_goes(cache_dir: Path) -> None:
    store = write(cache_dir)
    assert not remove_store(store.folder)
    other = open_store(cache_dir, NAME)
    assert other is not None
    store.close()
    assert not remove_store(store.folder), "two readers, one of them is left"
    other.close()
    assert remove_store(store.folder)
    assert list(cache_dir.glob(".*")) + store_folders(cache_dir) == []


def test_a_store_that_is_written_is_neither_removed_nor_written_twice(cache_dir: Path) -> None:
    writer = StoreWriter(cache_dir, describe(ROWS))
    assert not remove_store(cache_dir / NAME)
    with pytest.raises(BlockingIOError):
        StoreWriter(cache_dir, describe(ROWS))
    writer.abort()
    assert store_folders(cache_dir) == []


def test_a_writer_goes_on_where_one_of_the_same_rows_was_killed(cache_dir: Path) -> None:
    about = describe(ROWS)
    writer = StoreWriter(cache_dir, about)
    writer.append("train", ROWS["train"][:50])  # three chunks of 15 rows, and a part
    writer.suspend()
    (chunk_files(cache_dir)[0].with_name("c.3.0.0.0.1.partial")).write_bytes(b"half")
    with (cache_dir / NAME / "journal").open("ab") as file:
        file.write(b"train 3 12")
    writer = StoreWriter(cache_dir, replace(about, created=about.created + 9))
    layout = about.splits["train"]
    assert writer.held == {"train": 3 * layout.rows_per_chunk, "val": 0}
    assert writer.bytes == 3 * layout.chunk_file_bytes
    writer.append("train", ROWS["train"][writer.held["train"] :])
    writer.append("val", ROWS["val"])
    store = writer.commit()
    for split, array in ROWS.items():
        assert np.array_equal(read(store, split, np.arange(len(array))), array)
    assert not list(cache_dir.rglob("*.partial"))
    store.close()


@pytest.mark.parametrize("operation", ["checksum", "replace"])
def test_taking_over_may_be_cut_off_too(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    writer = StoreWriter(cache_dir, describe(ROWS))
    writer.append("train", ROWS["train"][:50])
    writer.suspend()
    held = {"train": 3 * writer.description.splits["train"].rows_per_chunk, "val": 0}

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if operation == "checksum":
            patch.setattr(store_read.CRC32C, "checksum", interrupted)
        else:
            patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            StoreWriter(cache_dir, writer.description)
    again = StoreWriter(cache_dir, writer.description)
    assert again.held == held
    again.abort()


def test_a_writer_of_other_rows_starts_from_nothing(cache_dir: Path) -> None:
    writer = StoreWriter(cache_dir, describe(ROWS))
    writer.append("train", ROWS["train"])
    writer.suspend()  # as if it had been killed
    other = {"train": ROWS["train"][:20] + 1}
    store = write(cache_dir, other)
    assert np.array_equal(read(store, "train", np.arange(20)), other["train"])
    assert not (cache_dir / NAME / "val").exists()


def test_what_killed_runs_left_is_removed_and_nothing_else(cache_dir: Path) -> None:
    write(cache_dir).close()
    killed = StoreWriter(cache_dir, describe(ROWS, name="a" * 32))
    killed.suspend()
    alive = StoreWriter(cache_dir, describe(ROWS, name="b" * 32))
    (cache_dir / ".trash-c-1").mkdir()
    (cache_dir / NAME / "manifest.json.1.partial").touch()
    (cache_dir / "notes.txt").write_text("mine")
    assert remove_rubbish(cache_dir) == 3
    assert [folder.name[0] for folder in store_folders(cache_dir)] == ["0", "b"]
    assert (cache_dir / "notes.txt").exists()
    alive.abort()


def test_a_store_to_measure_with_goes_only_when_its_process_is_gone(cache_dir: Path) -> None:
    measuring = cache_dir / ".scratch-1"
    measuring.mkdir()
    with locked_folder(measuring):
        assert remove_rubbish(cache_dir) == 0
        assert measuring.exists()
    assert remove_rubbish(cache_dir) == 1
    assert not measuring.exists()


def test_every_field_on_the_disk_is_written_down(cache_dir: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "store-format.md").read_text()
    store = write(cache_dir)
    group = json.loads((store.folder / "zarr.json").read_text())["attributes"]["cachefreeze"]
    manifest = json.loads((store.folder / "manifest.json").read_text())
    store.close()
    for field in (*group, *group["splits"]["train"], *manifest):
        assert f"`{field}`" in text, field
    for path in store.folder.rglob("*"):
        assert path.name in text or re.fullmatch(r"c(\.\d+)+", path.name)
    assert f"Format {store_format.FORMAT} " in text


def test_open_files_stay_bounded(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_read, "OPEN_CHUNKS", 3)
    store = write(cache_dir)
    before = len(os.listdir("/proc/self/fd"))
    indices = RANDOM.permutation(100)
    store.readers["train"].will_need(indices)
    assert np.array_equal(read(store, "train", indices), ROWS["train"][indices])
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    store.close()
    assert len(os.listdir("/proc/self/fd")) <= before - 1


def test_the_cache_folder_is_tagged_for_backup_tools(cache_dir: Path) -> None:
    tag = (cache_dir / "CACHEDIR.TAG").read_text()
    assert tag.startswith("Signature: 8a477f597d28d172789f06886806bc55")
    shutil.rmtree(cache_dir)
