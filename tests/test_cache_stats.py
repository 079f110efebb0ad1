"""scripts/cache_stats.py tells what is in a cache folder, and whether it is whole."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from cachefreeze import ActivationCache, PrefixCache, partition
from cachefreeze.keys import environment
from cachefreeze.segments import Directory, Row
from cachefreeze.segments.format import USED
from cachefreeze.segments.inspect import inspect
from cachefreeze.store import (
    Description,
    Layout,
    Quantization,
    SplitReader,
    StoreWriter,
    Usage,
    inspect_cache,
    note_usage,
    open_store,
    prepare_cache_dir,
    read_usage,
    remove_store,
)
from cachefreeze.train import main

from .conftest import Run
from .interrupter import Interrupter

SCRIPT = Path(__file__).parents[1] / "scripts" / "cache_stats.py"
sys.path.insert(0, str(SCRIPT.parent))
FINGERPRINT = "0123456789abcdef" * 2
ROWS = {"train": np.ones((60, 4, 4, 8), np.uint16), "val": np.ones((9, 4, 4, 8), np.uint16)}


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """A cache folder with one committed store."""
    prepare_cache_dir(tmp_path / "cache")
    writer = start_store(tmp_path / "cache", FINGERPRINT)
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


@dataclass
class Said:
    """What the script said."""

    returncode: int
    stdout: str
    stderr: str


Stats = Callable[..., Said]


@pytest.fixture
def stats(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Stats:
    """Runs the script in this process."""
    look = runpy.run_path(str(SCRIPT))["main"]

    def run(*options: object) -> Said:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
        code = look()
        captured = capsys.readouterr()
        if "--json" not in options:
            lines = captured.out.replace(str(options[0]), "").splitlines()
            # A path that somebody copies is in one piece.
            lines = [line for line in lines if not line.startswith("damaged: /")]
            assert max(map(len, lines), default=0) <= 100
        return Said(code, captured.out, captured.err)

    return run


def test_every_store_is_shown_with_its_splits(cache_dir: Path, stats: Stats) -> None:
    result = stats(cache_dir)
    assert result.returncode == 0
    name, state, train, val, row, gap, *totals = result.stdout.splitlines()
    assert name == "0123456789ab  wrn16_2, boundary 3 after group1_block2"
    assert state.startswith("  committed, ")
    assert re.sub(" +", " ", train).startswith(
        " train 60/60 rows [####################] 100% 1/1 chunks 16"
    )
    assert re.sub(" +", " ", val).startswith(" val 9/9 rows [####################] 100% 1/1 chunks")
    assert row == "  a row: 4x4x8 bfloat16, 256 B, raw"
    assert gap == ""
    assert totals[0] == f"1 store in {cache_dir}"
    assert re.match(r"\[ {20}\]   0%  \d\S* kB of .* \(80 % of the free disk, ", totals[1])
    assert totals[2].endswith(" free on this disk")


def test_the_program_runs_by_itself(cache_dir: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(cache_dir)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("0123456789ab")


def test_json_holds_the_same_in_plain_values(cache_dir: Path, stats: Stats) -> None:
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


def test_what_is_stored_is_shown_beside_what_it_stands_for(cache_dir: Path, stats: Stats) -> None:
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
    assert "111111111111  vgg, boundary 0 (pixels)\n" in result.stdout
    assert "  a row: 4x4x3 uint8, 48 B, zstd\n" in result.stdout
    assert "222222222222  vgg, boundary 1 after conv1\n" in result.stdout
    assert "  a row: 4x4x3 float32 as int8 (lossy), 48 B, lz4\n" in result.stdout
    _, pixel_store, lossy_store = json.loads(stats(cache_dir, "--json").stdout)["stores"]
    assert (pixel_store["codec"], pixel_store["lossy"]) == ("zstd", False)
    assert (lossy_store["values"], lossy_store["stored"]) == ("float32", "int8")
    assert (lossy_store["codec"], lossy_store["lossy"]) == ("lz4", True)
    on_disk = next(cache_dir.glob("1*/train/c.*")).stat().st_size
    assert on_disk < pixels.nbytes
    metadata = (cache_dir / ("1" * 32) / "train" / "zarr.json").stat().st_size
    assert pixel_store["splits"]["train"]["bytes"] == on_disk + metadata


def test_verify_finds_a_flipped_bit_and_exits_with_1(cache_dir: Path, stats: Stats) -> None:
    chunk = next(cache_dir.glob("*/val/c.*"))
    content = bytearray(chunk.read_bytes())
    content[7] ^= 1
    chunk.write_bytes(content)
    assert stats(cache_dir).returncode == 0, "a bit is not looked at without --verify"
    result = stats(cache_dir, "--verify")
    assert result.returncode == 1
    assert "  damaged, " in result.stdout
    assert "  damaged: val: c.0.0.0.0 has a wrong checksum\n" in result.stdout


def test_a_missing_chunk_is_damage_without_verify(cache_dir: Path, stats: Stats) -> None:
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


def test_metadata_that_are_not_ours_are_damage_not_a_crash(cache_dir: Path, stats: Stats) -> None:
    (cache_dir / FINGERPRINT / "zarr.json").write_text('{"attributes": 3}')
    result = stats(cache_dir, "--verify")
    assert result.returncode == 1
    assert result.stderr == ""
    assert "does not describe a store" in result.stdout
    assert json.loads(stats(cache_dir, "--json").stdout)["stores"][0]["state"] == "damaged"


def test_orphans_of_killed_runs_are_counted_and_pruned(cache_dir: Path, stats: Stats) -> None:
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
def test_a_folder_that_is_no_cache_is_refused_with_2(
    tmp_path: Path, what: str, stats: Stats
) -> None:
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


def test_an_empty_cache_is_no_error(tmp_path: Path, stats: Stats) -> None:
    prepare_cache_dir(tmp_path / "cache")
    result = stats(tmp_path / "cache")
    assert result.returncode == 0
    assert "no rows in" in result.stdout


def test_a_store_that_is_being_written_shows_how_far_it_is(cache_dir: Path, stats: Stats) -> None:
    thirds = {"train": Layout(60, (4, 4, 8), "uint16", rows_per_chunk=20)}
    now = time.time()
    about = Description("b" * 32, "vgg", 1, "conv1", "bfloat16", "bfloat16", now, thirds, {})
    writer = StoreWriter(cache_dir, about)
    writer.append("train", ROWS["train"][:50])
    result = stats(cache_dir, "--values", "--codecs")
    lines = result.stdout[result.stdout.index("bbbbbbbbbbbb") :].splitlines()
    assert lines[1].startswith("  being written, ")
    assert "40/60 rows  [#############       ]  66%  2/3 chunks" in lines[2]
    assert "  no values: it is not complete" in lines
    store = json.loads(stats(cache_dir, "--json").stdout)["stores"][1]
    assert store["splits"]["train"]["rows_present"] == 40
    writer.append("train", ROWS["train"][50:])
    writer.commit().close()
    assert "60/60 rows  [####################] 100%  3/3 chunks" in stats(cache_dir).stdout


def test_a_store_may_be_looked_at_while_it_is_used(cache_dir: Path, stats: Stats) -> None:
    store = open_store(cache_dir, FINGERPRINT)
    assert store is not None
    result = stats(cache_dir, "--verify", "--values", "--codecs", "--prune")
    assert "  in use, " in result.stdout
    assert "values of 69 rows" in result.stdout
    assert store.readers["train"].chunk(0).shape == (60, 256)
    assert store.remove(), "nobody holds it any more"


@pytest.mark.parametrize("wide", ["network", "unit"])
def test_long_names_are_cut(cache_dir: Path, stats: Stats, wide: str) -> None:
    names = {"network": "vgg", "unit": "conv1", wide: "x" * 200}
    split = {"train": Layout.of(50, (4, 4, 3), "uint8")}
    details = {"batch_size": "9" * 200, "input": "8" * 200}
    writer = StoreWriter(
        cache_dir,
        Description(
            "1" * 32,
            boundary=1,
            values="uint8",
            stored="uint8",
            created=time.time(),
            splits=split,
            details=details,
            **names,
        ),
    )
    writer.append("train", np.zeros((50, 4, 4, 3), np.uint8))
    writer.commit().close()
    assert "x" * 27 + "..." in stats(cache_dir).stdout


def test_the_largest_store_there_can_be_fits_the_line(cache_dir: Path, stats: Stats) -> None:
    split = {"x" * 60: Layout(2**39, (1, 2, 1, 2, 1, 2, 1), "uint8", rows_per_chunk=2**10)}
    now = time.time()
    writer = StoreWriter(
        cache_dir, Description("1" * 32, "vgg", 1, "conv1", "uint8", "uint8", now, split, {})
    )
    assert "0/549,755,813,888 rows" in stats(cache_dir).stdout
    writer.abort()


def test_the_budget_may_be_named(cache_dir: Path, stats: Stats) -> None:
    used = json.loads(stats(cache_dir, "--json").stdout)
    assert not used["budget_given"]
    assert used["budget_bytes"] == pytest.approx(0.8 * used["free_bytes"], rel=0.1)
    half = stats(cache_dir, "--max-gb", 2 * used["bytes"] / 1e9)
    assert "[##########          ]  50%" in half.stdout
    given = json.loads(stats(cache_dir, "--json", "--max-gb", 0.25).stdout)
    assert (given["budget_bytes"], given["budget_given"]) == (0.25e9, True)
    *_, full, over, _ = stats(cache_dir, "--max-gb", 0).stdout.splitlines()
    assert full.startswith("[####################] 100%")
    assert over.startswith("over budget by ")
    refused = stats(cache_dir, "--max-gb", -1)
    assert refused.returncode == 2
    assert "--max-gb -1.0 does not make sense" in refused.stderr


OPTIONS = ["--arch", "wrn10_1", "-b", "32", "-j", "0", "--precision", "fp32", "--quiet"]
OPTIONS += ["--dataset", "imagefolder", "--image-size", "32", "--cache-policy", "eager"]


@pytest.fixture(scope="module")
def used(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cache of a run, and the run beside it."""
    folder = tmp_path_factory.mktemp("used")
    words = [*OPTIONS, "--data-dir", str(images), "--cache-dir", str(folder / "cache")]
    words += ["--epochs", "4", "--t0", "0.2", "--schedule", "linear"]
    assert main([*words, "--output-dir", str(folder / "run")]) == 0
    return folder


def test_hits_and_misses_are_those_of_the_last_run(used: Path, stats: Stats) -> None:
    run = Run.load(used / "run")
    assert [event["step"] for event in run.summary["cache"]["boundaries"]][-1] == 16
    (store,) = json.loads(stats(used / "cache", "--json").stdout)["stores"]
    # From step 16 on three batches of 32 rows, one of 22, and the last validation.
    assert (store["last_run"]["hits"], store["last_run"]["misses"]) == (3 * 32 + 22 + 33, 183)
    assert store["unused_seconds"] <= store["age_seconds"]
    assert store["details"]["input"] == "3x32x32"
    text = stats(used / "cache").stdout
    assert "  its last run: 151 hits, 183 misses (rows computed to fill it), 45.2% hits" in text
    assert "  made in batches of 32 from input of 3x32x32\n" in text
    assert "  last used " in text


def test_a_run_that_finds_a_store_has_no_misses(
    images: Path, tmp_path: Path, stats: Stats, interrupt: Interrupter
) -> None:
    words = [*OPTIONS, "--data-dir", str(images), "--cache-dir", str(tmp_path / "cache")]
    words += ["--epochs", "2", "--freeze-first", "-1"]

    def last_run() -> tuple[int, int]:
        (store,) = json.loads(stats(tmp_path / "cache", "--json").stdout)["stores"]
        return store["last_run"]["hits"], store["last_run"]["misses"]

    assert main([*words, "--output-dir", str(tmp_path / "one")]) == 0
    assert last_run() == (2 * 183, 183)
    interrupt(7)
    assert main([*words, "--output-dir", str(tmp_path / "two")]) == 130
    interrupt.no_more()
    # Seven steps, the fifth of 22 rows, and one validation.
    assert last_run() == (6 * 32 + 22 + 33, 0)
    assert stats(tmp_path / "cache", "--verify").returncode == 0


def test_a_loop_of_ones_own_leaves_what_it_had_of_a_store(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    units = partition(model)
    units.freeze(1)
    data = TensorDataset(torch.zeros(10, 3), torch.zeros(10))
    with PrefixCache(units, data, batch_size=4, directory=tmp_path / "cache") as cache:
        cache.materialize()
        assert cache.store is not None
        folder = cache.store.folder
        for epoch in range(3):
            assert len(list(cache.epoch(epoch))) == 3
    usage = read_usage(folder)
    assert usage is not None
    assert (usage.hits, usage.misses) == (30, 10)


def test_what_a_run_wrote_of_its_use_disturbs_nothing(cache_dir: Path, stats: Stats) -> None:
    folder, usage = cache_dir / FINGERPRINT, Usage(3, 4, 5.0)
    note_usage(folder, usage)
    assert read_usage(folder) == usage
    (folder / "usage.json.123.partial").write_text("{")
    result = stats(cache_dir, "--verify", "--prune")
    assert result.returncode == 0
    assert "pruned: 1" in result.stdout
    assert read_usage(folder) == usage
    store = open_store(cache_dir, FINGERPRINT)
    assert store is not None
    assert list(store.damage()) == []
    assert store.remove()
    assert not folder.exists()
    note_usage(folder, usage)
    assert not folder.exists(), "what is gone is not made again"
    writer = start_store(cache_dir, "a" * 32)
    note_usage(writer.folder, usage)
    assert read_usage(writer.folder) is None, "nor is a store that nobody can have used"
    writer.abort()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"3",
        b"[1, 2, 3.0]",
        b"{",
        b"[" * 900,
        b'{"hits": -1, "misses": 0, "time": 1.0}',
        b'{"hits": 1.5, "misses": 0, "time": 1.0}',
        b'{"hits": true, "misses": 0, "time": 1.0}',
        b'{"hits": "1", "misses": 0, "time": 1.0}',
        b'{"hits": 1, "misses": 99999999999999999999, "time": 1.0}',
        b'{"hits": 1, "misses": 0, "time": NaN}',
        b'{"hits": 1, "misses": 0, "time": 1e999}',
        b'{"hits": 1, "misses": 0}',
        b'{"hits": 1, "misses": 0, "time": 1.0, "run": "\\u0007"}',
        b'{"hits": 1, "misses": 0, "time": 1.0}' + b" " * 2000,
        b"\xff\xfe",
    ],
)
def test_a_note_that_is_none_of_ours_is_passed_over(
    cache_dir: Path, stats: Stats, content: bytes
) -> None:
    (cache_dir / FINGERPRINT / "usage.json").write_bytes(content)
    assert read_usage(cache_dir / FINGERPRINT) is None
    result = stats(cache_dir, "--verify")
    assert result.returncode == 0
    assert "last" not in result.stdout


def test_a_note_is_not_read_through_a_link(cache_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "else").write_text('{"hits": 1, "misses": 2, "time": 3.0}')
    (cache_dir / FINGERPRINT / "usage.json").symlink_to(tmp_path / "else")
    assert read_usage(cache_dir / FINGERPRINT) is None
    note_usage(cache_dir / FINGERPRINT, Usage(4, 5, 6.0))
    assert read_usage(cache_dir / FINGERPRINT) == Usage(4, 5, 6.0)
    assert '"hits": 1' in (tmp_path / "else").read_text()


def write_store(
    cache_dir: Path,
    name: str,
    rows: np.ndarray,
    values: str = "float32",
    stored: str = "float32",
    codec: str = "raw",
    quantization: Quantization | None = None,
) -> Path:
    split = {"train": Layout.of(len(rows), rows.shape[1:], rows.dtype.name, codec)}
    about = Description(
        name * 32, "vgg", 1, "conv1", values, stored, time.time(), split, {}, quantization
    )
    writer = StoreWriter(cache_dir, about)
    writer.append("train", rows)
    writer.commit().close()
    return writer.folder


def sampled(stats: Stats, cache_dir: Path, name: str, option: str) -> Any:
    found = json.loads(stats(cache_dir, "--json", option).stdout)["stores"]
    (store,) = [store for store in found if store["fingerprint"] == name * 32]
    return store[f"sampled_{option.removeprefix('--')}"]


def activations() -> np.ndarray:
    """As after a ReLU: half of them 0."""
    random = np.random.default_rng(1)
    return random.normal(0, 3, (100, 6, 6, 16)).clip(0).astype(np.float32)


def test_values_are_those_of_the_rows(cache_dir: Path, stats: Stats) -> None:
    rows = activations()
    rows[3, 0, 0, :3] = np.nan
    rows[99, 5, 5, :2] = np.inf, -np.inf
    write_store(cache_dir, "c", rows)
    found = sampled(stats, cache_dir, "c", "--values")
    finite = rows[np.isfinite(rows)].astype(float)
    assert (found["rows"], found["numbers"]) == (100, rows.size)
    assert (found["nan"], found["infinite"]) == (3, 2)
    assert found["zeros"] == (finite == 0).sum()
    assert (found["low"], found["high"]) == (0, finite.max())
    assert found["mean"] == pytest.approx(finite.mean())
    assert found["deviation"] == pytest.approx(finite.std())
    counts, edges = np.histogram(finite[finite != 0], 10)
    assert found["counts"] == counts.tolist()
    assert found["edges"] == edges.tolist()
    text = stats(cache_dir, "--values").stdout
    assert f"  values of 100 rows: {(rows == 0).mean():.1%} are 0, 3 NaN, 2 infinite" in text
    assert f"  {counts.max() / counts.sum():.2%}  {'#' * 50}\n" in text


def test_a_share_that_rounds_to_nothing_has_no_bar(cache_dir: Path, stats: Stats) -> None:
    rows = np.ones((100, 64, 64), np.float32)
    rows[0, 0, 0] = 100.0
    write_store(cache_dir, "c", rows)
    lines = stats(cache_dir, "--values").stdout.splitlines()
    shares = [line.split() for line in lines if re.fullmatch(r" +\S+ +\S+ +\S+%( +#+)?", line)]
    first, *_, last = shares[-10:]  # of the store above, which comes last
    assert (first[2:], last[2:]) == (["100.00%", "#" * 50], ["0.00%"])


def test_values_are_decoded_as_those_who_train_get_them(cache_dir: Path, stats: Stats) -> None:
    bits = torch.full((20, 3), -1.5, dtype=torch.bfloat16).view(torch.uint16).numpy()
    write_store(cache_dir, "c", bits, "bfloat16", "bfloat16", "zstd")
    steps = np.tile(np.array([-128, 0, 127], np.int8), (20, 1))
    scale = Quantization(scale=(0.5, 1.0, 2.0), offset=(10.0, 20.0, 30.0))
    write_store(cache_dir, "d", steps, "float32", "int8", "raw", scale)
    found = sampled(stats, cache_dir, "c", "--values")
    assert (found["low"], found["high"], found["numbers"]) == (-1.5, -1.5, 60)
    found = sampled(stats, cache_dir, "d", "--values")
    assert (found["low"], found["high"]) == (-54.0, 284.0)
    assert found["mean"] == pytest.approx((-54 + 20 + 284) / 3)


def test_what_fills_up_the_last_chunk_is_no_value(cache_dir: Path, stats: Stats) -> None:
    split = {"train": Layout(50, (3,), "float32", rows_per_chunk=20)}
    now = time.time()
    about = Description("c" * 32, "vgg", 1, "conv1", "float32", "float32", now, split, {})
    writer = StoreWriter(cache_dir, about)
    writer.append("train", np.ones((50, 3), np.float32))
    writer.commit().close()
    found = sampled(stats, cache_dir, "c", "--values")
    assert (found["rows"], found["nan"]) == (50, 0)


def test_a_large_store_is_sampled_the_same_way_each_time(cache_dir: Path, stats: Stats) -> None:
    rows = np.arange(2000, dtype=np.float32)[:, None] * np.ones(10_000, np.float32)  # 80 MB
    write_store(cache_dir, "c", rows)
    once, again = (sampled(stats, cache_dir, "c", "--values") for _ in range(2))
    assert once == again
    assert once["rows"] == 256
    assert 0 <= once["low"] < once["high"] < 2000


def test_codecs_tell_what_a_store_would_take(cache_dir: Path, stats: Stats) -> None:
    rows = activations()
    takes = {}
    for name, codec in (("c", "raw"), ("d", "lz4"), ("e", "zstd")):
        folder = write_store(cache_dir, name, rows, codec=codec)
        takes[f"--cache-codec {codec}"] = sum(p.stat().st_size for p in folder.glob("train/c.*"))
    for name in "cde":
        found = {each["option"]: each for each in sampled(stats, cache_dir, name, "--codecs")}
        # That is exact here, where the sample is the store.
        assert {option: found[option]["bytes"] for option in takes} == takes
        assert {found[option]["error"] for option in takes} == {None}
        half, quarter = found["--cache-dtype bf16"], found["--cache-codec int8"]
        assert (half["bytes"], quarter["bytes"]) == (rows.nbytes // 2, rows.nbytes // 4)
        assert 0 < half["error"] < 2**-8
        assert 0 < quarter["error"] < 0.02
    assert takes["--cache-codec zstd"] < rows.nbytes
    text = stats(cache_dir, "--codecs").stdout
    assert f"{takes['--cache-codec zstd'] / takes['--cache-codec raw']:.0%}  nothing" in text


def test_what_has_lost_precision_is_not_offered_to_lose_more(cache_dir: Path, stats: Stats) -> None:
    lossless = [f"--cache-codec {codec}" for codec in ("raw", "lz4", "zstd")]

    def options(name: str) -> list[str]:
        return [each["option"] for each in sampled(stats, cache_dir, name, "--codecs")]

    write_store(cache_dir, "c", np.ones((20, 4, 4, 3), np.uint8), "uint8", "uint8")
    assert options("c") == lossless, "pixels"
    bits = torch.ones((20, 3), dtype=torch.bfloat16).view(torch.uint16).numpy()
    write_store(cache_dir, "d", bits, "float32", "bfloat16")
    assert options("d") == lossless
    write_store(cache_dir, "e", bits, "bfloat16", "bfloat16")
    assert options("e") == [*lossless, "--cache-codec int8"]
    write_store(cache_dir, "f", np.full((20, 3), np.nan, np.float32))
    assert options("f") == [*lossless, "--cache-dtype bf16"], "int8 has no NaN"


def test_a_damaged_chunk_gives_no_values(cache_dir: Path, stats: Stats) -> None:
    for chunk in cache_dir.glob("*/*/c.*"):
        chunk.write_bytes(bytes(chunk.stat().st_size))
    result = stats(cache_dir, "--values", "--codecs")
    assert "  no values: c.0.0.0.0 has a wrong checksum" in result.stdout
    assert "  no codecs: c.0.0.0.0 has a wrong checksum" in result.stdout
    (store,) = json.loads(stats(cache_dir, "--json", "--values").stdout)["stores"]
    assert store["sampled_values"] == {"error": "c.0.0.0.0 has a wrong checksum"}


BATCH = 8


def train(directory: Path, weights: int = 0, batch: int = BATCH, rows: int = 40) -> None:
    """Two epochs of a head on a frozen body. Its rows are kept."""
    torch.manual_seed(weights)
    body = torch.nn.Sequential(torch.nn.Linear(64, 400), torch.nn.Tanh(), torch.nn.Linear(400, 16))
    model = torch.nn.Sequential(body.requires_grad_(False), torch.nn.Linear(16, 2))
    images = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    with ActivationCache(model, directory=directory) as cache:
        for _ in range(2):
            for batch_of_images in images.split(batch):
                model(batch_of_images)
        assert cache.stats.rows_kept >= 40, cache.messages


def keep(
    directory: Path, about: dict[str, Any], name: int = 0, rows: int = 5, row: Row | None = None
) -> Path:
    """Keeps numbered rows as one run does. Returns the folder of the set."""
    row = Row((1, 16), "float32") if row is None else row
    numbers = np.arange(2 * rows, dtype=np.uint64).reshape(rows, 2)
    kept = Directory(directory, None)
    kept.rows(bytes([name] * 16), row, about).append(numbers, np.ones((rows, row.nbytes), np.uint8))
    kept.close()
    assert kept.messages == []
    return directory / bytes([name] * 16).hex()


def about_of(**said: Any) -> dict[str, Any]:
    settings = ["2.9", "cpu", "AVX2", "highest", "True", "1", *["False"] * 6, "a processor", "0.24"]
    return {
        "value": "body.2: linear (8x16)",
        "model": "Net (training mode, 8x64)",
        "shape": [8, 16],
        "rows": [0, 1, 1],
        "parameters": 4,
        "environment": settings,
    } | said


def test_rows_of_a_model_are_shown_with_what_they_are(tmp_path: Path, stats: Stats) -> None:
    train(tmp_path)
    result = stats(tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    model, value, rows, header, line, gap, total, bar, free = result.stdout.splitlines()
    assert model == "Sequential"
    assert value == "  output of linear in module 0.2"
    assert rows == "  rows of 16 float32, 64 B each"
    assert header.split("  ")[2] == "set"
    assert re.match(r"    [0-9a-f]{12}    40  [\d.]+ kB +1 run  \d+ s ago +\d+ s ago$", line)
    assert gap == ""
    assert total == f"1 set of 40 rows in {tmp_path}"
    assert bar.endswith("(half of the free disk, a run's default)")
    assert free.endswith(" free on this disk")
    train(tmp_path, rows=48)
    assert re.search(r"  48  [\d.]+ kB +2 runs  ", stats(tmp_path).stdout)


def test_what_tells_two_sets_of_one_value_apart_is_named(tmp_path: Path, stats: Stats) -> None:
    train(tmp_path)
    alike = "\n    A set serves only runs that are like those that made it.\n"
    assert alike not in stats(tmp_path).stdout
    train(tmp_path, batch=20)
    text = stats(tmp_path).stdout
    assert alike in text
    assert text.count("output of linear in module 0.2") == 1
    assert "\n      made with input 8x64\n" in text
    assert "\n      made with input 20x64\n" in text
    assert "version" not in text
    train(tmp_path, weights=1)
    text = stats(tmp_path).stdout
    assert "\n      made with input 8x64, version 1 of 2\n" in text
    assert "\n      made with input 8x64, version 2 of 2\n" in text
    assert "\n    Versions differ in the weights or the code that made the rows.\n" in text
    found = json.loads(stats(tmp_path, "--json").stdout)["sets"]
    assert [one["differences"] for one in found] == [
        {"input": "8x64", "version": "1 of 2"},
        {"input": "20x64"},
        {"input": "8x64", "version": "2 of 2"},
    ]


def test_settings_have_the_names_of_what_they_are(
    tmp_path: Path, stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    import directory_stats

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for kind, names in directory_stats.SETTINGS.items():
        values = environment(torch.device(kind))
        assert names.index("processor") - len(values) in (0, 1)
        said = dict(zip(names, values, strict=False))
        assert (said["torch"], said["device"]) == (torch.__version__, kind)
        assert said["matmul precision"] == "highest"
    train(tmp_path / "real")
    (real,) = json.loads(stats(tmp_path / "real", "--json").stdout)["sets"]
    names = directory_stats.SETTINGS["cpu"]
    assert len(names) - len(real["about"]["environment"]) in (0, 2)
    one, other = about_of(), about_of()
    other["environment"][5] = "2"
    keep(tmp_path / "named", one, 0)
    keep(tmp_path / "named", other, 1)
    text = stats(tmp_path / "named").stdout
    assert "\n      made with threads 1\n" in text
    assert "\n      made with threads 2\n" in text


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"parameters": 6}, "parameters 6"),
        ({"model": "Net (eval mode, 8x64, without gradients)"}, "mode eval, gradients no"),
        ({"environment": ["1", "2"]}, "setting 1 1, setting 2 2"),
    ],
)
def test_every_fact_that_differs_is_named(
    tmp_path: Path, stats: Stats, said: dict[str, Any], words: str
) -> None:
    keep(tmp_path, about_of(), 0)
    keep(tmp_path, about_of(**said), 1)
    found = json.loads(stats(tmp_path, "--json").stdout)["sets"]
    (other,) = (one for one in found if one["set"].startswith("01"))
    different = {k: v for k, v in other["differences"].items() if v != "unknown"}
    assert ", ".join(f"{name} {value}" for name, value in different.items()) == words


@pytest.mark.parametrize(
    ("said", "row", "words"),
    [
        ({}, Row((1, 16), "float32"), "rows of 16 float32, 64 B each"),
        (
            {"shape": [8, 3, 4, 5], "rows": [0, 1, 1]},
            Row((1, 4, 5, 3), "bfloat16"),
            "rows of 3x4x5 bfloat16, 120 B each",
        ),
        (
            {"shape": [16, 3, 5], "rows": [0, 2, 1]},
            Row((2, 5, 3), "float32"),
            "rows of 2x3x5 float32, 120 B each",
        ),
        ({"shape": [8]}, Row((1,), "int64"), "rows of one number, int64, 8 B each"),
        (
            {"shape": [8, 16], "rows": None},
            Row((8, 16), "float32"),
            "whole batches of 8x16 float32, 512 B each",
        ),
        ({"shape": [9, 99]}, Row((1, 16), "float32"), "rows of 1x16 float32, 64 B each"),
    ],
)
def test_a_row_has_the_shape_that_its_user_knows(
    tmp_path: Path, stats: Stats, said: dict[str, Any], row: Row, words: str
) -> None:
    keep(tmp_path, about_of(**said), row=row)
    assert f"\n  {words}\n" in stats(tmp_path).stdout


def test_json_of_a_directory_holds_the_same(tmp_path: Path, stats: Stats) -> None:
    begin = time.time() - 1
    folder = keep(tmp_path, about_of())
    found = json.loads(stats(tmp_path, "--json", "--verify").stdout)
    (one,) = found.pop("sets")
    assert (one["set"], one["model"], one["value"]) == (
        folder.name,
        "Net",
        "linear in module body.2",
    )
    assert (one["row_shape"], one["row_bytes"], one["dtype"]) == ([16], 64, "float32")
    assert (one["rows"], one["runs"], one["in_use"]) == (5, 1, False)
    assert begin < one["first_use"] <= one["last_use"] + 1 < time.time() + 2
    assert one["bytes"] == found["bytes"] == inspect(tmp_path)[0].nbytes
    assert one["about"] == about_of()
    assert (found["damaged"], found["verified"], found["problems"]) == (False, True, [])
    assert (found["pruned"], found["over_budget"], found["budget_given"]) == (None, False, False)


def test_a_damaged_chunk_of_a_directory_is_told(tmp_path: Path, stats: Stats) -> None:
    folder = keep(tmp_path, about_of())
    keep(tmp_path, about_of(), 1)
    assert "\nverified: every chunk is as it was written\n" in stats(tmp_path, "--verify").stdout
    (chunk,) = folder.glob("*/values/c.*")
    content = bytearray(chunk.read_bytes())
    content[7] ^= 1
    chunk.write_bytes(content)
    assert stats(tmp_path).returncode == 0, "a bit is not looked at without --verify"
    result = stats(tmp_path, "--verify", "--json")
    assert result.returncode == 1
    (sentence,) = json.loads(result.stdout)["problems"]
    assert sentence.startswith(str(chunk))
    lines = stats(tmp_path, "--verify").stdout.splitlines()
    assert f"damaged: {sentence}" in lines
    assert "Runs do not use what is damaged. They compute it again." in lines
    assert "verified: every chunk is as it was written" not in lines


def test_a_set_of_which_nothing_can_be_read_is_damaged(tmp_path: Path, stats: Stats) -> None:
    folder = keep(tmp_path, about_of())
    (segment,) = folder.iterdir()
    (segment / "keys" / "journal").unlink()
    result = stats(tmp_path)
    assert result.returncode == 1
    assert f"damaged: {segment}/keys/journal cannot be read (No such file" in result.stdout
    assert result.stdout.startswith("unknown model\n  output of unknown value\n  nothing readable")
    assert "  unknown  " in result.stdout, "when it was used first"
    assert json.loads(stats(tmp_path, "--json").stdout)["sets"][0]["row_shape"] is None


def test_rows_that_were_not_used_for_days_are_pruned(tmp_path: Path, stats: Stats) -> None:
    old, _ = keep(tmp_path, about_of()), keep(tmp_path, about_of(), 1)
    (segment,) = old.iterdir()
    then = time.time() - 10.5 * 86400
    os.utime(segment / USED, (then, then))
    os.utime(segment / "zarr.json", (then - 86400, then - 86400))
    assert re.search(r"11 days ago  10 days ago\n", stats(tmp_path).stdout)
    for days in ("", 11):
        kept = stats(tmp_path, "--prune", *([days] if days else [])).stdout
        assert "\nremoved: 0 B in all\n" in kept
        assert old.exists()
    text = stats(tmp_path, "--prune", 10).stdout
    assert "\nremoved: 5 rows of 000000000000, linear in module body.2 of Net\n" in text
    assert re.search(r"\nremoved: [\d.]+ kB in all\n1 set of 5 rows in ", text)
    assert not old.exists()
    pruned = json.loads(stats(tmp_path, "--prune", 0, "--json").stdout)["pruned"]
    assert pruned["rows"] == {"01" * 16: 5}
    assert pruned["bytes"] > 5 * 64


def test_rows_that_a_run_uses_are_not_pruned(tmp_path: Path, stats: Stats) -> None:
    keep(tmp_path, about_of())
    run = Directory(tmp_path, None)
    rows = run.rows(bytes(16), Row((1, 16), "float32"), about_of())
    keys = np.arange(10, dtype=np.uint64).reshape(5, 2)
    assert rows.read(rows.find(keys), np.zeros((5, 64), np.uint8)).all()
    text = stats(tmp_path, "--prune", 0).stdout
    assert "  in use now\n" in text
    assert "removed: 0 B in all" in text
    run.close()
    assert "removed: 5 rows of " in stats(tmp_path, "--prune", 0).stdout


def test_a_directory_over_its_budget_is_told(tmp_path: Path, stats: Stats) -> None:
    keep(tmp_path, about_of())
    assert "over budget" not in stats(tmp_path).stdout
    text = stats(tmp_path, "--max-gb", 1e-6).stdout
    assert re.search(
        r"\[#{20}\] 100%  [\d.]+ kB of 1 kB \(--max-gb\)\nover budget by .+ kB\n", text
    )
    found = json.loads(stats(tmp_path, "--json", "--max-gb", 1e-6).stdout)
    assert (found["over_budget"], found["budget_bytes"]) == (True, pytest.approx(1000))


def test_a_directory_without_rows_is_no_error(tmp_path: Path, stats: Stats) -> None:
    Directory(tmp_path, None).close()
    result = stats(tmp_path, "--verify", "--prune")
    assert (result.returncode, result.stderr) == (0, "")
    removed, total, *_ = result.stdout.splitlines()
    assert (removed, total) == ("removed: 0 B in all", f"no rows in {tmp_path}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prune", "-1"], "--prune -1 is no number of days"),
        (["--prune", "nan"], "--prune nan is no number of days"),
        (["--prune", "soon"], "--prune soon is no number of days"),
        (["--max-gb", "-1"], "--max-gb -1.0 does not make sense"),
        (["--max-gb", "inf"], "--max-gb inf does not make sense"),
        (["--values"], "shown without --values"),
        (["--codecs"], "shown without --codecs"),
    ],
)
def test_an_option_that_does_not_fit_a_directory_is_refused(
    tmp_path: Path, stats: Stats, options: list[str], words: str
) -> None:
    folder = keep(tmp_path, about_of())
    result = stats(tmp_path, *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert folder.exists()


def test_stores_beside_rows_are_counted_and_left_alone(cache_dir: Path, stats: Stats) -> None:
    folder = keep(cache_dir, about_of())
    text = stats(cache_dir, "--prune", 0).stdout
    assert "removed: 5 rows of " in text
    assert "\nstores of cachefreeze.train, not shown: 1\n" in text
    assert (cache_dir / FINGERPRINT).exists()
    assert not folder.exists()
    assert "1 store in" in stats(cache_dir).stdout


def test_stores_are_not_pruned_by_days(cache_dir: Path, stats: Stats) -> None:
    result = stats(cache_dir, "--prune", 0)
    assert result.returncode == 2
    assert "give --prune without a number of days" in result.stderr


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"value": 3, "model": ["x"], "shape": "8", "rows": 5, "environment": {"a": 1}},
        {"value": "\x1b[2J: linear\n (8)", "model": "\x1b]0;x\x07\u202eNet\n (eval mode, 8)"},
        {"value": "\ud800: linear (8x16)", "model": "\ud800", "environment": ["\x1b[31m", "cpu"]},
        {"value": "x" * 300_000, "model": "(" * 300_000, "environment": ["y" * 300_000, "cpu"]},
        {"environment": ["z"] * 100_000},
        {"environment": [[["a"]], None, 1e300, True]},
        {"shape": [10**4000, 8], "rows": [0, 10**4000, 1], "parameters": 10**4000},
        {"shape": [-1, -16], "rows": [9, 1, 1]},
        {"shape": [0] * 9999, "rows": [0, 0, 0], "parameters": True},
        {"shape": [16.0], "rows": [0, 1]},
    ],
)
def test_what_a_stranger_wrote_about_rows_is_shown_safely(
    tmp_path: Path, stats: Stats, said: dict[str, Any]
) -> None:
    for name in (0, 1):
        settings = [*said.get("environment", []), *[str(name)] * 1000]
        keep(tmp_path, {**said, "environment": settings}, name)
    assert "\n  rows of 1x16 float32, 64 B each\n" in stats(tmp_path).stdout, "as they lie"
    for options in ((), ("--json",), ("--prune", 0)):
        result = stats(tmp_path, *options)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.replace("\n", "").isprintable()
        assert options == ("--json",) or len(result.stdout) < 4000
        result.stdout.encode()


def test_names_that_a_terminal_cannot_show_are_no_error(tmp_path: Path) -> None:
    keep(tmp_path, about_of(model="\u00fcber (eval mode, 8x64)"))
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), "--verify"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("\\xfcber\n")
