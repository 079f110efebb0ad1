"""Weights and buffers change, by ways that leave a version and by ways that do not.

Every loop runs to its end, and a second run finds the rows of the first one on the disk.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cachefreeze import ActivationCache

from .changes import LATE, WRITERS, Observed, one_number_by_numpy
from .harness import BATCH, Loop, Net, batches, differs, images


class Watched(Net):
    """A body with an observer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.body.insert(2, Observed())


class Large(Net):
    """A body that takes too long to be hashed as a whole at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.body[4] = nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 32))
        self.body.requires_grad_(False)


@pytest.mark.parametrize("name", [*WRITERS, *LATE])
def test_weights_change_and_both_runs_end_in_the_plain_weights(name: str, tmp_path: Path) -> None:
    # The batch norm is the second module, its mean and variance are read by all that follows.
    loop = Loop(Watched, {2: {**WRITERS, **LATE}[name]}, epochs=4)
    plain = loop.run(cached=False)
    assert differs(Loop(Watched, epochs=4).run(cached=False), plain), "nothing was written"
    for _ in range(2):
        cached = loop.run(cached=True, directory=tmp_path)
        assert sum(cached.served) > 0
        assert not differs(plain, cached), cached.messages


@pytest.mark.parametrize("name", [".data.mul_", "numpy", "buffers by .data", "a moving average"])
def test_weights_that_come_back_are_served_at_once(name: str) -> None:
    model, x = Net(), images()
    model.row = (3, 8, 8)
    with ActivationCache(model) as cache:
        for epoch in range(3):
            for batch in batches(x, epoch):
                model(batch)
        expected = model(x[:BATCH])
        before = {key: one.detach().clone() for key, one in model.body.state_dict().items()}
        WRITERS[name](model)
        for epoch in range(3, 5):  # what moves twice within four calls counts as trained
            for batch in batches(x, epoch):
                model(batch)
        for key, one in model.body.state_dict().items():
            one.data.copy_(before[key])
        served = cache.stats.rows_served
        results = [model(x[:BATCH]) for _ in range(12)]
        assert all(torch.equal(one, expected) for one in results)
        # Two are compared first, as after every change.
        assert cache.stats.rows_served - served >= 8 * BATCH


@pytest.mark.parametrize("name", LATE)
def test_a_few_numbers_that_nothing_shows_are_found_and_told(name: str, tmp_path: Path) -> None:
    loop = Loop(Large, {3: LATE[name]})
    late = loop.run(cached=True, directory=tmp_path)
    assert any("was changed in a few places" in sentence for sentence in late.messages)
    assert any("body.4.0.weight" in sentence for sentence in late.messages)
    # Nothing wrong is on the disk under a clean name: a run without the change is right.
    unchanged = Loop(Large)
    assert not differs(unchanged.run(cached=False), unchanged.run(True, tmp_path))


@pytest.mark.parametrize("name", LATE)
def test_a_few_numbers_are_told_after_weights_were_exchanged_and_put_back(name: str) -> None:
    other = [one.detach() * 0.9 for one in Large().body.parameters()]

    def validate(model: Large) -> None:
        kept = [one.detach().clone() for one in model.body.parameters()]
        for now in (other, kept):
            for one, values in zip(model.body.parameters(), now, strict=True):
                one.data.copy_(values)
            for _ in range(5):  # what moves twice within four calls counts as trained
                model(images()[:BATCH])

    def late(model: Large) -> None:
        LATE[name](model)
        model(images()[:BATCH])
        validate(model)

    clean = Loop(Large, dict.fromkeys((2, 4), validate)).run(cached=True)
    assert not any("a few places" in sentence for sentence in clean.messages)
    changed = Loop(Large, {2: validate, 3: late}).run(cached=True)
    assert any("was changed in a few places" in sentence for sentence in changed.messages)


@pytest.mark.parametrize("name", LATE)
def test_a_few_numbers_are_told_although_a_state_dict_was_loaded_before_a_hash(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefreeze.cache.cache_state._SHARE", 0.0)  # no time for more hashes
    load = nn.Module.load_state_dict

    def late(model: Large) -> None:
        LATE[name](model)
        model(images()[:BATCH])
        model.load_state_dict({key: one * 0.9 for key, one in model.state_dict().items()})

    def no_change(model: Large) -> None:
        model.load_state_dict({key: one * 0.9 for key, one in model.state_dict().items()})

    assert any("a few places" in one for one in Loop(Large, {2: late}).run(cached=True).messages)
    clean = Loop(Large, {2: no_change}).run(cached=True)
    assert not any("a few places" in one for one in clean.messages)
    assert nn.Module.load_state_dict is load


def _exchange_data(part: nn.Linear) -> None:
    part.weight.data = part.weight.data * 1.5


def _exchange_parameter(part: nn.Linear) -> None:
    part.weight = nn.Parameter(part.weight.detach() * 1.5, requires_grad=False)


@pytest.mark.parametrize("exchange", [_exchange_data, _exchange_parameter])
@pytest.mark.parametrize("name", LATE)
def test_a_few_numbers_are_told_although_the_tensor_was_exchanged_before_a_hash(
    name: str, exchange: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefreeze.cache.cache_state._SHARE", 0.0)  # no time for more hashes

    def late(model: Large) -> None:
        LATE[name](model)
        model(images()[:BATCH])
        exchange(model.body[4][0])

    assert any("a few places" in one for one in Loop(Large, {2: late}).run(cached=True).messages)
    clean = Loop(Large, {2: lambda model: exchange(model.body[4][0])}).run(cached=True)
    assert not any("a few places" in one for one in clean.messages)


def test_a_parameter_that_is_exchanged_is_compared_even_where_most_checks_are_off() -> None:
    def late(model: Large) -> None:
        LATE["one row by .data"](model)
        model(images()[:BATCH])
        _exchange_parameter(model.body[4][0])

    loop = Loop(Large, {2: late}, options={"verify": "off"})
    assert any("a few places" in one for one in loop.run(cached=True).messages)


@pytest.mark.parametrize("name", LATE)
def test_verify_all_ends_in_the_plain_weights_whatever_happens(name: str) -> None:
    loop = Loop(Large, {3: LATE[name]}, options={"verify": "all"})
    assert not differs(loop.run(cached=False), loop.run(cached=True))


def test_the_report_says_what_was_checked_and_found() -> None:
    model, x = Large(), images()
    with ActivationCache(model) as cache:
        for epoch in range(3):
            for batch in batches(x, epoch):
                model(batch)
        before = cache.report()
        assert before.rows_compared == before.batches_compared * BATCH >= 2 * BATCH
        assert before.rows_served == cache.stats.rows_served > 0
        assert before.bytes_hashed >= sum(one.nbytes for one in model.body.parameters())
        assert not before.found
        assert "No row differed" in str(before)
        one_number_by_numpy(model)
        for epoch in range(3):
            for batch in batches(x, epoch):
                model(batch)
    after = cache.report()
    assert after.changes == 1
    assert "was changed in a few places" in str(after)
    assert not before.found, "an earlier report stays what it was"


class Alone(nn.Module):
    """A body that another model holds as well."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(32, 4)


def test_another_model_trains_the_body_that_is_frozen_here() -> None:
    def change(model: Any) -> None:
        other = Alone(model.body)
        for parameter in other.body.parameters():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(other.parameters(), lr=0.01, fused=True)
        other.head(other.body(images(8, 3))).sum().backward()
        optimizer.step()
        other.body.requires_grad_(False)

    loop = Loop(Net, dict.fromkeys((2, 3, 4), change))
    cached = loop.run(cached=True)
    assert not differs(loop.run(cached=False), cached)
    assert sum(cached.served) > 0
