"""A loader that knows its rows gives what a plain DataLoader gives, and loads less."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
)

from cachefreeze import ActivationCache
from tests.cache.loading import (
    ARGUMENTS,
    BATCH,
    ROWS,
    SIDE,
    Change,
    Named,
    Net,
    Pictures,
    Tensor,
    same,
)

# How fast an item loads decides nothing here.
pytestmark = pytest.mark.usefixtures("no_item_is_cheap")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("kind", [Pictures, Named])
def test_a_loop_ends_as_with_a_plain_loader(kind: Any, arguments: Any) -> None:
    assert same(kind, arguments=arguments).served


@pytest.mark.parametrize("kind", [Pictures, Named])
def test_items_that_only_frozen_work_reads_are_not_loaded(kind: Any) -> None:
    run = same(kind)
    assert run.loads[0] == ROWS
    # Those that are loaded to be compared, and a batch that the cache compares.
    assert max(run.loads[3:]) <= 2 + BATCH
    assert min(run.loads[3:]) <= 2


def test_where_every_batch_is_compared_no_item_is_loaded_twice() -> None:
    run = same(Pictures, verify="all")
    assert run.loads == [ROWS] * len(run.loads)


def test_a_subset_and_its_indices_are_followed() -> None:
    def edit(epoch: int, dataset: Any) -> None:
        if epoch == 4:
            dataset.indices = list(range(12, 24))

    run = same(
        lambda: Subset(Pictures(), list(range(4, 20))),
        epochs=7,
        edit=edit,
        arguments=lambda dataset: {"batch_size": 4},
    )
    assert run.served


def test_a_tensor_data_set_is_loaded_as_ever() -> None:
    def make() -> Any:
        x = torch.randn(ROWS, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        return TensorDataset(x, torch.arange(ROWS) % 4)

    assert same(make).served


def normalise(x: Tensor) -> Tensor:
    return (x - 0.1) / 2


def mix(x: Tensor) -> Tensor:
    return 0.7 * x + 0.3 * x[torch.randperm(len(x))]


@pytest.mark.parametrize("change", [normalise, mix])
def test_a_batch_that_the_loop_uses_loads_itself_and_that_is_told_once(change: Change) -> None:
    run = same(Pictures, epochs=8, change=change)
    assert run.messages.count("uses a batch of cache.loader") == (change is normalise)
    if change is normalise:
        line = change.__code__.co_firstlineno + 1
        assert f"test_loader.py:{line} uses a batch" in run.messages


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x.to(torch.float32),
        lambda x: x.to(torch.device("cpu"), torch.float32),
        lambda x: x.contiguous(),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.cpu().contiguous(memory_format=torch.channels_last),
    ],
)
def test_moving_a_batch_loads_nothing(change: Change) -> None:
    run = same(Pictures, change=change)
    assert "uses a batch" not in run.messages
    assert min(run.loads[1:]) <= 2


def late_batch() -> tuple[ActivationCache, Pictures, Any, list[Any]]:
    """Returns a cache, its data set, a batch that is not loaded, and the same batch loaded."""
    torch.manual_seed(0)
    model, dataset = Net(), Pictures()
    cache = ActivationCache(model)
    loader = cache.loader(dataset, BATCH)
    for _ in range(3):
        for x, _ in loader:
            model(x)
    before = dataset.loads
    batches = list(loader)
    assert dataset.loads - before < ROWS
    plain = [x for x, _ in DataLoader(Pictures(), BATCH)]
    return cache, dataset, batches[-1][0], [plain[-1]]


USES: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "indexing": lambda x: x[2:5],
    "sum": lambda x: x.sum((1, 2)),
    "in place": lambda x: x.mul_(3),
    "copy": lambda x: __import__("copy").deepcopy(x),
    "pickle": lambda x: __import__("pickle").loads(__import__("pickle").dumps(x)),
    "stack": lambda x: torch.stack([x, x]),
    "out": lambda x: torch.add(x, 1, out=torch.empty(0)),
    "view": lambda x: x.view(len(x), -1),
    "iteration": lambda x: torch.stack(list(x)),
    "other type": lambda x: x.to(torch.float64),
    "data": lambda x: x.data,
    "asarray": lambda x: torch.from_numpy(np.asarray(x).copy()),
    "gradient": lambda x: torch.autograd.grad((x.requires_grad_() * x).sum(), x)[0],
    "list": lambda x: torch.tensor(x.tolist()),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_batch_that_is_not_loaded_gives_what_a_loaded_one_gives(use: Any) -> None:
    cache, _, late, (plain,) = late_batch()
    assert late.shape == plain.shape
    assert late.dtype == plain.dtype
    assert late.stride() == plain.stride()
    assert isinstance(late, Tensor)
    assert torch.equal(use(late), use(plain))
    assert type(late) is Tensor
    cache.close()


def test_a_closed_cache_leaves_a_plain_loader() -> None:
    run = same(Pictures, epochs=6, close_after=3)
    assert run.loads[4:] == [ROWS] * 2


def test_a_batch_from_before_the_closing_loads_itself() -> None:
    cache, _, late, (plain,) = late_batch()
    cache.close()
    assert torch.equal(late + 1, plain + 1)


def test_a_collate_function_of_ones_own_has_everything_loaded() -> None:
    def collate(items: list[Any]) -> Any:
        return torch.stack([x for x, _ in items]) * 2, torch.tensor([y for _, y in items])

    run = same(Pictures, arguments=lambda dataset: {"collate_fn": collate})
    assert run.loads == [ROWS] * 5
    assert "collate_fn" in run.messages


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        items = Pictures()
        return (items[number] for number in range(len(items)))


def test_an_iterable_data_set_is_passed_through() -> None:
    run = same(Stream, arguments=lambda dataset: {})
    assert "IterableDataset" in run.messages
    assert run.served


class Pairs(Pictures):
    """Two pictures in every item."""

    def __getitem__(self, index: int) -> Any:
        other = len(self) - 1 - index
        return self.picture(index), self.picture(other), self.targets[index]


class Matching(Net):
    """Two trained results of two frozen ones, each of a picture."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.body(x)) * self.head(self.body(other))


def match(cached: bool) -> tuple[Tensor, list[int]]:
    torch.manual_seed(0)
    model, dataset = Matching(), Pairs()
    cache = ActivationCache(model) if cached else None
    loader = DataLoader(dataset, BATCH, shuffle=True)
    if cache is not None:
        torch.manual_seed(0)
        model.load_state_dict(Matching().state_dict())
        loader = cache.loader(dataset, BATCH, shuffle=True)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    loads = []
    for _ in range(6):
        before = dataset.loads
        for x, other, y in loader:
            loss = F.cross_entropy(model(x, other), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loads.append(dataset.loads - before)
    return model.head.weight.detach().clone(), loads


def test_two_pictures_of_an_item_are_each_known_by_themselves() -> None:
    (plain, _), (weight, loads) = match(cached=False), match(cached=True)
    assert torch.equal(plain, weight)
    assert loads[0] == 2 * ROWS
    assert min(loads) <= 4
