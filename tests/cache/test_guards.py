"""What code reads beside tensors, changed while rows are served: results are those of now."""

import gc
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cachefreeze import ActivationCache
from cachefreeze.keys import ExternalState

from .harness import BATCH, assert_same, batches, plainly, served


class Settings:
    def __init__(self) -> None:
        self.factor = 2.0


CONFIG = Settings()


class Constants:
    factor = 2.0


class Reading(nn.Module):
    """Multiplies by what a function reads, and is left out whole."""

    def __init__(self, read: Callable[["Reading"], float]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.number = 2.0
        self.numbers = [1.0] * 600
        self.queue = deque([2.0])
        self.array = np.full(30_000, 2.0)
        self.deep = Settings()
        self.deep.factor = Settings()  # type: ignore[assignment]
        self.deep.factor.factor = Settings()  # type: ignore[attr-defined]
        self.tools = nn.ModuleDict({"a": nn.Tanh(), "b": nn.Sigmoid()})
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tools["a"](self.linear(x) * self.read(self))


class Other(Reading):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) - 1


def from_config(part: Reading) -> float:
    return CONFIG.factor


def from_class(part: Reading) -> float:
    return Constants.factor


def deep(part: Reading) -> float:
    return part.deep.factor.factor.factor  # type: ignore[attr-defined, no-any-return]


def exchange(part: Reading) -> None:
    tools = part.tools._modules
    first, second = tools["a"], tools["b"]
    part.tools._modules = type(tools)([("b", first), ("a", second)])


# What code reads, and how it is changed.
CASES: dict[str, tuple[Callable[[Reading], float], Callable[[Reading], Any]]] = {
    "number": (lambda part: part.number, lambda part: setattr(part, "number", 3.0)),
    "sign of zero": (
        lambda part: 1.0 + np.copysign(1.0, part.number - 2.0 if part.number else part.number),
        lambda part: setattr(part, "number", -0.0),
    ),
    "global object": (from_config, lambda part: setattr(CONFIG, "factor", 3.0)),
    "global class": (from_class, lambda part: setattr(Constants, "factor", 3.0)),
    "object in objects": (
        deep,
        lambda part: setattr(part.deep.factor.factor, "factor", 3.0),  # type: ignore[attr-defined]
    ),
    "last of a long list": (
        lambda part: part.numbers[-1],
        lambda part: part.numbers.__setitem__(-1, 3.0),
    ),
    "queue": (lambda part: part.queue[0], lambda part: part.queue.__setitem__(0, 3.0)),
    "large array": (
        lambda part: float(part.array[777]),
        lambda part: part.array.__setitem__(777, 3.0),
    ),
    "class": (lambda part: 2.0, lambda part: setattr(part, "__class__", Other)),
    "names of modules": (lambda part: 2.0, exchange),
}


@pytest.mark.parametrize("case", CASES)
def test_what_code_reads_may_change_while_rows_are_served(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONFIG, "factor", 2.0)
    monkeypatch.setattr(Constants, "factor", 2.0)
    read, change = CASES[case]
    torch.manual_seed(0)
    part = Reading(read).requires_grad_(False)
    model = nn.Sequential(part, nn.Linear(8, 2))
    x = torch.randn(48, 8)
    with ActivationCache(model) as cache:
        for number in range(2):
            for batch in batches(x, number):
                model(batch)
        assert served(cache, lambda: model(x[:BATCH])) == BATCH
        before = plainly(model, x[:BATCH])
        change(part)
        if case != "sign of zero":
            assert not torch.equal(before, plainly(model, x[:BATCH]))
        for batch in batches(x, 5):
            assert_same(model(batch), plainly(model, batch))


COLLECTIONS = [0]


def test_what_a_garbage_collection_runs_is_no_part_of_the_pass() -> None:
    def count(phase: str, info: dict[str, int]) -> None:
        COLLECTIONS[0] += 1

    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Tanh(), nn.Linear(8, 2))
    x, often = torch.randn(48, 8), gc.get_threshold()
    gc.callbacks.append(count)
    gc.set_threshold(1, 1, 1)
    try:
        with ActivationCache(model) as cache:
            for number in range(2):
                for batch in batches(x, number):
                    model(batch)
            assert served(cache, lambda: model(x[:BATCH])) == BATCH
            assert gc.isenabled()
    finally:
        gc.set_threshold(*often)
        gc.callbacks.remove(count)
    assert COLLECTIONS[0] > 10


def test_functions_may_be_deleted_at_any_moment() -> None:
    def make() -> Any:
        def function(x: float, factor: float = 2.0) -> float:
            return x * factor

        return function

    state = ExternalState([], ())
    function = make()
    state._code.take(function)
    del function
    state.settle()
    assert state.difference() == ""

    state, function = ExternalState([], ()), make()
    state._code.take(function)
    state.settle()
    assert state.difference() == ""
    del function
    assert "function" in state.difference()


class Rate(float):
    """A number with something beside it."""

    unit = "ms"


def test_an_argument_of_a_class_that_is_a_number_counts_by_its_value() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, rate: float) -> torch.Tensor:
            return self.linear(x) * float(rate)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Scaled().requires_grad_(False), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor, rate: float) -> torch.Tensor:
            return self.head(self.body(x, rate))

    model, x = Model(), torch.randn(48, 8)
    with ActivationCache(model):
        for number in range(4):
            for place, batch in enumerate(batches(x, number)):
                rate = Rate(place % 2)
                assert_same(model(batch, rate), plainly(model, batch, rate))


def test_a_module_may_be_given_an_array() -> None:
    class Shifted(nn.Module):
        def forward(self, x: torch.Tensor, shift: np.ndarray) -> torch.Tensor:
            return x + torch.from_numpy(shift)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.shift = nn.Linear(8, 8).requires_grad_(False), Shifted()
            self.head = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.shift(self.body(x), np.ones(8, np.float32)))

    model, x = Model(), torch.randn(48, 8)
    with ActivationCache(model):
        for number in range(3):
            for batch in batches(x, number):
                assert_same(model(batch), plainly(model, batch))


def test_constant_values_of_one_batch_and_other_ones_of_the_next_are_two_things() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16, bias=False), nn.ReLU())
    body[0].bias.data.fill_(-1.0)
    model = nn.Sequential(body.requires_grad_(False), nn.Linear(16, 2))
    x = torch.randn(48, 8)
    x[:BATCH] = 0
    with ActivationCache(model):
        for number in range(4):
            model(x[:BATCH])
            for batch in batches(x, number):
                assert_same(model(batch), plainly(model, batch))
