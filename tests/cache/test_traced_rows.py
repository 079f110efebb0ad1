"""The rows of the traced pass are those that it made."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cachefreeze import ActivationCache, lineage

from .harness import BATCH, ROWS, Net, assert_same, batches, images, net, plainly, served, warm


def test_a_frozen_operation_runs_once_for_every_batch_until_rows_come_again() -> None:
    model, x = net(), images()
    cache = ActivationCache(model)
    with torch.profiler.profile() as profile:
        for epoch in range(2):
            for batch in batches(x, epoch):
                model(batch)
    counts = {one.key: one.count for one in profile.key_averages()}
    compared = 2
    assert counts["aten::conv2d"] == 2 * (ROWS // BATCH + compared)
    assert cache.stats.rows_served == (ROWS // BATCH - compared) * BATCH


class Rewriting(Net):
    """Hands out what frozen work made, and takes a view of it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(x)
        return self.head(features.view(-1, 32)), features


@pytest.mark.parametrize("write", [torch.Tensor.zero_, torch.Tensor.exp_])
def test_what_the_loop_writes_into_the_features_gets_into_no_row(write) -> None:
    torch.manual_seed(0)
    model, x = Rewriting(), images()
    cache = ActivationCache(model)
    for epoch in range(3):
        for batch in batches(x, epoch):
            logits, features = model(batch)
            assert_same(logits, plainly(model, batch)[0])
            with torch.no_grad():
                write(features.data)
    assert cache.stats.rows_served > 0
    assert cache.messages == ()


class InPlace(nn.Module):
    """Trained work that writes into what it takes, and frozen work that does."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.late = late

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        first = y.view(len(y), -1)
        scaled = first[:, :36].sum(1) * self.scale.sum()
        if self.late:
            y.mul_(2)
        return scaled + (F.relu_(y) * self.scale).sum((1, 2, 3))


@pytest.mark.parametrize("late", [False, True])
def test_a_buffer_that_is_written_to_after_it_was_taken_is_kept_as_it_was(late: bool) -> None:
    torch.manual_seed(0)
    model, x = InPlace(late), images()
    cache = ActivationCache(model)
    warm(cache, model, x)
    for batch in batches(x, 7):
        expected = plainly(model, batch)
        assert served(cache, lambda batch=batch, want=expected: assert_same(model(batch), want))


@pytest.mark.parametrize("late", [False, True])
def test_a_trace_gives_out_no_value_that_was_written_to(late: bool) -> None:
    model, x = InPlace(late), images(BATCH)
    expected = model.body(x)
    _, trace = lineage.trace(model, x)
    convolved = next(one.makes[0] for one in trace.operations if one.name == "conv2d")
    assert any(trace.values[n].shape == expected.shape for n in trace.held), "after relu_"
    assert trace.take_held([convolved]) is None, "before relu_"

    model.scale.requires_grad_(False)
    assert not lineage.trace(model, x)[1].held, "nothing is trained"

    quiet = nn.Sequential(model.body, nn.Flatten(), nn.Linear(144, 2))
    _, trace = lineage.trace(quiet, x)
    convolved = next(one.makes[0] for one in trace.operations if one.name == "conv2d")
    held = trace.take_held([convolved])
    assert held is not None
    assert_same(held[convolved], expected)
    assert trace.held == {}


class Beside(nn.Module):
    """Writes into what trained work has taken, by a way that counts no version."""

    def __init__(self, by_numpy: bool, last: bool) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.by_numpy, self.last = by_numpy, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        first = y * self.scale
        if self.by_numpy:
            y.numpy()[:] *= 2
        else:
            y.data.mul_(2)
        return (first if self.last else first + y * self.scale).sum((1, 2, 3))


@pytest.mark.parametrize("by_numpy", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_a_write_that_counts_no_version_gets_into_no_row_of_the_traced_pass(
    by_numpy: bool, last: bool
) -> None:
    torch.manual_seed(0)
    model, x = Beside(by_numpy, last), images(128)
    cache = ActivationCache(model)
    for epoch in range(3):
        for batch in batches(x, epoch):
            assert_same(model(batch), plainly(model, batch))
    assert cache.stats.rows_served > 0
    assert cache.messages == ()
