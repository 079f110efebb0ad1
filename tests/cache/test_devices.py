"""Loops on a device that runs behind the host: the same weights, and no needless wait."""

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from cachefreeze import ActivationCache
from cachefreeze.cache import entries
from cachefreeze.cache.row_memory import RowMemory
from cachefreeze.lineage import devices
from tests.support.simulated_device import SimulatedQueue

from .harness import BATCH, Net, assert_same, batches, images, net, plainly, served, warm

# A device that is never behind, one that is some steps behind, and one that only goes on if waited
# for.
LAGS = (0, 7, 10**9)


@pytest.fixture(params=LAGS)
def queue(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimulatedQueue]:
    made = SimulatedQueue(request.param)
    monkeypatch.setitem(devices.QUEUES, "cpu", made)
    yield made
    assert not made.faults


def train(model: Net, x: torch.Tensor, epochs: int) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        for batch in batches(x, epoch):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("directory", [False, True])
def test_a_loop_ends_in_the_same_weights(
    queue: SimulatedQueue, tmp_path: Path, directory: bool
) -> None:
    x, plain = images(80), train(net(), images(80), 4)
    for run in range(2):
        model = net()
        with ActivationCache(model, directory=tmp_path / "cache" if directory else None) as cache:
            found = train(model, x, 4)
            # Of the second run with a directory, the first epoch is served too.
            least = 80 * 4 - 4 * BATCH if directory and run else 80 * 3 - 3 * BATCH
            assert cache.stats.rows_served >= least, str(cache)
        for name, tensor in plain.items():
            assert_same(found[name], tensor)


# Operations by which the host asks for a number, and so waits for a device.
ANSWERS = {f"aten::{name}" for name in ("item", "_local_scalar_dense", "equal", "nonzero")}


def test_a_served_step_waits_once_for_the_keys_of_its_rows(queue: SimulatedQueue) -> None:
    model, x = net(), images(160)
    with ActivationCache(model, verify="off") as cache:
        warm(cache, model, x)
        for batch in batches(x, 5):
            before = len(queue.waits)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                assert served(cache, lambda: model(batch)) == BATCH  # noqa: B023
            waits = queue.waits[before:]
            assert len(waits) <= 1, waits
            assert all("keys/inputs" in wait for wait in waits), waits
            assert ANSWERS.isdisjoint(event.name for event in seen.events())


def wide() -> Net:
    """Returns a network for images that are large enough to be known by number."""
    model = net()
    model.body[6] = nn.Linear(8 * 22 * 22, 32).requires_grad_(False)
    nn.init.orthogonal_(model.body[6].weight, generator=torch.Generator().manual_seed(3))
    return model


class Files(Dataset[tuple[torch.Tensor, int]]):
    """Data set that counts the items that it loads."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.loaded = x, 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.loaded += 1
        return self.x[index].sin(), index % 4


@pytest.mark.parametrize("directory", [False, True])
def test_no_step_waits_if_rows_are_known_by_number(
    queue: SimulatedQueue, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, directory: bool
) -> None:
    monkeypatch.setattr("cachefreeze.cache.deferred_writes._LONGER", 1 / 4)  # two batches wait

    class Slow(Files):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            for _ in range(200):
                self.x[index].sin()
            return super().__getitem__(index)

    def run(model: Net, loader, count: bool, epochs: int) -> list[int]:  # type: ignore[no-untyped-def]
        optimizer, waits = torch.optim.SGD(model.head.parameters(), lr=0.1), []
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                before = len(queue.waits)
                output = model(x.to("cpu", non_blocking=True))
                nn.functional.cross_entropy(output, y).backward()
                waits.append(len(queue.waits) - before if count else 0)
                optimizer.step()
        return waits

    large = torch.randn(80, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    data, model = Slow(large), wide()
    where = tmp_path / "cache" if directory else None
    with ActivationCache(model, directory=where, verify="off") as cache:
        waits = run(model, cache.loader(data, batch_size=BATCH), True, 4)
        assert cache.stats.rows_served >= 2 * 80, str(cache)
        assert cache.stats.rows_kept == 80
    # The first batch is followed, and in the second epoch two are compared.
    assert waits[1:10] == [0] * 9
    assert waits[20:] == [0] * 20
    assert data.loaded < 3 * 80
    other = wide()
    run(other, torch.utils.data.DataLoader(Slow(large), batch_size=BATCH), False, 4)
    for name, tensor in other.state_dict().items():
        assert_same(model.state_dict()[name], tensor)


WRITES = {
    "all of a tensor": lambda model: model.body[0].weight.data.mul_(2),
    "one number": lambda model: model.body[6].weight.data.view(-1)[777].add_(1),
    "a buffer, through numpy": lambda model: model.body[1].running_mean.numpy().__iadd__(1),
}


@pytest.mark.parametrize("write", ["all of a tensor", "a buffer, through numpy"])
def test_weights_that_were_written_unseen_are_noticed_before_rows_are_served(
    queue: SimulatedQueue, write: str
) -> None:
    model, x = net(), images(80)
    with ActivationCache(model) as cache:
        warm(cache, model, x)
        WRITES[write](model)
        for batch in batches(x, 7):
            assert_same(model(batch), plainly(model, batch))


def test_one_number_that_was_written_unseen_is_found_in_time_and_told(
    queue: SimulatedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefreeze.cache.comparison._SAMPLE", 10**9)  # a hash must find it
    monkeypatch.setattr("cachefreeze.cache.cache_state._SHARE", 1.0)
    model, x = net(), images(80)
    with ActivationCache(model) as cache:
        warm(cache, model, x)
        WRITES["one number"](model)
        for epoch in range(60):
            for batch in batches(x, epoch):
                model(batch)
            if any("a few places" in sentence for sentence in cache.messages):
                break
        else:
            pytest.fail("no message")
        for batch in batches(x, 7):
            assert_same(model(batch), plainly(model, batch))


def test_exchanged_weights_are_served_again_when_they_come_back(queue: SimulatedQueue) -> None:
    model, x = net(), images(80)
    with ActivationCache(model) as cache:
        warm(cache, model, x)
        kept = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            model.body[0].weight.mul_(0.5)
        for batch in batches(x, 7):
            assert_same(model(batch), plainly(model, batch))
        model.load_state_dict(kept)
        before = cache.stats.rows_served
        for epoch in range(2):
            for batch in batches(x, epoch):
                assert_same(model(batch), plainly(model, batch))
        assert cache.stats.rows_served - before >= 80


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("share", [0, 20, 50])
def test_rows_for_which_the_device_has_no_room_are_in_host_memory(
    queue: SimulatedQueue,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    share: int,
    directory: bool,
) -> None:
    row = 4 * 32
    monkeypatch.setattr(entries, "free_device_memory", lambda _: 4 * share * row)
    x, plain = images(80), train(net(), images(80), 4)
    for _ in range(1 + directory):
        model = net()
        with ActivationCache(model, directory=tmp_path / "cache" if directory else None) as cache:
            found = train(model, x, 4)
            assert cache.stats.rows_served >= 80 * 3 - 3 * BATCH, str(cache)
        for name, tensor in plain.items():
            assert_same(found[name], tensor)


def test_rows_are_read_as_they_were_written_wherever_they_are(queue: SimulatedQueue) -> None:
    rows = torch.arange(300 * 5, dtype=torch.float32).view(300, 5)
    memory = RowMemory(5, torch.float32, torch.device("cpu"), room=300)
    memory.device_room = 70
    start = 0
    for size in (30, 50, 100, 120):
        assert memory.grow(start + size, 300) >= start + size
        memory.write(start, rows[start : start + size])
        start += size
    assert memory.on_device == 70
    generator = np.random.default_rng(0)
    for step in range(60):
        places = generator.integers(0, (70, 300, 300)[step % 3], size=16)
        places = places % 230 + 70 if step % 3 == 1 else places
        if step % 2:
            memory.expect(places)
        assert_same(memory.read(places), rows[places])
    stay = generator.permutation(300)[:150]
    memory.expect(stay[:9])
    memory.keep(stay)
    places = generator.permutation(150)
    assert_same(memory.read(places), rows[stay][places])
    memory.write(150, rows[:80])
    assert_same(memory.read(np.arange(145, 230)), torch.cat([rows[stay][145:], rows[:80]]))
