"""What following costs a loop of short calls, and that nothing is lost by leaving them alone."""

import math

import pytest
import torch
from torch import nn

from cachefreeze import ActivationCache
from cachefreeze.plan import overhead
from cachefreeze.plan.overhead import CallTimer, Kind, Overhead

from .harness import assert_same, batches, plainly


def over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets no second be lost."""
    monkeypatch.setattr(overhead, "_FREE_SECONDS", 0.0)
    monkeypatch.setattr(overhead, "_SHARE", 0.0)


@pytest.fixture
def a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a second be lost, as outside of tests."""
    monkeypatch.setattr(overhead, "_FREE_SECONDS", 1.0)


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def test_short_calls_whose_rows_never_come_again_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over(monkeypatch)
    model = small()
    with ActivationCache(model) as cache:
        for seed in range(300):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
            assert_same(model(x), plainly(model, x))
        # Rows of calls that are left alone are in no count.
        assert 0 < cache.stats.rows_computed < 100 * 8
        assert "are short" in str(cache)


def test_calls_that_are_served_no_faster_than_they_run_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over(monkeypatch)
    model, x = small(), torch.randn(8, 4)
    with ActivationCache(model) as cache:
        for _ in range(300):
            assert_same(model(x), plainly(model, x))
        assert 0 < cache.stats.rows_served < 100 * 8
        assert "as long as one without the cache" in str(cache)
        assert cache.stats.rows_kept == 0


def test_rows_that_come_again_while_calls_are_left_alone_are_served_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over(monkeypatch)
    monkeypatch.setattr(overhead, "_NOTING_SHARE", math.inf)
    torch.manual_seed(0)
    width = 1024
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(6)), nn.Linear(width, 2)
    )
    model[:-1].requires_grad_(False)
    x = torch.randn(512, width)
    with ActivationCache(model) as cache:
        for epoch in range(6):
            before = cache.stats.rows_served
            for batch in batches(x, epoch, size=64):
                assert_same(model(batch), plainly(model, batch))
        assert cache.stats.rows_served - before >= 6 * 64


@pytest.mark.usefixtures("a_second")
@pytest.mark.parametrize("measured", [False, True])
def test_a_loop_of_long_calls_is_never_over(measured: bool) -> None:
    lost = Overhead()
    lost._began -= 100.0
    timer = CallTimer(lost, events=50, frozen_seconds=0.9)
    for _ in range(100):
        timer.note(Kind.KEPT, 1.003, 0.001)
        if measured:
            timer.note_plain(1.0)
    # A millisecond beside 50 events of at most 50 microseconds each.
    assert lost.calls <= 100 * 0.0036
    assert not lost.is_over
    assert not timer.wants_plain(Kind.KEPT)


def test_a_delayed_kernel_of_the_traced_pass_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    over(monkeypatch)
    timer = CallTimer(Overhead(), events=5, frozen_seconds=10.0)
    timer.note(Kind.KEPT, 0.0003, 0.0001)
    timer.note(Kind.SERVED, 0.0003, 0.0001)
    assert timer.wants_plain(Kind.SERVED), "so that it is measured"


@pytest.mark.usefixtures("a_second")
def test_what_serving_saves_makes_up_for_what_keeping_has_lost() -> None:
    lost = Overhead()
    timer = CallTimer(lost, events=50, frozen_seconds=0.004)
    for _ in range(400):
        timer.note(Kind.KEPT, 0.010, 0.002)
    assert lost.is_over
    assert timer.wants_plain(Kind.KEPT)
    for _ in range(3):
        timer.note_plain(0.005)
    assert timer.pauses  # 400 times the smaller of 5 ms and 4.5 ms
    assert lost.calls == pytest.approx(400 * 0.0045)
    for _ in range(400):
        timer.note(Kind.SERVED, 0.001, 0.0005)
    assert lost.calls == pytest.approx(400 * 0.0045 - 400 * 0.004)
    assert not timer.pauses
    assert not timer.loses


@pytest.mark.usefixtures("a_second")
def test_one_moment_in_which_others_compute_does_not_end_serving() -> None:
    lost = Overhead()
    lost.calls = 1e9
    timer = CallTimer(lost, events=1, frozen_seconds=1.0)
    for _ in range(3):
        timer.note_plain(0.010)
    for number in range(64):
        timer.note(Kind.SERVED, 0.001 if number % 16 == 5 else 0.5, 0.0)
        assert not timer.loses
    for _ in range(16):
        timer.note(Kind.SERVED, 0.011, 0.0)
    assert timer.loses
