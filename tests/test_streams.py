"""What is asked of a device is asked in the right order: on one that does everything at the worst
moment (see `simulated_device`), for there is none in most places where tests run."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cachefreeze.background import WritingStore
from cachefreeze.data.images import ArrayImages
from cachefreeze.data.inputs import InputRows
from cachefreeze.encoding import Encoding
from cachefreeze.moments import DeviceClock, Lapses, Moments
from cachefreeze.rows import Indices, batches_of
from cachefreeze.serving import loaded, serve
from cachefreeze.sinks import sink_for
from cachefreeze.staging import StagedRows
from cachefreeze.store import Description, Layout, Store, StoreWriter, prepare_cache_dir
from cachefreeze.store import format as store_format
from cachefreeze.stored_rows import ResidentRows
from cachefreeze.stores import Filling, Source, Stores
from cachefreeze.tiers import MemoryReader, Tiers

from .simulated_device import CUDA, POISON, SCHEDULES, Device, OnDevice, simulate

CPU = torch.device("cpu")
COUNT, BATCH = 45, 8
ORDER = batches_of(np.random.default_rng(0).permutation(COUNT), BATCH)
NAME = "0" * 32
# Fills a store through the sink that belongs to a tier.
Fill = Callable[[str], Filling]


@pytest.fixture(params=SCHEDULES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    return simulate(monkeypatch, request.param)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Does nothing before somebody waits for it."""
    return simulate(monkeypatch, "late")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def rows(request: pytest.FixtureRequest) -> Tensor:
    """(45, 5, 4, 4), channels-last."""
    values = torch.randn(COUNT, 4, 4, 5, generator=torch.Generator().manual_seed(1))
    return values.to(request.param).permute(0, 3, 1, 2)


def seen(batches: Iterator[Tensor]) -> Tensor:
    """What the device finds in them when it comes to use them; they are not kept."""
    used = [batch + 0 for batch in batches]
    Device.present.synchronize()
    return torch.cat([each.inner for each in used])  # type: ignore[attr-defined]


def shuffled(rows: Tensor) -> Tensor:
    return rows[torch.from_numpy(np.concatenate(ORDER))]


def computed(rows: Tensor) -> Source:
    """Rows that the device computes when they are asked for, and that nobody keeps."""
    encoding = Encoding.of(rows, None)
    on_device = ResidentRows(OnDevice.of(encoding.encode(rows).clone()), encoding, "")

    def source(split: str, order: Sequence[Indices]) -> Iterator[Tensor]:
        return (x + 0 for x in on_device.batches(order))

    return source


@pytest.fixture
def fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Tensor) -> Fill:
    """Of seven rows a chunk."""
    monkeypatch.setattr(store_format, "CHUNK_BYTES", 7 * rows[0].nbytes)
    prepare_cache_dir(tmp_path / "cache")

    def run(tier: str) -> Filling:
        stores = Stores(
            tmp_path / "cache",
            {"train": COUNT},
            BATCH,
            CUDA,
            tiers=Tiers(CUDA, tier, device_bytes=1e9),
            threads=2,
            max_bytes=1e9,
            stored=None,
            network="",
            details={},
            warn=pytest.fail,
            stopping=lambda: False,
        )
        filled = stores.fill(NAME, 1, "unit", "raw", computed(rows), 0.0)
        assert filled is not None
        return filled

    return run


@pytest.mark.parametrize("waits", [False, True])
def test_who_copies_without_waiting_gets_what_is_not_there_yet(late: Device, waits: bool) -> None:
    x = OnDevice.of(torch.ones(3)) + 1
    stream, room = torch.cuda.Stream(), torch.empty(3, pin_memory=True)
    if waits:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        room.copy_(x, non_blocking=True)
    late.finish(stream.tasks[-1])  # type: ignore[attr-defined]
    assert room.tolist() == [2 if waits else POISON] * 3


@pytest.mark.parametrize("recorded", [False, True])
def test_memory_that_is_freed_is_another_streams_unless_it_was_recorded(
    late: Device, recorded: bool
) -> None:
    x, used = OnDevice.of(torch.ones(3)), torch.empty(3, pin_memory=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        used.copy_(x, non_blocking=True)
    if recorded:
        x.record_stream(stream)  # type: ignore[arg-type]
    del x
    late.synchronize()
    assert used.tolist() == [1 if recorded else POISON] * 3


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_rows_are_the_rows_computed_wherever_they_are_held(
    device: Device, fill: Fill, rows: Tensor, tier: str
) -> None:
    filled = fill(tier)
    store, memory = filled.store, filled.memory
    assert ("disk" if memory is None else memory.tier) == tier
    served = serve(store, "train", memory, CUDA, threads=2)
    for _ in range(3):
        assert torch.equal(seen(served.batches(ORDER)), shuffled(rows))
    store.close()  # which has been written then
    Device.present.synchronize()
    assert_written(store, rows)


def assert_written(store: WritingStore | Store, rows: Tensor) -> None:
    reader = (store._store if isinstance(store, WritingStore) else store).readers["train"]  # type: ignore[union-attr]
    assert list(reader.damage()) == []
    encoding = Encoding.of(rows, None)
    held, room = encoding.empty(COUNT, reader.layout.row_shape)
    reader.read(np.arange(COUNT), room)
    assert torch.equal(held, encoding.encode(rows))
    reader.close()


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_where_no_memory_can_be_pinned_copies_wait_and_rows_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
    fill: Fill,
    rows: Tensor,
    schedule: str | int,
    tier: str,
) -> None:
    simulate(monkeypatch, schedule, pins=False)
    filled = fill(tier)
    served = serve(filled.store, "train", filled.memory, CUDA, threads=2)
    assert torch.equal(seen(served.batches(ORDER)), shuffled(rows))
    filled.store.close()
    assert_written(filled.store, rows)


@pytest.mark.parametrize("tier", ["device", "host"])
@pytest.mark.parametrize("threads", [0, 2])
def test_rows_of_a_store_that_is_found_come_into_memory_as_they_are(
    device: Device,
    fill: Fill,
    rows: Tensor,
    tier: str,
    threads: int,
) -> None:
    store = fill("disk").store
    assert isinstance(store, Store)
    done = device.done
    memory = loaded(store, Tiers(CUDA, tier, device_bytes=1e9), threads=threads)
    assert memory is not None
    assert memory.tier == tier
    if tier == "host":
        assert device.done == done, "they made a detour"
    served = serve(store, "train", memory, CUDA, threads=2)
    assert torch.equal(seen(served.batches(ORDER)), shuffled(rows))
    store.close()


def staged(rows: Tensor, threads: int = 2) -> StagedRows:
    encoding = Encoding.of(rows, None)
    held = encoding.encode(rows).contiguous()
    return StagedRows(
        MemoryReader(held), tuple(held.shape[1:]), COUNT, encoding, CUDA, "", threads=threads
    )


def test_two_passes_at_once_and_one_given_up_do_not_disturb_another(
    device: Device, rows: Tensor
) -> None:
    served = staged(rows)
    given_up = served.batches(ORDER)
    next(given_up)
    passes = served.batches(ORDER), served.batches(ORDER)
    used = []
    for number, (one, other) in enumerate(zip(*passes, strict=True)):
        used += [one + 0, other + 0]
        del one, other
        if number == 2:
            del given_up
    device.synchronize()
    for first in (0, 1):
        found = torch.cat([each.inner for each in used[first::2]])
        assert torch.equal(found, shuffled(rows))


def test_rows_come_in_the_stream_that_is_current_where_they_are_used(
    device: Device, rows: Tensor
) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(seen(staged(rows).batches(ORDER)), shuffled(rows))


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_rows_are_written_in_the_order_of_the_stream_that_made_them(
    device: Device, fill: Fill, rows: Tensor, tier: str
) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        store = fill(tier).store
    store.close()
    assert_written(store, rows)


def test_a_batch_is_asked_for_and_not_waited_for(late: Device, rows: Tensor) -> None:
    (batch,) = staged(rows).batches([np.arange(BATCH)])
    assert late.done == 0
    assert torch.equal(seen(iter([batch])), rows[:BATCH])


def input_rows(device: torch.device, **options: Any) -> InputRows:
    pixels = np.random.default_rng(0).integers(0, 255, (COUNT, 6, 6, 3), np.uint8)
    images = ArrayImages(pixels, np.zeros(COUNT, np.int64))
    return InputRows(images, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), device, **options)


@pytest.mark.parametrize("augment_seed", [None, 1])
@pytest.mark.parametrize("resident", [False, True])
def test_pixels_come_as_they_do_without_a_device(
    device: Device, resident: bool, augment_seed: int | None
) -> None:
    here = input_rows(CPU, augment_seed=augment_seed)
    there = input_rows(CUDA, augment_seed=augment_seed, resident=resident)
    wanted = torch.cat(list(here.batches(ORDER)))
    for _ in range(2):
        assert torch.equal(seen(there.batches(ORDER)), wanted)


def test_pixels_come_where_no_memory_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = torch.cat(list(input_rows(CPU).batches(ORDER)))
    simulate(monkeypatch, "late", pins=False)
    assert torch.equal(seen(input_rows(CUDA).batches(ORDER)), wanted)


@pytest.mark.parametrize("resident", [False, True])
def test_pixels_are_on_their_way_when_they_are_served(late: Device, resident: bool) -> None:
    rows = input_rows(CUDA, resident=resident)
    batches = rows.batches(ORDER)
    kept = [next(batches)]  # (the rows' places have been copied to the device, as a whole)
    done = late.done
    kept += batches
    assert late.done == done
    assert torch.equal(seen(iter(kept)), torch.cat(list(input_rows(CPU).batches(ORDER))))


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_whoever_gives_rows_to_a_sink_is_not_kept_waiting(
    late: Device, tmp_path: Path, rows: Tensor, tier: str
) -> None:
    prepare_cache_dir(tmp_path / "cache")
    encoding = Encoding.of(rows, None)
    layout = Layout.of(COUNT, (4, 4, 5), encoding.array_type)
    values = encoding.stored
    about = Description(NAME, "", 1, "", values, values, 0.0, {"train": layout}, {})
    writer = StoreWriter(tmp_path / "cache", about)
    memory = Tiers(CUDA, tier, device_bytes=1e9).memory_for(about, encoding)
    sink = sink_for(writer, rows.dtype, CUDA, memory, threads=2)
    given = OnDevice.of(encoding.encode(rows).clone()) + 0
    # (When a chunk is whole, which is not yet, a thread waits for it.)
    sink.append("train", given[: layout.rows_per_chunk - 1][: COUNT - 1])
    assert late.done == 0
    sink.abort()


def test_a_store_is_written_without_waiting_for_what_is_trained_meanwhile(
    late: Device, fill: Fill, rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = threading.Event(), WritingStore._write

    def write(store: WritingStore) -> None:
        assert asked.wait(30)
        real(store)

    monkeypatch.setattr(WritingStore, "_write", write)
    filled = fill("device")
    training = late.work.ask()
    asked.set()
    filled.store.close()
    assert not training.done
    assert_written(filled.store, rows)


def test_moments_are_of_the_devices_work(device: Device) -> None:
    moments = Moments(CUDA)
    device.work.ask(seconds=1.0)
    start = moments.now()
    device.work.ask(seconds=2.0)
    end = moments.now()
    device.work.ask(seconds=4.0)
    assert moments.seconds(start, end) == 2.0
    assert moments.has_come(end)
    moments.wait()
    assert not device.work.tasks


def test_stretches_are_told_of_when_they_are_over_and_nobody_waits(late: Device) -> None:
    moments, told = Moments(CUDA), []
    lapses = Lapses(moments)
    for seconds in (1.0, 2.0, 4.0):
        start = moments.now()
        late.work.ask(seconds=seconds)
        lapses.add(start, moments.now(), told.append)
    assert told == []
    assert len(late.work.tasks) == 9
    for _ in range(6):
        late.work.do_next()
    lapses.collect()
    assert told == [1.0, 2.0]
    lapses.collect(wait=True)
    assert told == [1.0, 2.0, 4.0]


def test_a_clock_counts_the_work_for_the_items_and_not_what_is_done_with_them(
    device: Device,
) -> None:
    clock = DeviceClock(CUDA)

    def items() -> Iterator[int]:
        for number in range(5):
            device.work.ask(seconds=1.0)
            yield number

    for _ in clock.around(items()):
        device.work.ask(seconds=10.0)
    assert clock.seconds == 5.0
