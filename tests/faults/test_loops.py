"""Loops, data, batches and orders of calls that have broken caches: the weights are the plain ones.

Where rows never come again, the cache steps aside, says so with the share of rows, and leaves
nothing in the directory.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cachefreeze
from cachefreeze import ActivationCache
from cachefreeze.store.inspect import inspect

from .harness import BATCH, Loop, Net, Result, batches, differs, images

Tensor = torch.Tensor
Step = Callable[[Any, Tensor], Tensor]


def crop(x: Tensor) -> Tensor:
    up, left = torch.randint(0, 3, (2,)).tolist()
    return F.pad(x, (1, 1, 1, 1))[:, :, up : up + 8, left : left + 8]


def mixup(x: Tensor) -> Tensor:
    share = torch.rand(())
    return share * x + (1 - share) * x[torch.randperm(len(x))]


def cutmix(x: Tensor) -> Tensor:
    x, place = x.clone(), int(torch.randint(0, 5, ()))
    x[:, :, place : place + 3] = x[torch.randperm(len(x))][:, :, place : place + 3]
    return x


def sometimes(x: Tensor) -> Tensor:
    """Noise for one row in fifty."""
    drawn = torch.rand(len(x), 1, 1, 1) < 0.02
    return torch.where(drawn, x + torch.randn_like(x), x)


PREPARED: dict[str, Callable[[Tensor], Tensor]] = {
    "normalised": lambda x: (x - x.mean((0, 2, 3), keepdim=True)) / 2,
    "normalised in place": lambda x: x.sub_(0.5).div_(0.25),
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "crop": crop,
    "mixup": mixup,
    "cutmix": cutmix,
    "flip": lambda x: torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x),
    "noise for few rows": sometimes,
    "brightness": lambda x: x * (0.5 + torch.rand(len(x), 1, 1, 1)),
}


@pytest.mark.parametrize("name", PREPARED)
def test_what_a_loop_does_to_its_batches(name: str) -> None:
    prepare = PREPARED[name]
    loop = Loop(Net, step=lambda model, x: model(prepare(x.clone())))
    assert not differs(loop.run(cached=False), loop.run(cached=True))


@pytest.mark.parametrize("name", ["noise", "mixup", "brightness"])
def test_rows_that_never_come_again_are_told_and_removed(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare = PREPARED[name]
    loop = Loop(
        Net, x=images(160), step=lambda model, x: model(prepare(x)), epochs=8,
        options={"max_bytes": 400_000},
    )  # fmt: skip
    plain = loop.run(cached=False)
    with caplog.at_level(logging.WARNING, "cachefreeze"):
        cached = loop.run(cached=True, directory=tmp_path)
    assert not differs(plain, cached)
    told = [sentence for sentence in cached.messages if "rows had come before" in sentence]
    assert len(told) == 1, cached.messages
    assert "0.0% of" in told[0]
    assert caplog.text.count("rows had come before") == 1
    assert sum(one.rows for one in inspect(tmp_path)) == 0


@pytest.mark.parametrize(
    "edit",
    [
        lambda x: x.mul_(0.5),
        lambda x: x[3].add_(1.0),
        lambda x: x.copy_(x.flip(0)),
        lambda x: x[[0, 1]].copy_(x[[1, 0]]),
    ],
    ids=["normalised in place", "one image", "turned round", "nothing"],
)
def test_data_are_written_to_in_the_middle(edit: Callable[[Tensor], Any]) -> None:
    def run(cached: bool) -> Result:
        loop = Loop(Net)
        loop.changes = {3: lambda model: edit(loop.x)}
        return loop.run(cached)

    assert not differs(run(False), run(True))


class Second(nn.Module):
    """Rows on the second axis, as many as there are steps in a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(24, 16).requires_grad_(False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.reshape(len(x), 8, 24).transpose(0, 1))[0]).mean(0)


class Nested(nn.Module):
    """Takes a dictionary with lists in it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = Net().body, nn.Linear(64, 4)
        self.body = self.net

    def forward(self, given: dict[str, Any]) -> Tensor:
        left, right = given["pair"]
        return self.head(torch.cat([self.net(left), self.net(right * given["factor"])], 1))


def accumulated(model: Any, x: Tensor) -> Tensor:
    return torch.cat([model(x[:3]), model(x[3:])])


def twice(model: Any, x: Tensor) -> Tensor:
    return model(torch.cat([x[:4], x[:4]]))


def growing() -> Step:
    calls = iter(range(10_000))

    def step(model: Any, x: Tensor) -> Tensor:
        return model(x[: 4 if next(calls) % 20 > 10 else 8])

    return step


LOOPS: dict[str, Callable[[], Loop]] = {
    "rows on the second axis": lambda: Loop(Second),
    "as many steps as rows": lambda: Loop(Second, x=images(24)),
    "a short last batch": lambda: Loop(x=images(29)),
    "unequal parts": lambda: Loop(step=accumulated),
    "a row twice in a batch": lambda: Loop(step=twice),
    "another batch size": lambda: Loop(step=growing()),
    "nested items": lambda: Loop(
        Nested, step=lambda model, x: model({"pair": [x, x.flip(-1)], "factor": 2.0})
    ),
    "an off line slice": lambda: Loop(
        step=lambda model, x: model(torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x))
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_batches_of_all_kinds(name: str) -> None:
    plain, cached = LOOPS[name]().run(False), LOOPS[name]().run(True)
    assert not differs(plain, cached)


class Cut(nn.Module):
    """What crosses the cut begins four bytes behind a line of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(192, 65).requires_grad_(False)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1))[:, 1:])


def test_a_kept_value_lies_in_memory_as_the_computed_one() -> None:
    cached = Loop(Cut).run(cached=True)
    assert sum(cached.served) > 0
    assert not differs(Loop(Cut).run(cached=False), cached)


def thawed() -> Net:
    model = Net()
    model.body.requires_grad_(True)
    return model


def _move(kind: torch.dtype) -> Callable[[Any], Any]:
    return lambda model: model.body.to(kind).to(torch.float32)


ORDERS: dict[str, tuple[Callable[[], Any], dict[int, Callable[[Any], Any]]]] = {
    "frozen after half an epoch": (thawed, {1: lambda model: cachefreeze.freeze(model.body)}),
    "thawed": (Net, {3: lambda model: model.body.requires_grad_(True)}),
    "thawed and frozen again": (
        Net,
        {
            2: lambda model: model.body.requires_grad_(True),
            4: lambda model: model.body.requires_grad_(False),
        },
    ),
    "moved to another type and back": (Net, {3: _move(torch.bfloat16)}),
    "a new head": (Net, {3: lambda model: setattr(model.head, "bias", None)}),
    "more and more frozen": (
        thawed,
        {
            1: lambda model: cachefreeze.freeze(model.body[:2]),
            3: lambda model: cachefreeze.freeze(model.body),
        },
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_of_calls(name: str) -> None:
    make, changes = ORDERS[name]
    assert not differs(Loop(make, changes).run(False), Loop(make, changes).run(True))


def test_a_forward_pass_before_freezing_is_not_served_after_it() -> None:
    model, x = thawed(), images()
    with ActivationCache(model):
        for batch in batches(x, 0):
            model(batch)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.body.requires_grad_(False)
        for epoch in range(5):
            for batch in batches(x, epoch):
                assert torch.equal(model(batch), copy.deepcopy(model)(batch))


class Wrapper(nn.Module):
    """What DistributedDataParallel and PEFT do: it calls the model that it was given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_is_wrapped_afterwards(compiled: bool) -> None:
    model, x = Net(), images()
    with ActivationCache(model) as cache:
        wrapped: Any = Wrapper(model)
        if compiled:  # all of it is one graph, in which no call of the model is seen
            wrapped = torch.compile(wrapped, backend="eager")
        for epoch in range(4):
            for batch in batches(x, epoch):
                assert torch.equal(wrapped(batch), copy.deepcopy(model)(batch))
        assert bool(cache.stats.rows_served) is not compiled
    assert any("has seen no call" in sentence for sentence in cache.messages) is compiled


def numbers() -> Iterator[Tensor]:
    for epoch in range(4):
        yield from batches(images(), epoch)


def test_a_generator_as_data_set() -> None:
    model = Net()
    with ActivationCache(model) as cache:
        for batch in numbers():
            assert torch.equal(model(batch), copy.deepcopy(model)(batch))
        assert cache.stats.rows_served >= 4 * BATCH
