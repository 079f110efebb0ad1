"""PrefixCache: right rows from wherever they come, and nothing lost when a store cannot be had."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

from cachefreeze import PrefixCache, Units, UserError, batches_of, partition
from cachefreeze.files import size_of_tree
from cachefreeze.models import build
from cachefreeze.store import Description, StoreError, StoreWriter, store_folders

from .conftest import Pixels, file_size_limit

BATCH = 8


def describe(folder: Path, units: Units) -> Description:
    """Of the store of `units` in another cache."""
    cache = make_cache(units, folder)
    cache.materialize()
    assert cache.store is not None
    about = cache.store.description
    cache.close()
    return about


@contextmanager
def closing_writer(writer: StoreWriter) -> Iterator[None]:
    yield
    writer.suspend()


ORDERS = {"train": np.random.default_rng(0).permutation(37), "val": np.arange(10)}


@pytest.fixture
def units() -> Units:
    return partition(build("wrn", 3, depth=10, width=1).to(memory_format=torch.channels_last))


def make_cache(units: Units, directory: Path | None, **options: object) -> PrefixCache:
    inputs = {"train": Pixels(37, 1), "val": Pixels(10, 2)}
    options = {"batch_size": BATCH, "max_bytes": float("inf"), "keep": False, **options}
    return PrefixCache(units, inputs, directory=directory, **options)  # type: ignore[arg-type]


def everything(cache: PrefixCache) -> dict[str, Tensor]:
    """All rows of all splits at the frontier, by a shuffled order with short last batches."""
    return {
        split: torch.cat(list(cache.batches(split, batches_of(order, BATCH))))
        for split, order in ORDERS.items()
    }


def assert_serves_what_is_computed(cache: PrefixCache) -> None:
    assert_same(everything(cache), everything(make_cache(cache.units, None)))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for split in ORDERS:
        assert one[split].dtype == other[split].dtype
        assert torch.equal(one[split], other[split])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("boundary", [1, 2, 3, 4])
def test_rows_from_a_store_are_the_rows_computed(
    units: Units, tmp_path: Path, boundary: int, dtype: torch.dtype | None
) -> None:
    units.freeze(4)
    computed = everything(make_cache(units, None, autocast_dtype=dtype))
    cache = make_cache(units, tmp_path / "cache", autocast_dtype=dtype)
    assert cache.materialize(boundary) is not None
    served = everything(cache)
    assert cache.boundary == boundary
    assert cache.rows_served == 47
    assert_same(served, computed)
    assert served["train"].dtype == (dtype or torch.float32)


def test_a_store_reads_as_channels_last_without_another_copy(units: Units, tmp_path: Path) -> None:
    units.freeze(2)
    cache = make_cache(units, tmp_path / "cache")
    cache.materialize()
    stored = next(cache._holdings.rows["train"].batches([np.arange(5)]))
    assert stored.is_contiguous(memory_format=torch.channels_last)
    assert units.run_frozen(stored, 2, 2, BATCH).data_ptr() == stored.data_ptr()


def test_a_batch_that_is_kept_keeps_its_values(units: Units, tmp_path: Path) -> None:
    units.freeze(2)
    cache = make_cache(units, tmp_path / "cache")
    cache.materialize()
    batches, copies = [], []
    for batch in cache.batches("train", batches_of(ORDERS["train"], BATCH)):
        batches.append(batch)
        copies.append(batch.clone())
    assert all(torch.equal(batch, copy) for batch, copy in zip(batches, copies, strict=True))


def test_the_zarr_arrays_hold_what_training_sees(units: Units, tmp_path: Path) -> None:
    units.freeze(2)
    cache = make_cache(units, tmp_path / "cache", autocast_dtype=torch.bfloat16)
    cache.materialize()
    seen = torch.cat(list(cache.batches("train", batches_of(np.arange(37), BATCH))))
    assert cache.store is not None
    array = zarr.open_group(cache.store.folder, mode="r")["train"]
    assert array.shape == (37, 16, 16, 16)
    bits = torch.from_numpy(array[:]).view(torch.bfloat16).permute(0, 3, 1, 2)
    assert torch.equal(bits, seen)


def test_each_store_is_filled_from_the_one_before_never_from_the_pixels(
    units: Units, tmp_path: Path
) -> None:
    cache = make_cache(units, tmp_path / "cache")
    for frontier in (1, 3, 4):
        units.freeze(frontier)
        assert cache.materialize() is not None
    assert [rows.served for rows in cache.inputs.values()] == [37, 10]
    assert cache.prefix_unit_rows_computed == 47 * 4
    everything(cache)
    assert cache.prefix_unit_rows_computed == 47 * 4
    assert_serves_what_is_computed(cache)


def test_there_is_one_store_once_the_next_is_committed(units: Units, tmp_path: Path) -> None:
    cache = make_cache(units, tmp_path / "cache")
    names = set()
    for frontier in (1, 2, 3):
        units.freeze(frontier)
        cache.materialize()
        (folder,) = store_folders(tmp_path / "cache")
        names.add(folder.name)
    assert len(names) == 3
    cache.close()
    assert len(store_folders(tmp_path / "cache")) == 1, "the last one stays for inspection"


def test_the_boundary_may_move_in_the_middle_of_an_epoch(units: Units, tmp_path: Path) -> None:
    cache, plain = make_cache(units, tmp_path / "cache"), make_cache(units, None)
    order = batches_of(ORDERS["train"], BATCH)
    streams = zip(cache.batches("train", order), plain.batches("train", order), strict=True)
    for step, (one, other) in enumerate(streams):
        assert torch.equal(one, other)
        if step in (1, 3):
            units.freeze(step + 1)
            assert cache.materialize() is not None
    assert step == 4
    assert cache.boundary == 4
    # Two batches and one filling from the pixels, everything after that from stores.
    assert cache.inputs["train"].served == 2 * BATCH + 37
    assert cache.rows_served == 37 - 2 * BATCH


@pytest.mark.parametrize("writable", [True, False])
def test_a_store_that_is_damaged_in_the_middle_of_an_epoch_is_mended_or_given_up(
    units: Units, tmp_path: Path, writable: bool
) -> None:
    units.freeze(2)
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", warn=told.append)
    cache.materialize()
    assert cache.store is not None
    folder = cache.store.folder
    found = []
    with file_size_limit(2**40 if writable else 2000):
        for batch in cache.batches("train", batches_of(ORDERS["train"], BATCH)):
            found.append(batch)
            if len(found) == 2:
                for path in (folder / "train").glob("c.*"):
                    os.truncate(path, 1000)
    assert torch.equal(torch.cat(found), everything(make_cache(units, None))["train"])
    assert len(told) == 1
    assert "group1_block1" in told[0]
    if writable:
        assert "computed and written once more" in told[0]
        assert list(cache.store.damage()) == []
        assert cache.prefix_unit_rows_computed == 2 * (47 + 37)
    else:
        assert "File too large" in told[0]
        assert "computed instead" in told[0]
        assert cache.boundary == 0
        assert not folder.exists()
        # And it may try again.
        assert cache.materialize() is not None
    assert_serves_what_is_computed(cache)


def test_a_store_that_is_damaged_again_and_again_is_given_up(units: Units, tmp_path: Path) -> None:
    units.freeze(2)
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", warn=told.append)
    cache.materialize()
    assert cache.store is not None
    folder = cache.store.folder
    found = []
    for batch in cache.batches("train", batches_of(ORDERS["train"], BATCH)):
        found.append(batch)
        for path in (folder / "train").glob("c.*"):
            path.unlink()
            path.touch()
        cache.store and cache.store.put_away()  # what is open is still whole
    assert torch.equal(torch.cat(found), everything(make_cache(units, None))["train"])
    assert ["written once more" in told[0], "computed instead" in told[1]] == [True, True]
    assert len(told) == 2


def test_what_would_exceed_the_budget_is_not_cached_and_said_in_one_line(
    units: Units, tmp_path: Path
) -> None:
    units.freeze(1)
    told: list[str] = []
    limit = 47 * 16 * 16 * 16 * 4 + 20_000  # the rows and some metadata, and not twice that
    cache = make_cache(units, tmp_path / "cache", max_bytes=limit, warn=told.append)
    assert cache.materialize() is not None
    units.freeze(2)
    assert cache.materialize() is None, "old and new store together are too large"
    assert cache.boundary == 1
    assert len(told) == 1
    assert "--cache-max-gb" in told[0]
    assert len(store_folders(tmp_path / "cache")) == 1
    assert_serves_what_is_computed(cache)


def test_a_full_disk_costs_the_store_and_nothing_else(units: Units, tmp_path: Path) -> None:
    units.freeze(2)
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", warn=told.append)
    with file_size_limit(100_000):  # a chunk has 786 kB
        assert cache.materialize() is None
    assert len(told) == 1
    assert "cannot be written" in told[0]
    assert store_folders(tmp_path / "cache") == []
    assert_serves_what_is_computed(cache)


@pytest.mark.parametrize("where", ["", "train"])
def test_permission_that_is_lost_while_filling_costs_the_store_and_nothing_else(
    units: Units, tmp_path: Path, ordinary_user: None, where: str
) -> None:
    units.freeze(2)
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", warn=told.append)
    inputs = cache.inputs["val"]
    real = inputs.batches

    def batches(order: object) -> object:
        (folder,) = store_folders(tmp_path / "cache")
        (folder / "val").chmod(0o555)
        if where == "":
            folder.chmod(0o555)
        return real(order)  # type: ignore[arg-type]

    inputs.batches = batches  # type: ignore[method-assign, assignment]
    assert cache.materialize() is None
    inputs.batches = real  # type: ignore[method-assign]
    assert told == [
        "the store after group1_block1 cannot be written (Permission denied): not cached"
    ]
    assert store_folders(tmp_path / "cache") == []
    assert_serves_what_is_computed(cache)
    for folder in (tmp_path / "cache").rglob("*"):
        folder.chmod(0o777)


def test_a_disk_that_fails_while_reading_costs_the_store_and_nothing_else(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units.freeze(2)
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", warn=told.append)
    cache.materialize()
    real, calls = os.preadv, 0

    def failing(*args: object) -> int:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", failing)
    served = everything(cache)
    assert_same(served, everything(make_cache(units, None)))
    (sentence,) = told
    assert "Input/output error" in sentence
    assert "computed instead" in sentence


def test_a_cache_folder_that_vanishes_costs_the_store_and_nothing_else(
    units: Units, tmp_path: Path
) -> None:
    units.freeze(1)
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", warn=told.append)
    (tmp_path / "cache" / "CACHEDIR.TAG").unlink()
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file now")
    assert cache.materialize() is None
    assert len(told) == 1
    assert_serves_what_is_computed(cache)


def test_a_store_that_another_run_uses_is_shared_and_not_removed(
    units: Units, tmp_path: Path
) -> None:
    units.freeze(1)
    first = make_cache(units, tmp_path / "cache")
    assert not first.materialize().reused  # type: ignore[union-attr]
    second = make_cache(units, tmp_path / "cache")
    assert second.materialize().reused  # type: ignore[union-attr]
    assert second.prefix_unit_rows_computed == 0
    units.freeze(2)
    second.materialize()
    assert len(store_folders(tmp_path / "cache")) == 2, "the first run still reads the other"
    assert_serves_what_is_computed(first)
    assert_serves_what_is_computed(second)


def test_the_last_store_of_a_finished_run_goes_when_the_next_materialises(
    units: Units, tmp_path: Path
) -> None:
    units.freeze(1)
    first = make_cache(units, tmp_path / "cache")
    first.materialize()
    first.close()
    (left,) = store_folders(tmp_path / "cache")
    other = partition(build("wrn", 3, depth=10, width=1))
    other.freeze(1)
    second = make_cache(other, tmp_path / "cache")
    assert left.exists(), "it can be inspected until then"
    second.materialize()
    assert not left.exists()
    second.close()


@pytest.mark.parametrize(("codec", "stored"), [("raw", None), ("zstd", None), ("lz4", "int8")])
def test_a_damaged_chunk_of_an_earlier_run_is_computed_and_written_once_more(
    units: Units, tmp_path: Path, codec: str, stored: str | None
) -> None:
    units.freeze(2)
    first = make_cache(units, tmp_path / "cache", stored=stored)
    first.materialize(codec=codec)
    rows = everything(first)
    first.close()
    chunk = next((store_folders(tmp_path / "cache")[0] / "val").glob("c.*"))
    whole = chunk.read_bytes()
    content = bytearray(whole)
    content[500] ^= 1
    chunk.write_bytes(content)
    told: list[str] = []
    second = make_cache(units, tmp_path / "cache", stored=stored, warn=told.append)
    assert second.materialize(codec=codec).reused  # type: ignore[union-attr]
    (sentence,) = told
    assert "1 of 2 chunks of the store after group1_block1 is damaged" in sentence
    assert "val: c.0.0.0.0 has a wrong checksum" in sentence
    assert chunk.read_bytes() == whole
    assert second.prefix_unit_rows_computed == 10 * 2, "no row but those of the chunk"
    assert_same(everything(second), rows)
    if stored is None:
        assert_serves_what_is_computed(second)


def test_a_chunk_that_cannot_be_computed_as_it_was_makes_the_whole_store_anew(
    units: Units, tmp_path: Path
) -> None:
    """As on a device whose kernels sum in another order from time to time."""
    units.freeze(1)
    first = make_cache(units, tmp_path / "cache")
    first.materialize()
    first.close()
    for chunk in store_folders(tmp_path / "cache")[0].glob("*/c.*"):
        chunk.unlink()
    told: list[str] = []
    second = make_cache(units, tmp_path / "cache", warn=told.append)
    second.inputs["val"].values[0, 0, 0, 0] += 1  # type: ignore[attr-defined]
    done = second.materialize()
    assert done is not None
    assert not done.reused
    assert "what is computed now is not what it held" in told[0]
    second.verify("val", np.arange(10)[:BATCH])


def test_folders_that_are_not_stores_are_left_alone_whatever_their_names(
    units: Units, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    (photos / ("a" * 32)).mkdir(parents=True)
    (photos / ("a" * 32) / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        make_cache(units, photos)
    # And in a cache of ours, what somebody else put there stays.
    units.freeze(1)
    cache = make_cache(units, tmp_path / "cache")
    (tmp_path / "cache" / ("b" * 32)).mkdir()
    (tmp_path / "cache" / ("b" * 32) / "thesis.txt").write_text("mine")
    (tmp_path / "cache" / "film.partial").write_text("mine")
    assert cache.materialize() is not None
    assert len(list(tmp_path.rglob("thesis.txt"))) == 2
    assert (tmp_path / "cache" / "film.partial").exists()


def test_a_store_that_cannot_be_had_leaves_those_of_earlier_runs(
    units: Units, tmp_path: Path
) -> None:
    units.freeze(1)
    first = make_cache(units, tmp_path / "cache")
    first.materialize()
    first.close()
    units.freeze(2)
    second = make_cache(units, tmp_path / "cache", max_bytes=1000, warn=lambda sentence: None)
    assert second.materialize() is None
    assert len(store_folders(tmp_path / "cache")) == 1


def test_a_reused_store_knows_what_it_spares(units: Units, tmp_path: Path) -> None:
    units.freeze(1)
    first = make_cache(units, tmp_path / "cache")
    first.materialize()
    second = make_cache(units, tmp_path / "cache")
    second.materialize()
    assert second.prefix_seconds_per_row == first.prefix_seconds_per_row > 0


def test_what_was_seen_of_reading_outlives_the_store(units: Units, tmp_path: Path) -> None:
    units.freeze(1)
    cache = make_cache(units, tmp_path / "cache")
    assert cache.seconds_per_byte_read is None
    cache.materialize()
    everything(cache)
    seen = cache.seconds_per_byte_read
    assert seen is not None
    cache.leave()
    assert cache.seconds_per_byte_read == seen
    assert cache.boundary == 0
    assert store_folders(tmp_path / "cache") == []
    assert_serves_what_is_computed(cache)


def test_it_knows_what_is_on_the_disk_even_if_that_is_nothing_at_all(
    units: Units, tmp_path: Path
) -> None:
    units.freeze(2)
    cache = make_cache(units, tmp_path / "cache")
    assert not cache.has(2)
    cache.materialize()
    assert cache.has(2)
    assert not cache.has(1)
    shutil.rmtree(tmp_path / "cache")
    assert not cache.has(2)


def test_without_filling_only_a_store_that_is_there_is_taken(units: Units, tmp_path: Path) -> None:
    units.freeze(1)
    first = make_cache(units, tmp_path / "cache")
    assert first.materialize(fill=False) is None
    first.materialize()
    second = make_cache(units, tmp_path / "cache")
    done = second.materialize(fill=False)
    assert done is not None
    assert done.reused


@pytest.mark.parametrize("stored", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("codec", ["raw", "lz4", "zstd"])
def test_a_store_takes_no_more_than_it_may(
    units: Units, tmp_path: Path, stored: str | None, codec: str
) -> None:
    units.freeze(4)
    cache = make_cache(units, tmp_path / "cache", stored=stored)
    assert cache.materialize(codec=codec) is not None
    assert cache.store is not None
    about = cache.store.description
    assert size_of_tree(cache.store.folder) <= cache.store.bytes + about.overhead_bytes
    if codec == "raw":
        assert size_of_tree(cache.store.folder) <= about.bytes + about.overhead_bytes


def test_compressed_rows_that_do_not_fit_into_memory_are_not_kept(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units.freeze(1)
    first = make_cache(units, tmp_path / "cache")
    first.materialize(codec="zstd")
    first.close()
    monkeypatch.setattr("cachefreeze.stores.memory_for_rows", lambda: 1000)
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", warn=told.append)
    assert cache.materialize(codec="zstd") is None
    assert "of memory" in told[0]
    units.freeze(2)
    assert cache.materialize(codec="lz4") is None
    assert "too much for it" in told[1]
    assert_serves_what_is_computed(cache)


def test_a_store_that_cannot_be_opened_again_costs_only_itself(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed_meanwhile(*args: object) -> None:
        raise StoreError("its marker does not fit its manifest")

    monkeypatch.setattr("cachefreeze.store.write.Store", changed_meanwhile)
    units.freeze(1)
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", warn=told.append)
    assert cache.materialize() is None
    assert "marker does not fit" in told[0]
    assert_serves_what_is_computed(cache)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("boundary", [1, 3])
def test_verifying_passes_over_rows_that_are_right(
    units: Units, tmp_path: Path, codec: str, boundary: int
) -> None:
    units.freeze(4)
    cache = make_cache(units, tmp_path / "cache", autocast_dtype=torch.bfloat16)
    cache.verify("train", np.arange(5))  # without a store there is nothing to be wrong
    assert cache.materialize(boundary, codec) is not None
    before = cache.prefix_unit_rows_computed, cache.rows_served
    cache.verify("train", np.array([36, 0, 17]))
    cache.verify("val", np.arange(8))
    assert (cache.prefix_unit_rows_computed, cache.rows_served) == before


@pytest.mark.parametrize("bit", [1, 1 << 30])
def test_verifying_names_the_row_the_boundary_and_the_difference(
    units: Units, tmp_path: Path, bit: int
) -> None:
    """Of what no checksum sees: rows are read from the files, and these change under them."""
    units.freeze(2)
    cache = make_cache(units, tmp_path / "cache")
    cache.materialize()
    assert cache.store is not None
    (right,) = cache.batches("train", [np.array([17])])
    (chunk,) = (cache.store.folder / "train").glob("c.*")
    with chunk.open("r+b") as file:
        place = 17 * 16 * 16 * 16 * 4 + 400
        file.seek(place)
        (value,) = np.frombuffer(file.read(4), np.uint32)
        file.seek(place)
        file.write(np.uint32(value ^ np.uint32(bit)).tobytes())
    (wrong,) = cache.batches("train", [np.array([17])])
    gap = float((wrong.double() - right.double()).abs().max())
    cache.verify("train", np.array([16, 18]))
    with pytest.raises(UserError) as caught:
        cache.verify("train", np.array([3, 17, 18]))
    told = str(caught.value)
    assert "row 17 of train at boundary 2 (after group1_block1)" in told
    assert f"differs by up to {gap:.3g}" in told
    assert str(cache.store.folder) in told


def test_verifying_rows_that_cannot_be_read_costs_the_store_and_nothing_else(
    units: Units, tmp_path: Path
) -> None:
    units.freeze(2)
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", warn=told.append)
    cache.materialize()
    assert cache.store is not None
    os.truncate(next((cache.store.folder / "val").glob("c.*")), 10)
    cache.verify("val", np.arange(5))
    assert "computed and written once more" in told[0]
    cache.verify("val", np.arange(5))
    assert_serves_what_is_computed(cache)


def test_what_others_are_still_writing_counts_as_what_it_will_be(
    units: Units, tmp_path: Path
) -> None:
    size = 47 * 16 * 16 * 16 * 4
    units.freeze(1)
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", max_bytes=1.9 * size, warn=told.append)
    description = replace(describe(tmp_path / "other", units), fingerprint="f" * 32, created=0.0)
    with closing_writer(StoreWriter(tmp_path / "cache", description)):
        assert cache.materialize() is None
        assert "in use would exceed" in told[0]
    assert cache.materialize() is not None


def test_what_cannot_be_removed_counts(units: Units, tmp_path: Path, ordinary_user: None) -> None:
    units.freeze(1)
    first = make_cache(units, tmp_path / "cache")
    first.materialize()
    first.close()
    (left,) = store_folders(tmp_path / "cache")
    size = size_of_tree(left)
    (left / "lock").chmod(0o444)
    units.freeze(2)
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", max_bytes=1.5 * size, warn=told.append)
    assert cache.materialize() is None
    assert "would exceed" in told[0]
    assert left.exists()


def test_verifying_finds_rows_that_are_no_number(units: Units, tmp_path: Path) -> None:
    units.freeze(2)
    cache = make_cache(units, tmp_path / "cache")
    cache.materialize()
    assert cache.store is not None
    (chunk,) = (cache.store.folder / "train").glob("c.*")
    chunk.write_bytes(b"\xff" * chunk.stat().st_size)
    with pytest.raises(UserError, match="differs by up to inf"):
        cache.verify("train", np.arange(8))


def test_what_a_checkpoint_names_stays_until_another_one_does_not(
    units: Units, tmp_path: Path
) -> None:
    units.freeze(1)
    cache = make_cache(units, tmp_path / "cache")
    cache.materialize()
    named = cache.state_dict()
    cache.release()  # the checkpoint is on disk
    units.freeze(2)
    cache.materialize()
    units.freeze(3)
    cache.materialize()
    # That of boundary 2 was named by none.
    assert {f.name for f in store_folders(tmp_path / "cache")} == {
        named["store"],
        cache.state_dict()["store"],
    }
    assert cache.holds_retired
    cache.leave()
    assert [f.name for f in store_folders(tmp_path / "cache")] == [named["store"]]

    # Whoever goes on from there finds it; and it is not another run's to remove.
    units_of_old = partition(build("wrn", 3, depth=10, width=1))
    units_of_old.freeze(4)
    other = make_cache(units_of_old, tmp_path / "cache")
    other.materialize()
    cache.materialize()
    cache.release()
    assert not cache.holds_retired
    assert named["store"] not in {f.name for f in store_folders(tmp_path / "cache")}
    other.close()


def test_it_goes_on_with_the_store_that_a_checkpoint_names(units: Units, tmp_path: Path) -> None:
    units.freeze(2)
    first = make_cache(units, tmp_path / "cache")
    first.materialize(1)
    named = first.state_dict()
    first.close()
    second = make_cache(units, tmp_path / "cache")
    found = second.load_state_dict(named)
    assert found is not None
    assert (found.boundary, found.reused) == (1, True)
    assert second.prefix_unit_rows_computed == 0
    second.materialize(2)
    assert len(store_folders(tmp_path / "cache")) == 2, "the checkpoint still names the other"
    second.release()
    assert len(store_folders(tmp_path / "cache")) == 1
    third = make_cache(units, tmp_path / "cache")
    assert third.load_state_dict(named) is None, "gone"
    assert third.load_state_dict(make_cache(units, None).state_dict()) is None


def test_nothing_is_written_with_the_cache_off(units: Units, tmp_path: Path) -> None:
    units.freeze(2)
    cache = make_cache(units, None)
    assert cache.materialize() is None
    everything(cache)
    assert cache.rows_served == 0
    assert cache.prefix_unit_rows_computed == 47 * 2
    assert list(tmp_path.iterdir()) == []
