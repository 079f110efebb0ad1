"""More and more of a model freezes while it trains: rows kept so far lead on to the new cut."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cachefreeze
from cachefreeze import ActivationCache

from .harness import BATCH, assert_same, batches, images, served


class Chain(nn.Sequential):
    """Three blocks of like cost, and a head."""

    def __init__(self) -> None:
        super().__init__(*[self.block(3 if n == 0 else 16) for n in range(3)], nn.Flatten(),
                         nn.Linear(1024, 4))  # fmt: skip

    @staticmethod
    def block(channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Dropout(0.1), nn.ReLU(),
        )  # fmt: skip


class Loop:
    """A training loop, which freezes blocks when it is told to."""

    def __init__(self, rows: int = 40) -> None:
        torch.manual_seed(0)
        self.model, self.x = Chain(), images(rows)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.epochs = self.frozen = 0

    def step(self, x: torch.Tensor) -> None:
        loss = F.cross_entropy(self.model(x), (x[:, 0, 0, 0] > 0).long())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def epoch(
        self, freeze_after: int | None = None, then: Callable[[], None] | None = None
    ) -> None:
        self.model.train()
        for number, x in enumerate(batches(self.x, self.epochs)):
            self.step(x)
            if number == freeze_after:
                cachefreeze.freeze(self.model[self.frozen])
                self.frozen += 1
                if then is not None:
                    then()
        self.epochs += 1

    def validate(self) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad():
            return torch.cat([self.model(x) for x in self.x.split(BATCH)])


def convolutions(call: Callable[[], None]) -> int:
    """Counts the convolutions that run in a call."""
    with torch.profiler.profile() as profile:
        call()
    return sum(one.count for one in profile.key_averages() if one.key == "aten::conv2d")


def test_weights_and_validation_are_those_of_the_plain_loop_freeze_by_freeze() -> None:
    plain, cached = Loop(), Loop()
    cached.model.load_state_dict(copy.deepcopy(plain.model.state_dict()))
    with ActivationCache(cached.model) as cache:

        def fill() -> None:
            cache.fill(cached.x.split(BATCH))

        for freeze_after in (None, 2, None, 1, 3, None, None):
            outputs = []
            for loop in (plain, cached):
                torch.manual_seed(loop.epochs)
                fills = loop is cached and freeze_after == 2
                loop.epoch(freeze_after, fill if fills else None)
                outputs.append((loop.validate(), torch.get_rng_state()))
            for one, other in zip(*outputs, strict=True):
                assert_same(one, other)
        assert cache.stats.rows_served > 5 * 40
    for one, other in zip(
        plain.model.state_dict().values(), cached.model.state_dict().values(), strict=True
    ):
        assert_same(one, other)


def test_rows_filled_in_the_middle_of_an_epoch_are_served_at_once() -> None:
    loop = Loop(80)
    with ActivationCache(loop.model, probation=2) as cache:
        loop.epoch()
        fill = lambda: cache.fill(loop.x.split(BATCH))  # noqa: E731
        # Of the seven steps after the fourth one, two are compared.
        assert served(cache, lambda: loop.epoch(freeze_after=2, then=fill)) == (7 - 2) * BATCH


def test_filling_runs_what_has_frozen_anew_and_nothing_else() -> None:
    loop = Loop()
    with ActivationCache(loop.model) as cache:

        def fill() -> None:
            cache.fill(loop.x.split(BATCH))

        loop.epoch()
        loop.epoch(freeze_after=0)
        fill()
        loop.epoch(freeze_after=4)
        cache.fill([loop.x[:BATCH]])  # follows the model, and finds the rows
        cache.fill([loop.x[:BATCH]])
        # Two convolutions in each of four batches: those of the first block are not done again.
        assert convolutions(fill) == 4 * 2


def test_rows_are_served_while_units_freeze_faster_than_an_epoch_passes() -> None:
    loop = Loop(80)
    with ActivationCache(loop.model, probation=2) as cache:
        loop.epoch()
        loop.epoch(freeze_after=0)
        loop.model.train()
        cache.fill(loop.x.split(BATCH))
        loop.step(loop.x[:BATCH])
        loop.step(loop.x[:BATCH])
        # The second block freezes in the middle: rows after the first one are served on.
        assert served(cache, lambda: loop.epoch(freeze_after=4)) == 80


class Scaled(nn.Sequential):
    """A block that reads a global number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * SCALE


SCALE = 1.0


@pytest.mark.parametrize(
    ("change_after", "waits"), [(3, False), (4, False), (5, False), (4, True), (5, True)]
)
def test_a_frozen_block_reads_another_number_when_the_next_one_freezes(
    change_after: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for cached in (False, True):
        monkeypatch.setattr(f"{__name__}.SCALE", 1.0)
        loop = Loop(80)
        for place in range(3):
            loop.model[place] = Scaled(*loop.model[place])
        cache = ActivationCache(loop.model, probation=2) if cached else None
        if cache is not None:
            cache.waits_for_fill = waits
        loop.epoch()
        loop.epoch(freeze_after=0)
        for _ in range(2):
            loop.epoch()
        loop.model.train()
        for number, x in enumerate(batches(loop.x, 9)):
            if number == 4:
                cachefreeze.freeze(loop.model[1])
            if number == change_after:
                monkeypatch.setattr(f"{__name__}.SCALE", 3.0)
            loop.step(x)
        results.append(loop.model.state_dict())
        if cache is not None:
            assert cache.stats.rows_served > 100
            cache.close()
    plain, other = results
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_rows_lead_on_from_cut_to_cut_without_filling_anew() -> None:
    loop = Loop()
    with ActivationCache(loop.model) as cache:
        loop.epoch()
        loop.epoch(freeze_after=0)
        loop.model.train()
        cache.fill(loop.x.split(BATCH))
        # No whole epoch passes between these two freezes: rows are known at different cuts.
        loop.epoch(freeze_after=1)
        loop.epoch(freeze_after=1)
        # Rows after the first block lead to those after all of them. One batch is traced, and two
        # are compared.
        assert served(cache, loop.epoch) + served(cache, loop.epoch) >= 2 * 40 - 3 * BATCH


@pytest.mark.parametrize("waits", [False, True])
def test_a_loop_that_fills_by_itself_decides_when_further_rows_are_kept(waits: bool) -> None:
    loop = Loop()
    with ActivationCache(loop.model, verify="off") as cache:
        cache.waits_for_fill = waits

        def fill() -> None:
            loop.model.train()
            cache.fill(loop.x.split(BATCH))

        loop.epoch()
        loop.epoch(freeze_after=4)
        fill()
        loop.epoch()
        loop.epoch(freeze_after=4)
        for _ in range(40):
            loop.epoch()
        # Two convolutions in each block and each of the five batches.
        assert convolutions(loop.epoch) == (2 if waits else 1) * 2 * 5
        fill()
        loop.epoch()
        assert convolutions(loop.epoch) == 2 * 5


def test_validation_leads_on_from_cut_to_cut() -> None:
    loop = Loop()
    with ActivationCache(loop.model) as cache:
        loop.epoch()
        loop.epoch(freeze_after=4)
        loop.validate()
        loop.epoch(freeze_after=4)
        # One batch is traced, and two are compared.
        assert served(cache, loop.validate) == 40 - 3 * BATCH
