"""Ways in which the cache was broken once: each has served something wrong, or raised an error."""

import copy
import gc
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cachefreeze import ActivationCache

from .harness import assert_same, batches, images, net, plainly, warm

FACTOR = 1.0


class Body(nn.Module):
    """A frozen part whose code reads more than parameters."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(16, 64), nn.Linear(64, 32)
        self.act: Callable[[torch.Tensor], torch.Tensor] = F.relu
        self.pair = (1.0, 2.0)
        self.settings = types.SimpleNamespace(factor=1.0)
        self.list = [1.0]
        self.tensor = torch.tensor(2.0)
        self.tensors = [torch.tensor(1.5)]
        self.named = {"factor": torch.tensor(1.0)}
        self.array = np.ones(64, dtype=np.float32)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.one(x)) * self.pair[0] * self.settings.factor * self.list[0]
        x = x * self.tensor * self.tensors[0] * self.named["factor"] * self.factor
        return self.other(x * FACTOR * torch.from_numpy(self.array))


def other_forward(self: Body, x: torch.Tensor) -> torch.Tensor:
    return self.other(torch.sigmoid(self.one(x)))


def set_global(body: Body) -> None:
    global FACTOR
    FACTOR = 3.0


def set_class(body: Body) -> None:
    type(body).factor = 3.0


def write_array(body: Body) -> None:
    body.array *= 2


def exchange_in_list(body: Body) -> None:
    body.tensors[0] = torch.tensor(9.0)


def exchange_in_dict(body: Body) -> None:
    body.named["factor"] = torch.tensor(9.0)


CHANGES: list[Callable[[Body], Any]] = [
    set_global, set_class, write_array, exchange_in_list, exchange_in_dict,
    lambda body: setattr(body, "act", torch.tanh),
    lambda body: setattr(body, "pair", (3.0, 1.0)),
    lambda body: setattr(body, "settings", types.SimpleNamespace(factor=3.0)),
    lambda body: setattr(body, "list", [3.0]),
    lambda body: setattr(body, "tensor", torch.tensor(3.0)),
    lambda body: setattr(body, "tensors", [torch.tensor(3.0)]),
    lambda body: setattr(body, "named", {"factor": torch.tensor(3.0)}),
    lambda body: setattr(body, "array", body.array * 2),
    lambda body: setattr(body, "forward", types.MethodType(other_forward, body)),
    lambda body: setattr(type(body), "forward", other_forward),
]  # fmt: skip


@pytest.fixture
def body() -> Iterator[Body]:
    global FACTOR
    before = Body.forward
    torch.manual_seed(0)
    yield Body()
    FACTOR = Body.factor = 1.0
    Body.forward = before  # type: ignore[method-assign]


def rows(count: int = 24) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_what_frozen_code_reads_is_exchanged(body: Body, change: Callable[[Body], Any]) -> None:
    model, x = nn.Sequential(body, nn.Linear(32, 4)), rows()
    with ActivationCache(model) as cache:
        warm(cache, model, x)
        change(body)
        for batch in batches(x, 7):
            output = model(batch)
            with torch.no_grad():
                assert_same(output, model[1](body.forward(batch)))
        warm(cache, model, x, epochs=3)


def test_an_array_gets_its_former_content_again(body: Body) -> None:
    model, x = nn.Sequential(body, nn.Linear(32, 4)), rows()
    with ActivationCache(model) as cache:
        warm(cache, model, x[:16])
        body.array *= 2
        for _ in range(4):
            for batch in batches(x, 3):
                model(batch)
        body.array /= 2
        for epoch in range(4):
            for batch in batches(x, epoch):
                assert_same(model(batch), plainly(model, batch))


def test_a_function_among_the_arguments_changes_what_it_encloses() -> None:
    class With(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(16, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor, function: Any) -> torch.Tensor:
            return self.other(function(self.one(x)))

    factor = 1.0
    model, x = nn.ModuleList([With(), nn.Linear(32, 4)]), rows()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor, function: Any) -> torch.Tensor:
            return self.parts[1](self.parts[0](x, function))

    both = Both()
    model[0].requires_grad_(False)
    with ActivationCache(both) as cache:
        function = lambda h: h * factor  # noqa: E731
        warm(cache, lambda batch: both(batch, function), x)
        factor = 3.0
        for batch in batches(x, 7):
            assert_same(both(batch, function), plainly(both, batch, lambda h: h * 3.0))


def test_frozen_parameters_are_replaced_again_and_again() -> None:
    model, x = net(), images()
    with ActivationCache(model):
        for epoch in range(8):
            weight = model.body[0].weight.detach() * 1.1
            del model.body[0].weight
            # The new one may lie where an earlier one was.
            model.body[0].weight = nn.Parameter(weight, requires_grad=False)
            for batch in batches(x, epoch):
                assert_same(model(batch), plainly(model, batch))


def test_weights_in_channels_last_are_written_through_numpy() -> None:
    model, x = net().to(memory_format=torch.channels_last), images()  # type: ignore[call-overload]
    with ActivationCache(model) as cache:
        warm(cache, model, x)
        model.body[3].weight.numpy()[:] *= 1.5
        for batch in batches(x, 7):
            assert_same(model(batch), plainly(model, batch))


@pytest.mark.parametrize("first", [False, True])
def test_empty_batches_run_as_ever(first: bool) -> None:
    model, x = net(), images()
    with ActivationCache(model) as cache:
        if first:
            assert model(x[:0]).shape == (0, 4)
        warm(cache, model, x)
        for _ in range(3):
            assert model(x[:0]).shape == (0, 4)


def set_mkldnn(on: bool) -> None:
    torch._C._set_mkldnn_enabled(on)


def set_double(on: bool) -> None:
    torch.set_default_dtype(torch.float32 if on else torch.float64)


def set_attention(on: bool) -> None:
    torch.backends.cuda.enable_flash_sdp(on)


class Attending(nn.Module):
    """Convolutions, attention, and a tensor of the default type."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 48, 3).requires_grad_(False)
        self.out = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.body(x).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        x = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].mean(1)
        return self.out((x * torch.full((16,), 0.1)).float())


@pytest.mark.parametrize("switch", [set_mkldnn, set_double, set_attention])
def test_a_switch_of_torch_that_moves_bits_is_thrown(switch: Callable[[bool], None]) -> None:
    torch.manual_seed(0)
    model, x = Attending(), images()
    with ActivationCache(model) as cache:
        warm(cache, model, x)
        try:
            switch(False)
            for batch in batches(x, 7):
                assert_same(model(batch), plainly(model, batch))
        finally:
            switch(True)


class Recurrent(nn.Module):
    """A recurrent network whose results lie in memory with the time first."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.body = kind(16, 32, batch_first=True).requires_grad_(False)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)[0].transpose(1, 2).contiguous().mean(2))


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_values_whose_rows_are_not_first_in_memory_are_served(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(24, 12, 16)

    class Whole(Recurrent):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x)[0]).mean(1)

    for model in (Recurrent(kind), Whole(kind)):
        with ActivationCache(model) as cache:
            warm(cache, model, x)
            for batch in batches(x, 7):
                assert_same(model(batch), plainly(model, batch))


def test_a_closed_cache_holds_no_model() -> None:
    model, x = net(), images()
    cache = ActivationCache(model)
    warm(cache, model, x)
    cache.close()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert cache.stats.bytes == 0


def test_a_copy_of_a_cache_has_nothing_to_say() -> None:
    with ActivationCache(net()) as cache:
        assert copy.deepcopy(cache).messages == ()


def test_frozen_work_that_only_runs_later_is_told_rightly() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(16, 32).requires_grad_(False), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
            x = self.body(x)
            return (self.head(x * factor) for factor in range(3))

    model, x = Later(), rows()
    with ActivationCache(model) as cache:
        for batch in batches(x, 0):
            for output, other in zip(model(batch), plainly(model, batch), strict=True):
                assert_same(output, other)
        assert "nothing in the call itself takes" in "".join(cache.messages)


class Gated(nn.Module):
    """Frozen work in which one row out of many changes all others of its batch."""

    def __init__(self, gate: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.gate = nn.Linear(16, 32), nn.Linear(32, 4), gate
        self.body.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gate(self.body(x)))


@pytest.mark.parametrize(
    "gate",
    [
        lambda x: torch.where((x > 12).any(), x * 2, x),
        lambda x: x * (1 + (x.max() > 12).float()),
        lambda x: x + (x[:1] > 12).float(),
    ],
    ids=["any", "max", "first"],
)
def test_one_row_out_of_many_changes_its_batch(
    gate: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    torch.manual_seed(0)
    model, x = Gated(gate), rows(800)
    x[37] *= 60
    with ActivationCache(model) as cache:
        for epoch in range(3):
            for batch in batches(x, epoch):
                assert_same(model(batch), plainly(model, batch))
        assert cache.stats.rows_served == 0
        assert "looks across the rows" in "".join(cache.messages)


def test_an_empty_input_beside_others_does_no_harm() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = net()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.model(x)

    model, x = Net(), images()
    with ActivationCache(model) as cache:
        warm(cache, lambda batch: model(batch, torch.zeros(0)), x)


@pytest.mark.parametrize("what", ["the global variable `FACTOR`", "attribute"])
def test_what_changes_from_call_to_call_is_told_and_costs_few_traces(body: Body, what: str) -> None:
    global FACTOR
    model, x = nn.Sequential(body, nn.Linear(32, 4)), rows()
    with ActivationCache(model) as cache:
        for number in range(20):
            if what == "attribute":
                body.number = number  # type: ignore[assignment]
            else:
                FACTOR = float(number)
            for batch in list(batches(x, number))[:1]:
                with torch.no_grad():
                    other = model[1](body.forward(batch))
                assert_same(model(batch), other)
        told = "".join(cache.messages)
        assert "changes from call to call" in told
        assert what in told
        traced = [site._traced for site in cache._cached.values()]
        assert max(traced) <= 5
