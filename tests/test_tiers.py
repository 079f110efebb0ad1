"""Rows are the same from wherever they are held, and writing them keeps nobody waiting."""

import filecmp
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cachefreeze import PrefixCache, Units, batches_of, holdings, partition, prefix_cache
from cachefreeze import tiers as tiers_module
from cachefreeze.background import WAITING_CHUNKS, ChunkStream, WritingStore
from cachefreeze.encoding import Encoding, as_array
from cachefreeze.errors import Interrupted
from cachefreeze.files import size_of_tree
from cachefreeze.models import build
from cachefreeze.moments import Moments
from cachefreeze.rows import Rows
from cachefreeze.serving import loaded, serve
from cachefreeze.sinks import sink_for
from cachefreeze.staging import BATCHES_AHEAD, StagedRows
from cachefreeze.store import (
    Description,
    Layout,
    Store,
    StoreWriter,
    in_use,
    is_committed,
    prepare_cache_dir,
    read_usage,
    store_folders,
    write,
)
from cachefreeze.store import format as store_format
from cachefreeze.store import read as store_read
from cachefreeze.store.read import RawReader
from cachefreeze.tiers import MemoryReader, Tiers
from cachefreeze.train import main
from cachefreeze.trainer import Trainer

from .conftest import Pixels, Run, Train
from .interrupter import Interrupter, command

CPU = torch.device("cpu")
COUNT = 45


def images(dtype: torch.dtype) -> Tensor:
    """(45, 5, 4, 4), channels-last."""
    values = torch.randn(COUNT, 4, 4, 5, generator=torch.Generator().manual_seed(1))
    return values.to(dtype).permute(0, 3, 1, 2)


def write_store(folder: Path, rows: Tensor, codec: str = "raw") -> tuple[Store, Encoding]:
    """A store of seven rows a chunk."""
    prepare_cache_dir(folder)
    encoding = Encoding.of(rows, None)
    plain = as_array(encoding.encode(rows))
    layout = replace(
        Layout.of(
            COUNT,
            plain.shape[1:],
            plain.dtype.name,
            codec,
            channels_last=encoding.channels_last,
        ),
        rows_per_chunk=7,
    )
    values = str(rows.dtype).removeprefix("torch.")
    about = Description("0" * 32, "net", 1, "unit", values, values, 0.0, {"train": layout}, {})
    writer = StoreWriter(folder, about)
    writer.append("train", plain)
    return writer.commit(), encoding


def read_here(store: Store, encoding: Encoding) -> Rows:
    return serve(store, "train", None, CPU, threads=0)


def read_by_threads(store: Store, encoding: Encoding) -> Rows:
    return serve(store, "train", None, CPU, threads=3)


def in_memory(store: Store, encoding: Encoding) -> Rows:
    memory = loaded(store, Tiers(CPU, "device"))
    assert memory is not None
    return serve(store, "train", memory, CPU, threads=0)


def in_host_memory(store: Store, encoding: Encoding) -> Rows:
    """As it is with a GPU: from the host's memory, by threads."""
    memory = loaded(store, Tiers(CPU, "host"))
    assert memory is not None
    layout = store.description.splits["train"]
    reader = MemoryReader(memory.rows["train"])
    return StagedRows(reader, layout.row_shape, layout.rows, encoding, CPU, "", threads=3)


WAYS = [read_here, read_by_threads, in_memory, in_host_memory]


@pytest.mark.parametrize("codec", ["raw", "lz4"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
class TestEveryWayOfServingRows:
    """What whoever trains relies on, whatever is behind it."""

    @pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def rows(self, request: pytest.FixtureRequest) -> Tensor:
        return images(request.param)

    @pytest.fixture
    def served(
        self,
        way: Callable[[Store, Encoding], Rows],
        codec: str,
        rows: Tensor,
        tmp_path: Path,
    ) -> Iterator[Rows]:
        store, encoding = write_store(tmp_path / "cache", rows, codec)
        store.load()
        yield way(store, encoding)
        store.close()

    def test_they_come_as_they_were_in_any_order(self, served: Rows, rows: Tensor) -> None:
        order = [*batches_of(np.random.default_rng(0).permutation(COUNT), 8), np.array([3, 3, 44])]
        assert len(served) == COUNT
        for indices, x in zip(order, served.batches(order), strict=True):
            assert x.dtype == rows.dtype
            assert torch.equal(x, rows[torch.from_numpy(indices)])
            assert x.is_contiguous(memory_format=torch.channels_last)

    def test_a_batch_that_is_kept_keeps_its_values(self, served: Rows, rows: Tensor) -> None:
        order = batches_of(np.arange(COUNT), 4)
        kept = list(served.batches(order))
        assert torch.equal(torch.cat(kept), rows)

    def test_no_order_gives_no_batches(self, served: Rows) -> None:
        assert list(served.batches([])) == []

    def test_two_passes_at_once_do_not_disturb_each_other(self, served: Rows, rows: Tensor) -> None:
        one, other = np.arange(COUNT), np.arange(COUNT)[::-1].copy()
        passes = served.batches(batches_of(one, 5)), served.batches(batches_of(other, 5))
        pairs = list(zip(*passes, strict=True))
        assert torch.equal(torch.cat([x for x, _ in pairs]), rows)
        assert torch.equal(torch.cat([x for _, x in pairs]), rows.flip(0))

    def test_a_pass_that_is_given_up_leaves_no_thread_and_no_file_behind(
        self, served: Rows
    ) -> None:
        list(served.batches([np.array([0])]))
        files, threads = os.listdir("/proc/self/fd"), threading.active_count()
        batches = served.batches(batches_of(np.arange(COUNT), 2))
        next(batches)
        del batches
        assert threading.active_count() == threads
        # (Files that whoever reads here has open are a bounded few, and stay open.)
        assert len(os.listdir("/proc/self/fd")) <= len(files) + 7


@pytest.mark.parametrize("way", [read_here, read_by_threads], ids=lambda way: way.__name__)
def test_a_chunk_that_is_gone_is_an_error_and_the_others_are_served(
    way: Callable[[Store, Encoding], Rows], tmp_path: Path
) -> None:
    rows = images(torch.float32)
    store, encoding = write_store(tmp_path / "cache", rows)
    (store.folder / "train" / store.description.splits["train"].chunk_name(5)).unlink()
    with pytest.raises(OSError, match="No such file"):
        list(way(store, encoding).batches(batches_of(np.arange(COUNT), 7)))
    seen = list(way(store, encoding).batches(batches_of(np.arange(35), 7)))
    assert torch.equal(torch.cat(seen), rows[:35])
    store.close()


def test_rows_go_to_the_first_tier_that_has_room() -> None:
    assert Tiers(CPU).first_with_room(1) == "disk", "without a GPU the page cache does"
    tiers = Tiers(CPU, "device", device_bytes=1000)
    assert tiers.first_with_room(1000) == "device"
    assert tiers.first_with_room(1000, beside=1) == "host"
    assert tiers.first_with_room(1e18) == "disk"
    assert Tiers(CPU, "host", device_bytes=1000).first_with_room(1) == "host"
    assert Tiers(CPU, "disk", device_bytes=1000).first_with_room(1) == "disk"


def described(rows: int) -> Description:
    layout = Layout.of(rows, (250,), "float32")
    values = "float32"
    return Description("0" * 32, "", 1, "", values, values, 0.0, {"train": layout}, {})


def test_old_rows_and_new_ones_share_the_room() -> None:
    tiers, encoding = (
        Tiers(CPU, "device", device_bytes=2500),
        Encoding(torch.float32, "float32", False),
    )
    old = tiers.memory_for(described(2), encoding)
    assert old is not None
    assert (old.tier, old.bytes) == ("device", 2000)
    beside = tiers.memory_for(described(1), encoding)
    assert beside is not None
    assert beside.tier == "host"
    del old
    alone = tiers.memory_for(described(1), encoding)
    assert alone is not None
    assert alone.tier == "device"


def test_memory_that_cannot_be_had_is_done_without() -> None:
    tiers = Tiers(CPU, "device", device_bytes=float("inf"))
    encoding = Encoding(torch.float32, "float32", False)
    assert tiers.memory_for(described(10**13), encoding) is None


# Whole caches.

BATCH = 8
ORDERS = {"train": np.random.default_rng(0).permutation(37), "val": np.arange(10)}


@pytest.fixture
def units() -> Units:
    units = partition(build("wrn", 3, depth=10, width=1).to(memory_format=torch.channels_last))
    units.freeze(4)
    return units


def make_cache(units: Units, directory: Path | None, **options: object) -> PrefixCache:
    inputs = {"train": Pixels(37, 1), "val": Pixels(10, 2)}
    options = {"batch_size": BATCH, "keep": False, **options}
    return PrefixCache(units, inputs, directory=directory, **options)  # type: ignore[arg-type]


def everything(cache: PrefixCache) -> dict[str, Tensor]:
    return {
        split: torch.cat(list(cache.batches(split, batches_of(order, BATCH))))
        for split, order in ORDERS.items()
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert all(torch.equal(one[split], other[split]) for split in ORDERS)


TIERS = [
    {"tier": "disk", "threads": 3},
    {"tier": "host"},
    {"tier": "device", "threads": 2},
    {"tier": "device", "device_bytes": 0},
    {"tier": "disk", "threads": 3, "stored": "int8"},
    {"tier": "device", "stored": "int8"},
]


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("options", TIERS, ids=lambda o: "-".join(map(str, o.values())))
def test_stores_are_the_same_to_the_last_byte_whoever_writes_them(
    units: Units, tmp_path: Path, options: dict[str, object], codec: str
) -> None:
    if "stored" in options and codec != "raw":
        pytest.skip("int8 is stored raw here")
    here = make_cache(units, tmp_path / "here", stored=options.get("stored"))
    told: list[str] = []
    there = make_cache(units, tmp_path / "there", warn=told.append, **options)
    for boundary in (2, 4):
        for each in (here, there):
            assert each.materialize(boundary, codec) is not None
        assert there.tier == ("host" if options.get("device_bytes") == 0 else options["tier"])
        assert_same(everything(here), everything(there))
    assert len(told) == (options.get("device_bytes") == 0), "once"
    folders = [each.store.folder for each in (here, there) if each.store is not None]
    here.close()
    there.close()  # waits for what is written in the background
    for split in ORDERS:
        names = sorted(path.name for path in (folders[0] / split).iterdir())
        same = filecmp.cmpfiles(folders[0] / split, folders[1] / split, names, shallow=False)[0]
        assert sorted(same) == names
    with make_cache(units, tmp_path / "there", stored=options.get("stored")) as again:
        found = again.materialize()
        assert found is not None
        assert found.reused


class Gate:
    """Holds back whoever writes a chunk file, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.write = write.write_chunk_file
        monkeypatch.setattr(write, "write_chunk_file", self.pass_through)

    def pass_through(self, *args: object) -> int:
        self.reached.set()
        assert self.opened.wait(30)
        return self.write(*args)  # type: ignore[arg-type]


def test_rows_are_served_before_the_first_of_them_is_on_disk(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    cache = make_cache(units, tmp_path / "cache", tier="device")
    assert cache.materialize() is not None
    store = cache.store
    assert isinstance(store, WritingStore)
    computed = cache.prefix_unit_rows_computed
    assert_same(everything(cache), everything(make_cache(units, None)))
    assert cache.prefix_unit_rows_computed == computed
    assert not (store.folder / "COMMITTED").exists()
    assert store.bytes == store.description.bytes
    gate.opened.set()
    cache.finish()
    assert (store.folder / "COMMITTED").exists()
    assert store.bytes == sum(p.stat().st_size for p in store.folder.glob("*/c.*"))
    cache.close()


def test_a_store_nobody_needs_any_more_is_not_written_to_its_end(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    cache = make_cache(units, tmp_path / "cache", tier="device")
    cache.materialize(2)
    first = cache.store
    assert first is not None
    assert gate.reached.wait(30)
    threading.Timer(0.2, gate.opened.set).start()
    cache.materialize(4)
    assert_same(everything(cache), everything(make_cache(units, None)))
    assert not first.folder.exists()
    cache.close()
    assert cache.prefix_unit_rows_computed == 47 * 4


@pytest.mark.parametrize("keep", [True, False])
def test_what_later_runs_or_checkpoints_may_want_is_written_to_its_end(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    gate = Gate(monkeypatch)
    cache = make_cache(units, tmp_path / "cache", tier="device", keep=keep)
    cache.materialize(2)
    first = cache.store
    assert first is not None
    cache.release()  # a checkpoint names it
    cache.materialize(4)  # which does not wait for the gate
    assert cache.boundary == 4
    if not keep:
        assert cache.holds_retired
    gate.opened.set()
    cache.finish()
    assert (first.folder / "COMMITTED").exists()
    assert (first.folder / "kept").exists() == keep
    cache.release()
    assert first.folder.exists() == keep
    assert not cache.holds_retired
    cache.close()


def test_a_disk_that_is_full_in_the_background_costs_the_store_and_nothing_else(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_chunk_file", full)
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", tier="device", warn=told.append)
    assert cache.materialize() is not None
    cache.finish()
    for _ in range(2):
        assert_same(everything(cache), everything(make_cache(units, None)))
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert "served from memory" in told[0]
    assert cache.store is not None
    assert not cache.store.folder.exists()
    assert cache.store.bytes == cache.bytes_in_use == 0
    cache.close()


def test_rows_whose_store_could_not_be_written_leave_the_memory_when_they_are_left(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_chunk_file", full)
    cache = make_cache(units, tmp_path / "cache", tier="device", warn=lambda sentence: None)
    assert cache.materialize() is not None
    store = cache.store
    assert isinstance(store, WritingStore)
    store.wait()
    cache.leave()
    assert store.error is not None
    assert cache.tiers._taken_bytes == 0
    cache.close()


def test_what_was_read_from_a_store_says_nothing_of_the_next(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it is known later what reading took."""
    cache = make_cache(units, tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(Moments, "has_come", lambda moments, moment: False)
        cache.materialize(2)
        everything(cache)
        cache.materialize(4)
    cache.finish()
    assert cache.read_seconds > 0
    assert cache.seconds_per_byte_read is None
    everything(cache)
    assert cache.seconds_per_byte_read is not None
    cache.close()


def test_rows_in_memory_say_nothing_of_what_reading_takes(units: Units, tmp_path: Path) -> None:
    for tier, known in (("device", False), ("disk", True)):
        with make_cache(units, tmp_path / "cache", tier=tier) as cache:
            cache.materialize()
            everything(cache)
            assert cache.read_seconds > 0
            assert (cache.seconds_per_byte_read is not None) == known


def test_a_chunk_stream_takes_no_more_memory_than_it_says() -> None:
    layout = replace(Layout.of(100, (4,), "float32"), rows_per_chunk=1)
    taken: queue.SimpleQueue[int] = queue.SimpleQueue()
    opened = threading.Event()
    put: list[int] = []

    def slow(split: str, number: int, rows: Tensor) -> None:
        assert opened.wait(30)
        assert torch.equal(rows, torch.full((1, 4), float(number)))
        put.append(number)

    stream = ChunkStream({"train": layout}, torch.float32, CPU, slow, threads=2)

    def give() -> None:
        for number in range(100):
            stream.append("train", torch.full((1, 4), float(number)))
            taken.put(number)

    giver = threading.Thread(target=give)
    giver.start()
    for _ in range(2 + WAITING_CHUNKS):
        taken.get(timeout=30)
    with pytest.raises(queue.Empty):
        taken.get(timeout=0.2)
    opened.set()
    giver.join()
    stream.finish()
    assert sorted(put) == list(range(100))


def test_where_no_thread_can_be_started_each_chunk_is_put_once_and_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first is; the executor keeps the task of the next, though it says that it failed."""
    layout = replace(Layout.of(20, (4,), "float32"), rows_per_chunk=1)
    opened, started, real = threading.Event(), [], threading.Thread.start
    put: list[int] = []

    def start(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) > 1:
            raise RuntimeError("can't start new thread")
        real(thread)

    def slow(split: str, number: int, rows: Tensor) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert opened.wait(30)
        assert torch.equal(rows, torch.full((1, 4), float(number)))
        put.append(number)

    monkeypatch.setattr(threading.Thread, "start", start)
    stream = ChunkStream({"train": layout}, torch.float32, CPU, slow, threads=2)
    for number in range(20):
        stream.append("train", torch.full((1, 4), float(number)))
    assert len(started) > 1, "or this tests nothing"
    opened.set()
    stream.finish()
    assert sorted(put) == list(range(20))


def test_whoever_goes_on_with_a_store_finds_the_chunks_that_follow_one_another(
    tmp_path: Path,
) -> None:
    rows = images(torch.float32)
    store, _ = write_store(tmp_path / "whole", rows)
    about = store.description
    plain = as_array(Encoding.of(rows, None).encode(rows))
    prepare_cache_dir(tmp_path / "cache")
    writer = StoreWriter(tmp_path / "cache", about)
    for number in (1, 3, 0):  # as threads may end
        writer.write_chunk("train", number, plain[7 * number : 7 * number + 7])
    writer.suspend()
    writer = StoreWriter(tmp_path / "cache", about)
    assert writer.held == {"train": 14}
    for number in (6, 2, 5, 4, 3):
        writer.write_chunk("train", number, plain[7 * number : 7 * number + 7])
    again = writer.commit()
    assert list(again.damage()) == []
    assert [r.checksums for r in again.readers.values()] == [
        r.checksums for r in store.readers.values()
    ]
    again.close()
    store.close()


def test_nothing_is_written_any_more_when_a_store_has_been_left_to_a_later_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = images(torch.float32)
    store, encoding = write_store(tmp_path / "whole", rows)
    about = store.description
    store.close()
    gate, unlocked = Gate(monkeypatch), []
    passed = gate.pass_through

    def pass_through(path: Path, *rest: object) -> int:
        checksum = passed(path, *rest)
        if not in_use(path.parents[1]):
            unlocked.append(path.name)
        return checksum

    monkeypatch.setattr(write, "write_chunk_file", pass_through)
    prepare_cache_dir(tmp_path / "cache")
    writer = StoreWriter(tmp_path / "cache", about)
    sink = sink_for(writer, torch.float32, CPU, None, threads=2)
    sink.append("train", encoding.encode(rows)[:28])
    assert gate.reached.wait(30)
    threading.Timer(0.2, gate.opened.set).start()
    sink.suspend()
    writing = [t for t in threading.enumerate() if t.name.startswith("cachefreeze-chunks")]
    for thread in writing:
        thread.join(30)
    assert unlocked == []
    again = StoreWriter(tmp_path / "cache", about)
    assert again.held["train"] == 7 * len(list(again.folder.glob("train/c.*")))
    again.abort()


def test_a_store_may_be_kept_when_it_has_been_written(units: Units, tmp_path: Path) -> None:
    with make_cache(units, tmp_path / "cache", tier="device") as cache:
        cache.materialize()
        cache.finish()
        store = cache.store
        assert isinstance(store, WritingStore)
        assert not (store.folder / "kept").exists()
        store.keep()
        assert (store.folder / "kept").exists()


def test_a_store_of_an_earlier_run_is_loaded_into_memory(units: Units, tmp_path: Path) -> None:
    with make_cache(units, tmp_path / "cache") as cache:
        cache.materialize()
    with make_cache(units, tmp_path / "cache", tier="device") as cache:
        found = cache.materialize()
        assert found is not None
        assert found.reused
        assert cache.tier == "device"
        assert cache.store is not None
        for path in cache.store.folder.glob("*/c.*"):
            path.unlink()  # nobody reads it any more
        assert_same(everything(cache), everything(make_cache(units, None)))


def open_files(folder: Path) -> list[str]:
    """Of chunks, by this process."""
    files = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    paths = (os.readlink(file) for file in files if os.path.lexists(file))
    return [path for path in paths if path.startswith(f"{folder}/") and "/c." in path]


@pytest.mark.parametrize("codec", ["raw", "lz4"])
@pytest.mark.parametrize("threads", [0, 3])
def test_rows_that_have_been_loaded_leave_the_files_and_memory_that_they_came_from(
    tmp_path: Path, codec: str, threads: int
) -> None:
    rows = images(torch.float32)
    store, encoding = write_store(tmp_path / "cache", rows, codec)
    store.load()
    decoded = getattr(store.readers["train"], "_rows", np.empty(0))
    held = weakref.ref(decoded)
    del decoded
    list(read_here(store, encoding).batches([np.arange(COUNT)]))
    assert open_files(store.folder) or codec != "raw", "or this tests nothing"
    assert held() is not None or codec == "raw", "or this tests nothing"
    memory = loaded(store, Tiers(CPU, "device"), threads=threads)
    assert memory is not None
    assert open_files(store.folder) == []
    assert held() is None
    served = serve(store, "train", memory, CPU, threads=0).batches([np.arange(COUNT)])
    assert torch.equal(next(served), rows)
    store.close()


@pytest.mark.parametrize("threads", [0, 3])
def test_rows_are_loaded_by_as_many_threads_as_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    store, _ = write_store(tmp_path / "cache", images(torch.float32))
    together, real, readers = threading.Barrier(3), RawReader.read, []

    def read(reader, indices, out):
        readers.append(threading.current_thread())
        if threads and len(readers) <= 3:
            together.wait(30)
        real(reader, indices, out)

    monkeypatch.setattr(RawReader, "read", read)
    assert loaded(store, Tiers(CPU, "device"), threads=threads) is not None
    assert len(readers) == 7
    assert (set(readers) == {threading.main_thread()}) == (threads == 0)
    assert len(set(readers)) <= max(threads, 1)
    store.close()


@pytest.mark.parametrize("threads", [0, 3])
def test_loading_stops_within_a_chunk_and_leaves_a_store_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    rows = images(torch.float32)
    store, encoding = write_store(tmp_path / "cache", rows)
    tiers, asked, real = Tiers(CPU, "device"), 0, RawReader.read
    read: list[int] = []

    def counted(reader, indices, out):
        read.append(int(indices[0]))
        real(reader, indices, out)

    def stopping() -> bool:
        nonlocal asked
        asked += 1
        return asked == 2

    monkeypatch.setattr(RawReader, "read", counted)
    running = threading.active_count()
    with pytest.raises(Interrupted) as caught:
        loaded(store, tiers, threads=threads, stopping=stopping)
    # (With what was raised still at hand, and the frames that it came from.)
    assert threading.active_count() == running
    assert asked == 2
    assert len(read) == 2 if not threads else len(read) <= 2 + BATCHES_AHEAD
    del caught
    assert torch.equal(torch.cat(list(read_here(store, encoding).batches([np.arange(45)]))), rows)
    store.close()


def test_decoding_what_was_just_written_can_be_interrupted_and_the_store_is_there(
    units: Units, tmp_path: Path
) -> None:
    def stopping() -> bool:
        return any((tmp_path / "cache").glob("*/COMMITTED"))

    options: dict[str, object] = {"keep": True}
    with (
        make_cache(units, tmp_path / "cache", stopping=stopping, **options) as cache,
        pytest.raises(Interrupted),
    ):
        cache.materialize(2, "zstd")
    (folder,) = store_folders(tmp_path / "cache")
    assert not in_use(folder)
    with make_cache(units, tmp_path / "cache", **options) as cache:
        found = cache.materialize(2, "zstd")
        assert found is not None
        assert found.reused


def test_decoding_what_was_mended_can_be_interrupted(units: Units, tmp_path: Path) -> None:
    with make_cache(units, tmp_path / "cache", keep=True) as cache:
        cache.materialize(2, "zstd")
    chunk = next((tmp_path / "cache").glob("*/train/c.*"))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    told: list[str] = []
    options: dict[str, object] = {"keep": True, "warn": told.append}
    with (
        make_cache(units, tmp_path / "cache", stopping=lambda: bool(told), **options) as cache,
        pytest.raises(Interrupted),
    ):
        cache.materialize(2)
    assert len(told) == 1
    assert "written once more" in told[0]
    assert not in_use(chunk.parents[1])


def test_rows_that_replace_others_may_use_their_memory(units: Units, tmp_path: Path) -> None:
    # Boundary 2 is of 47 x 16 x 16 x 16 floats, boundary 4 of as many or fewer; both do not fit.
    room = 47 * 16 * 16 * 16 * 4 * 1.2
    cache = make_cache(units, tmp_path / "cache", tier="device", device_bytes=room)
    cache.tiers.ladder = ("device", "disk")
    for boundary in (2, 3):
        assert cache.materialize(boundary) is not None
        assert cache.tier == "device"
    assert_same(everything(cache), everything(make_cache(units, None)))
    cache.close()


def test_a_tier_that_was_asked_for_and_has_no_room_is_told_of(units: Units, tmp_path: Path) -> None:
    told: list[str] = []
    room = 47 * 16 * 16 * 16 * 4
    cache = make_cache(units, tmp_path, tier="device", device_bytes=room, warn=told.append)
    cache.materialize(2)
    everything(cache)
    assert not told
    cache.materialize(3)  # in lower memory until the rows before it have left theirs
    everything(cache)
    assert (told, cache.tier) == ([], "device")
    cache.close()
    cache = make_cache(units, tmp_path, tier="device", device_bytes=room - 1, warn=told.append)
    cache.materialize(2)
    everything(cache)
    everything(cache)
    assert [line.partition(" (")[0] for line in told] == [
        f"the rows after {units.names[1]} do not fit where they were asked for"
    ]
    assert told[0].endswith("from tier host")
    cache.close()


def test_a_run_without_its_units_left_idle_counts_every_row(units: Units, tmp_path: Path) -> None:
    for options in ({"tier": "device"}, {"tier": "disk", "threads": 3}, {}):
        with make_cache(units, tmp_path / "cache", **options) as cache:
            cache.materialize()
            everything(cache)
            cache.finish()
            assert cache.rows_served == 47
            assert cache.read_seconds > 0
            cache.leave()
            everything(cache)
            assert cache.compute_seconds > 0


def test_room_of_rows_counts_as_taken_while_a_pass_over_them_is_suspended(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at a freeze in the middle of an epoch: the loop's iterator still has the old rows."""
    room = 47 * 16 * 16 * 16 * 4 * 1.2
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    real = tiers_module._allocated

    def counted(tier, shapes, dtype, place):
        nonlocal most
        memory = real(tier, shapes, dtype, place)
        if memory is not None and tier == "device":
            alive.extend(map(weakref.ref, memory.rows.values()))
            most = max(most, sum(t.nbytes for r in alive if (t := r()) is not None))
        return memory

    monkeypatch.setattr(tiers_module, "_allocated", counted)
    cache = make_cache(units, tmp_path / "cache", tier="device", device_bytes=room)
    cache.tiers.ladder = ("device", "disk")
    assert cache.materialize(2) is not None
    passing = cache.batches("train", batches_of(ORDERS["train"], BATCH))
    next(passing)
    assert cache.materialize(3) is not None
    assert cache.tier == "disk"
    rows = torch.cat(list(passing))
    assert cache.tier == "device", "once the old rows have left it"
    assert torch.equal(rows, everything(make_cache(units, None))["train"][BATCH:])
    cache.close()
    assert most <= room


def test_two_compressed_stores_in_the_background_keep_within_the_budget(
    units: Units, tmp_path: Path
) -> None:
    with make_cache(units, tmp_path / "one") as cache:
        one = cache.materialize(1, "zstd")
        assert one is not None
    budget = one.bytes * 1.6  # the next is of the same size: both do not fit
    told: list[str] = []
    cache = make_cache(
        units, tmp_path / "cache", tier="device", keep=True, max_bytes=budget, warn=told.append
    )
    cache.materialize(1, "zstd")
    cache.materialize(2, "zstd")
    cache.finish()
    assert size_of_tree(tmp_path / "cache") <= budget
    cache.close()


def test_where_the_device_has_no_memory_the_host_has_to_have_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = tiers_module._allocated
    monkeypatch.setattr(tiers_module, "memory_for_rows", lambda: 500.0)
    monkeypatch.setattr(
        tiers_module,
        "_allocated",
        lambda tier, *rest: None if tier == "device" else real(tier, *rest),
    )
    tiers = Tiers(CPU, "device", device_bytes=1e9)
    assert tiers.memory_for(described(1), Encoding(torch.float32, "float32", False)) is None


def test_whatever_ends_the_background_writer_is_told_and_leaves_no_lock(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> int:
        raise RuntimeError("CUDA error: out of memory")  # pinned memory cannot be had, say

    monkeypatch.setattr(write, "write_chunk_file", fail)
    shown: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: shown.append(failed.exc_value))
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", tier="device", warn=told.append)
    assert cache.materialize() is not None
    store = cache.store
    assert store is not None
    cache.finish()
    assert [type(error) for error in shown] == [RuntimeError], "whose fault it is must be found"
    assert_same(everything(cache), everything(make_cache(units, None)))
    cache.close()
    assert len(told) == 1
    assert not in_use(store.folder)


def test_a_store_that_is_kept_and_cannot_be_written_after_it_was_left_is_told_of(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, real = threading.Event(), write.write_chunk_file

    def full(path: Path, *rest: object) -> int:
        assert opened.wait(30)
        if first.folder in path.parents:
            raise OSError(28, "No space left on device")
        return real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(write, "write_chunk_file", full)
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", tier="device", keep=True, warn=told.append)
    cache.materialize(2)
    assert cache.store is not None
    first = cache.store
    cache.materialize(4)
    opened.set()
    cache.finish()
    cache.close()
    assert len(told) == 1
    assert "No space left on device" in told[0]


def test_loading_that_is_interrupted_leaves_a_cache_that_serves_right_rows(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_cache(units, tmp_path / "cache", keep=True) as cache:
        cache.materialize(2)
        cache.materialize(4)
    cache = make_cache(units, tmp_path / "cache", tier="device", keep=True)
    cache.materialize(2)

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(holdings, "loaded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.materialize(4)
    assert_same(everything(cache), everything(make_cache(units, None)))
    cache.close()


def test_ctrl_c_is_heeded_while_a_store_is_loaded_into_memory(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_cache(units, tmp_path / "cache", keep=True) as cache:
        cache.materialize()
        folder = cache.store.folder if cache.store is not None else tmp_path
    real, asked = holdings.loaded, threading.Event()

    def asked_meanwhile(*args, **options):
        asked.set()
        return real(*args, **options)

    monkeypatch.setattr(holdings, "loaded", asked_meanwhile)
    cache = make_cache(units, tmp_path / "cache", tier="device", stopping=asked.is_set)
    with pytest.raises(Interrupted):
        cache.materialize()
    assert (cache.store, cache.boundary) == (None, 0)
    assert not in_use(folder)
    asked.clear()
    assert_same(everything(cache), everything(make_cache(units, None)))
    cache.close()


def test_what_goes_wrong_while_memory_is_asked_for_leaves_the_store_to_others(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("the device is gone")

    cache = make_cache(units, tmp_path / "cache", tier="device")
    with monkeypatch.context() as patched:
        patched.setattr(tiers_module, "_allocated", broken)
        with pytest.raises(RuntimeError, match="gone"):
            cache.materialize()
    assert not in_use(tmp_path / "cache" / cache.fingerprint(units.frontier))
    with make_cache(units, tmp_path / "cache") as other:
        assert other.materialize() is not None
    cache.close()


def test_the_seconds_of_a_store_that_is_loaded_hold_the_loading(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = holdings.loaded

    def slow(*args, **options):
        time.sleep(0.3)
        return real(*args, **options)

    monkeypatch.setattr(holdings, "loaded", slow)
    with make_cache(units, tmp_path / "cache", keep=True) as cache:
        cache.materialize()
    with make_cache(units, tmp_path / "cache", tier="device") as cache:
        found = cache.materialize()
        assert found is not None
        assert found.seconds > 0.3


def test_a_kept_store_that_is_written_while_it_is_released_is_let_go_of(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may end between two looks at whether it has."""
    gate = Gate(monkeypatch)
    cache = make_cache(units, tmp_path / "cache", tier="device", keep=True)
    cache.materialize(2)
    first = cache.store
    assert isinstance(first, WritingStore)
    cache.materialize(4)
    real, looks = holdings._is_being_written, 0

    def ends_after_the_first_look(store: object) -> bool:
        nonlocal looks
        if store is not first:
            return real(store)  # type: ignore[arg-type]
        looks += 1
        if looks > 1:
            gate.opened.set()
            first.wait()
        return looks == 1

    with monkeypatch.context() as patched:
        patched.setattr(holdings, "_is_being_written", ends_after_the_first_look)
        cache.release()
    gate.opened.set()
    cache.finish()
    cache.release()
    assert not in_use(first.folder)
    cache.close()


def test_batches_asked_for_one_by_one_open_no_file_twice(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`PrefixCache.batch` in a loop of one's own, with threads as beside a GPU."""
    opened: list[Path] = []
    real = store_read.open_regular

    def counted(path, flags, *rest):
        opened.append(Path(path))
        return real(path, flags, *rest)

    cache = make_cache(units, tmp_path / "cache", tier="disk", threads=3)
    cache.materialize()
    monkeypatch.setattr(store_read, "open_regular", counted)
    for _ in range(10):
        for rows in batches_of(np.arange(37), BATCH):
            cache.batch(rows)
    chunks = {path for path in opened if path.name.startswith("c.")}
    assert len(opened) <= 4 * len(chunks)
    cache.close()


def test_a_precision_that_was_set_by_torchs_newer_names_does_no_harm(
    units: Units, tmp_path: Path
) -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has no such names")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with make_cache(units, tmp_path / "cache") as cache:
            assert cache.materialize() is not None
    finally:
        matmul.fp32_precision = before
        torch.set_float32_matmul_precision("highest")


def test_int8_rows_are_decoded_without_a_copy_to_the_device_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy from memory that is not pinned waits for a GPU, in every step."""
    x = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    encoding = Encoding.of(x, "int8")
    stored = encoding.encode(x)
    encoding.decode(stored, CPU)
    made, real = [], torch.tensor

    def counted(*args, **kwargs):
        made.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", counted)
    encoding.decode(stored, CPU)
    assert not made


def test_memory_is_filled_whole_where_a_killed_run_had_written_a_part(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_format, "CHUNK_BYTES", 4 * 16 * 16 * 16 * 4)  # 4 rows
    asked = 0

    def stopping() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    with (
        make_cache(units, tmp_path / "cache", stopping=stopping) as cache,
        pytest.raises(Interrupted),
    ):
        cache.materialize(2)
    there = set((tmp_path / "cache").glob("*/*/c.*"))
    written: list[Path] = []
    real = write.write_chunk_file

    def noted(path: Path, *rest: object) -> int:
        written.append(path)
        return real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(write, "write_chunk_file", noted)
    cache = make_cache(units, tmp_path / "cache", tier="device", keep=True)
    found = cache.materialize(2)
    assert found is not None
    assert_same(everything(cache), everything(make_cache(units, None)))
    store = cache.store
    assert isinstance(store, WritingStore)
    assert sum(store._writer.held.values()) > 0, "or this tests nothing"
    cache.finish()
    assert store.bytes == sum(p.stat().st_size for p in store.folder.glob("*/c.*")), "written twice"
    assert there, "or this tests nothing"
    assert sorted([*there, *written]) == sorted(store.folder.glob("*/c.*"))
    cache.close()
    with make_cache(units, tmp_path / "cache") as again:
        reused = again.materialize(2)
        assert reused is not None
        assert reused.reused
        assert_same(everything(again), everything(make_cache(units, None)))


def test_rows_in_the_hosts_memory_take_no_room_on_the_device() -> None:
    encoding = Encoding(torch.float32, "float32", False)
    tiers = Tiers(CPU, "device", device_bytes=2500)
    small, large = (
        tiers.memory_for(described(1), encoding),
        tiers.memory_for(described(9), encoding),
    )
    assert small is not None
    assert large is not None
    assert (small.tier, large.tier) == ("device", "host")
    other = tiers.memory_for(described(1), encoding)
    assert other is not None
    assert other.tier == "device"


def test_a_pass_reads_no_more_batches_ahead_than_it_says_and_no_fewer(tmp_path: Path) -> None:
    asked: list[int] = []
    announced: list[int] = []

    class Reader:
        def read(self, indices, out):
            asked.append(int(indices[0]))
            out[:] = 0

        def will_need(self, indices):
            announced.append(int(indices[0]))

    encoding = Encoding(torch.float32, "float32", False)
    rows = StagedRows(Reader(), (2,), 100, encoding, CPU, "", threads=2, ahead=4)  # type: ignore[arg-type]
    threads = threading.active_count()
    batches = rows.batches([np.array([n]) for n in range(20)])
    next(batches)
    end = time.monotonic() + 5
    while len(asked) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(asked) == [0, 1, 2, 3, 4]
    assert sorted(announced) == [4, 5, 6, 7, 8]
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads


@pytest.mark.parametrize("tier", ["device", "host"])
def test_rows_that_lost_precision_are_on_disk_before_a_checkpoint_can_name_them(
    units: Units, tmp_path: Path, tier: str
) -> None:
    with make_cache(units, tmp_path / "cache", tier=tier, stored="int8") as cache:
        assert cache.materialize() is not None
        assert isinstance(cache.store, Store)
        assert (cache.store.folder / "COMMITTED").exists()
        assert cache.tier == tier


def test_a_chunk_that_fails_while_rows_are_loaded_leaves_them_on_the_disk(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_cache(units, tmp_path / "cache", keep=True) as cache:
        cache.materialize()
    real, reads = RawReader.read, 0

    def fails_once(reader, indices, out):
        nonlocal reads
        reads += 1
        if reads == 1:
            raise OSError(5, "Input/output error")
        real(reader, indices, out)

    monkeypatch.setattr(RawReader, "read", fails_once)
    with make_cache(units, tmp_path / "cache", tier="device", keep=True) as cache:
        found = cache.materialize()
        assert found is not None
        assert cache.tier == "disk"
        assert_same(everything(cache), everything(make_cache(units, None)))


def test_a_store_that_is_kept_is_waited_for_at_the_end_and_not_by_release(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, real = threading.Event(), write.write_chunk_file

    def slow(path: Path, *rest: object) -> int:
        if first.folder in path.parents:
            assert opened.wait(30)
        return real(path, *rest)  # type: ignore[arg-type]

    gate = Gate(monkeypatch)
    cache = make_cache(units, tmp_path / "cache", tier="device", keep=True)
    cache.materialize(2)
    assert isinstance(cache.store, WritingStore)
    first = cache.store
    assert gate.reached.wait(30)
    monkeypatch.setattr(write, "write_chunk_file", slow)  # the first is held back once more
    cache.materialize(4)
    assert isinstance(cache.store, WritingStore)
    cache.store.wait()
    releasing = threading.Thread(target=cache.release)
    releasing.start()
    releasing.join(2)
    waited = releasing.is_alive()
    threading.Timer(0.5, gate.opened.set).start()
    threading.Timer(0.5, opened.set).start()
    releasing.join()
    assert not waited, "a checkpoint waited for the disk"
    cache.finish()
    assert (first.folder / "COMMITTED").exists()
    cache.close()


# Whole runs.

SCHEDULE = ("--arch", "wrn10_1", "--epochs", 6, "--t0", 0.25, "--schedule", "linear", "--lr", 0.05)


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_a_run_ends_with_the_same_weights_wherever_its_rows_are_held(
    train: Train, monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    plain = train(*SCHEDULE, "--no-cache")
    # As beside a GPU.
    monkeypatch.setattr(prefix_cache, "default_threads", lambda device: 3)
    run = train(*SCHEDULE, "--cache-tier", tier)
    assert run.summary["weights_sha256"] == plain.summary["weights_sha256"]
    events = run.summary["cache"]["boundaries"]
    assert len(events) >= 2
    assert {event["tier"] for event in events} == {tier}
    assert run.summary["cache"]["rows_served"] > 3 * 150
    # It was waited for, at the end.
    assert (Path(run.summary["cache"]["store"]) / "COMMITTED").exists()


def test_a_run_has_waited_for_what_is_written_before_it_sums_up(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its seconds are of materialising, and the sentence about a disk that is full comes first."""
    waited: set[Path] = set()
    opened = threading.Condition()
    real_write, real_wait, real_summary = (
        write.write_chunk_file,
        WritingStore.wait,
        Trainer._summary,
    )
    done: list[bool] = []

    def held_back(path: Path, *rest: object) -> int:
        with opened:
            # (The planner tries the disk in this one.)
            here = threading.current_thread() is threading.main_thread()
            assert here or opened.wait_for(lambda: path.parents[1] in waited, 30)
        return real_write(path, *rest)  # type: ignore[arg-type]

    def wait(store: WritingStore) -> None:
        with opened:
            waited.add(store.folder)
            opened.notify_all()
        real_wait(store)

    def summary(trainer: Trainer) -> dict[str, object]:
        assert isinstance(trainer.cache.store, WritingStore)
        done.append(trainer.cache.store.done)
        return real_summary(trainer)

    monkeypatch.setattr(write, "write_chunk_file", held_back)
    monkeypatch.setattr(WritingStore, "wait", wait)
    monkeypatch.setattr(Trainer, "_summary", summary)
    train(*SCHEDULE, "--cache-tier", "device")
    assert done == [True]


def test_an_interrupted_run_goes_on_with_rows_in_memory(
    images: Path, tmp_path: Path, interrupt: Interrupter
) -> None:
    argv = [*command(images, tmp_path, "wrn"), "--cache-tier", "device"]
    interrupt(12)
    assert main(argv) == 130
    interrupt.no_more()
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert main([*command(images, tmp_path / "other", "wrn"), "--no-cache"]) == 0
    resumed, plain = Run.load(tmp_path / "run"), Run.load(tmp_path / "other" / "run")
    assert resumed.summary["weights_sha256"] == plain.summary["weights_sha256"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--cache-tier", "attic"), "attic"),
        (("--device-cache-gb", -1), "--device-cache-gb -1.0"),
        (("--device", "cpu", "--tf32"), "--tf32 is for CUDA devices"),
        (("--tf32", "--precision", "bf16"), "--tf32 is about float32"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    fails: Callable[..., str], tmp_path: Path, options: tuple[object, ...], what: str
) -> None:
    assert what in fails("--output-dir", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


# What the cache takes is told, and nobody waits for it who has had enough.


def test_what_a_run_waits_for_is_not_counted_as_saved(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of writing, and a filling that came to nothing."""
    gate = Gate(monkeypatch)
    cache = make_cache(units, tmp_path / "cache", tier="device")
    assert cache.materialize(2) is not None
    before = cache.saved_seconds
    threading.Timer(0.3, gate.opened.set).start()
    cache.finish()
    assert cache.saved_seconds < before - 0.2
    cache.close()

    def slow(*args: object) -> bool:
        time.sleep(0.3)
        return True

    given_up = make_cache(units, tmp_path / "other", stopping=slow)
    with pytest.raises(Interrupted):
        given_up.materialize(2)
    assert given_up.saved_seconds < -0.2
    given_up.close()


def test_a_kept_store_is_let_go_of_once_it_is_written_though_nobody_saves(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop without checkpoints never calls `release`."""
    gate = Gate(monkeypatch)
    cache = make_cache(units, tmp_path / "cache", tier="device", keep=True)
    folders = []
    for boundary in (1, 2):
        cache.materialize(boundary)
        assert cache.store is not None
        folders.append(cache.store.folder)
    gate.opened.set()
    cache.finish()
    assert [in_use(folder) for folder in folders] == [False, True]
    cache.close()


def test_ctrl_c_leaves_what_is_being_written_to_a_later_run(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_format, "CHUNK_BYTES", 4 * 16 * 16 * 16 * 4)  # 4 rows
    written = threading.Semaphore(0)
    real = write.write_chunk_file

    def slow(*args):
        time.sleep(0.05)
        written.release()
        return real(*args)

    monkeypatch.setattr(write, "write_chunk_file", slow)
    cache = make_cache(units, tmp_path / "cache", tier="device", threads=1)
    folder = tmp_path / "cache" / cache.fingerprint(2)

    def stopped_in_the_middle() -> None:
        with cache:
            cache.materialize(2)
            for _ in range(3):
                assert written.acquire(timeout=30)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_in_the_middle()
    assert not is_committed(folder)
    assert not in_use(folder)
    later = make_cache(units, tmp_path / "cache")
    done = later.materialize(2)
    assert done is not None
    assert 8 <= done.held < 47
    assert_same(everything(later), everything(make_cache(units, None)))
    later.close()


def test_ctrl_c_is_heeded_while_a_compressed_store_is_written(
    units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)

    def stopping() -> bool:
        if gate.reached.is_set():
            gate.opened.set()
        return gate.reached.is_set()

    cache = make_cache(units, tmp_path / "cache", tier="device", stopping=stopping)
    with pytest.raises(Interrupted):
        cache.materialize(2, "zstd")
    assert not is_committed(tmp_path / "cache" / cache.fingerprint(2))
    assert not in_use(tmp_path / "cache" / cache.fingerprint(2))
    cache.close()


def test_a_store_that_a_checkpoint_names_may_be_taken_again_when_it_is_of_no_use(
    units: Units, tmp_path: Path
) -> None:
    """It is this process's own, and not another run's that has to be waited for."""
    told: list[str] = []
    cache = make_cache(units, tmp_path / "cache", warn=told.append)
    cache.materialize(2)
    cache.release()
    assert cache.store is not None
    folder = cache.store.folder
    cache.leave()
    (folder / "manifest.json").write_bytes(b"{}")
    assert cache.materialize(2) is not None
    assert not [line for line in told if "another run" in line]
    assert_same(everything(cache), everything(make_cache(units, None)))
    cache.close()


def test_hits_and_misses_go_on_where_a_run_goes_on(units: Units, tmp_path: Path) -> None:
    first = make_cache(units, tmp_path / "cache")
    first.materialize()
    everything(first)
    state = first.state_dict()
    first.close()
    second = make_cache(units, tmp_path / "cache")
    second.load_state_dict(state)
    everything(second)
    folder = second.store.folder if second.store is not None else tmp_path
    second.close()
    usage = read_usage(folder)
    assert usage is not None
    assert (usage.hits, usage.misses) == (2 * 47, 47)
