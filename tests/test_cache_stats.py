"""scripts/cache_stats.py tells what is in a cache folder, and whether it is whole."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cachefreeze.store import (
    Description,
    Layout,
    Quantization,
    SplitReader,
    StoreWriter,
    inspect_cache,
    prepare_cache_dir,
    remove_store,
)

SCRIPT = Path(__file__).parents[1] / "scripts" / "cache_stats.py"
ROWS = {"train": np.ones((60, 4, 4, 8), np.uint16), "val": np.ones((9, 4, 4, 8), np.uint16)}


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """A cache folder with one committed store."""
    prepare_cache_dir(tmp_path / "cache")
    writer = start_store(tmp_path / "cache", "0123456789abcdef" * 2)
    for split, rows in ROWS.items():
        writer.append(split, rows)
    writer.commit().close()
    return tmp_path / "cache"


def start_store(cache_dir: Path, name: str) -> StoreWriter:
    splits = {split: Layout.of(len(rows), (4, 4, 8), "uint16") for split, rows in ROWS.items()}
    about = Description(
        name, "wrn16_2", 3, "group1_block2", "bfloat16", "bfloat16", time.time(), splits, {}
    )
    return StoreWriter(cache_dir, about)


def stats(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_table_shows_every_store_with_its_splits(cache_dir: Path) -> None:
    result = stats(cache_dir)
    assert result.returncode == 0
    header, train, val, total = result.stdout.splitlines()
    assert header.split() == (
        [
            "store",
            "network",
            "boundary",
            "split",
            "rows",
            "shape",
            "type",
            "codec",
            "chunks",
            "size",
            "state",
            "age",
        ]
    )
    assert train.split()[:11] == (
        [
            "0123456789ab",
            "wrn16_2",
            "3",
            "group1_block2",
            "train",
            "60",
            "4x4x8",
            "bfloat16",
            "raw",
            "1/1",
            "16",
        ]
    )
    assert "committed" in train
    assert val.split()[:4] == ["val", "9", "4x4x8", "bfloat16"]
    assert total.startswith("1 store, ")
    assert "free on this disk" in total


def test_json_holds_the_same_in_plain_values(cache_dir: Path) -> None:
    found = json.loads(stats(cache_dir, "--json", "--verify").stdout)
    (store,) = found["stores"]
    assert store["unit"] == "group1_block2"
    assert store["state"] == "committed"
    assert (store["values"], store["stored"], store["codec"]) == ("bfloat16", "bfloat16", "raw")
    assert store["lossy"] is False
    assert store["splits"]["train"]["rows"] == 60
    assert store["splits"]["train"]["chunks_present"] == 1
    assert store["bytes"] >= sum(rows.nbytes for rows in ROWS.values())
    assert found["bytes"] >= store["bytes"]
    assert found["free_bytes"] > 0
    assert not found["damaged"]


def test_what_is_stored_is_shown_beside_what_it_stands_for(cache_dir: Path) -> None:
    pixels = np.zeros((50, 4, 4, 3), np.uint8)
    zstd = {"train": Layout.of(50, (4, 4, 3), "uint8", "zstd")}
    lz4 = {"train": Layout.of(50, (4, 4, 3), "int8", "lz4")}
    thirds = Quantization(scale=(0.3,) * 3, offset=(0.0,) * 3)
    now = time.time()
    for description in (
        Description("1" * 32, "vgg", 0, "pixels", "uint8", "uint8", now, zstd, {}),
        Description("2" * 32, "vgg", 1, "conv1", "float32", "int8", now, lz4, {}, thirds),
    ):
        writer = StoreWriter(cache_dir, description)
        writer.append("train", pixels)
        writer.commit().close()
    result = stats(cache_dir, "--verify")
    assert result.returncode == 0
    header, _, _, first, second = result.stdout.splitlines()[:5]
    column = header.index("type")
    assert "  0 pixels  " in first
    assert first[column:].split()[:3] == ["uint8", "zstd", "1/1"]
    assert second[column:].startswith("float32 as int8 (lossy)  lz4")
    _, pixel_store, lossy_store = json.loads(stats(cache_dir, "--json").stdout)["stores"]
    assert (pixel_store["codec"], pixel_store["lossy"]) == ("zstd", False)
    assert (lossy_store["values"], lossy_store["stored"]) == ("float32", "int8")
    assert (lossy_store["codec"], lossy_store["lossy"]) == ("lz4", True)
    on_disk = next(cache_dir.glob("1*/train/c.*")).stat().st_size
    assert on_disk < pixels.nbytes
    metadata = (cache_dir / ("1" * 32) / "train" / "zarr.json").stat().st_size
    assert pixel_store["splits"]["train"]["bytes"] == on_disk + metadata


def test_verify_finds_a_flipped_bit_and_exits_with_1(cache_dir: Path) -> None:
    chunk = next(cache_dir.glob("*/val/c.*"))
    content = bytearray(chunk.read_bytes())
    content[7] ^= 1
    chunk.write_bytes(content)
    assert stats(cache_dir).returncode == 0, "a bit is not looked at without --verify"
    result = stats(cache_dir, "--verify")
    assert result.returncode == 1
    assert "damaged: 0123456789abcdef0123456789abcdef: val: c.0.0.0.0 has a wrong" in result.stdout


def test_a_missing_chunk_is_damage_without_verify(cache_dir: Path) -> None:
    next(cache_dir.glob("*/val/c.*")).unlink()
    result = stats(cache_dir)
    assert result.returncode == 1
    assert "0/1" in result.stdout
    assert "1.16 kB" not in result.stdout, "bytes on disk, not those that should be there"
    assert "1 of 1 chunks are missing" in result.stdout


def test_a_store_that_its_run_removes_meanwhile_is_left_out(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_first(folder: Path) -> bool:
        remove_store(folder)
        return True

    monkeypatch.setattr("cachefreeze.store.inspect.in_use", remove_first)
    report = inspect_cache(cache_dir, verify=True)
    assert report.stores == ()
    assert not report.damaged


def test_a_store_is_not_removed_while_it_is_verified(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = []

    def damage(reader: SplitReader) -> list[str]:
        removed.append(remove_store(reader.folder.parent))
        return []

    monkeypatch.setattr(SplitReader, "damage", damage)
    inspect_cache(cache_dir, verify=True)
    assert removed == [False, False]


def test_metadata_that_are_not_ours_are_damage_not_a_crash(cache_dir: Path) -> None:
    (cache_dir / ("0123456789abcdef" * 2) / "zarr.json").write_text('{"attributes": 3}')
    result = stats(cache_dir, "--verify")
    assert result.returncode == 1
    assert result.stderr == ""
    assert "does not describe a store" in result.stdout
    assert json.loads(stats(cache_dir, "--json").stdout)["stores"][0]["state"] == "damaged"


def test_orphans_of_killed_runs_are_counted_and_pruned(cache_dir: Path) -> None:
    writer = start_store(cache_dir, "a" * 32)
    running = stats(cache_dir)
    assert running.returncode == 0
    assert "being written" in running.stdout
    assert "orphans of killed" not in running.stdout
    writer.suspend()  # as if its process had been killed

    result = stats(cache_dir)
    assert result.returncode == 0
    assert "orphan" in result.stdout
    assert "orphans of killed runs: 1 (--prune removes them;" in result.stdout
    assert (cache_dir / ("a" * 32)).exists(), "looking changes nothing"

    pruned = stats(cache_dir, "--prune")
    assert pruned.returncode == 0
    assert "pruned: 1" in pruned.stdout
    assert [path.name[0] for path in cache_dir.iterdir() if path.is_dir()] == ["0"]


@pytest.mark.parametrize("what", ["missing", "file", "untagged", "photos"])
def test_a_folder_that_is_no_cache_is_refused_with_2(tmp_path: Path, what: str) -> None:
    folder = tmp_path / what
    if what == "file":
        folder.write_text("")
    elif what != "missing":
        folder.mkdir()
    if what == "photos":
        (folder / ("a" * 32)).mkdir()
    result = stats(folder, "--prune")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert what != "photos" or (folder / ("a" * 32)).exists()


def test_an_empty_cache_is_no_error(tmp_path: Path) -> None:
    prepare_cache_dir(tmp_path / "cache")
    result = stats(tmp_path / "cache")
    assert result.returncode == 0
    assert "no stores" in result.stdout
