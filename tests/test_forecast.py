"""What is predicted of a run: when rows are kept, what it costs, how long it still takes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from cachefreeze.freezeout import Unit, units_of
from cachefreeze.models import build
from cachefreeze.train import main
from cachefreeze.training import fill
from cachefreeze.training.fill import worth_filling
from cachefreeze.training.forecast import WAYS, Costs, Run, Span, forward_seconds
from cachefreeze.training.progress import Eta


def test_freezes_that_follow_each_other_in_few_steps_share_a_fill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fill, "SOON_STEPS", 8)
    sizes = {"rows": 60, "batch_size": 10, "steps_per_epoch": 6, "share": 0.5}
    assert not worth_filling(30, 5, **sizes)
    assert worth_filling(30, 8, **sizes)
    assert worth_filling(30, 30, **sizes)


@pytest.mark.parametrize(
    ("steps_left", "to_next", "share", "worth"),
    [
        (1000, 1000, 0.5, True),
        (125, 125, 0.5, True),  # a row is seen 1.25 times more
        (120, 120, 0.5, False),
        (1000, 12, 0.5, False),  # the next freeze comes within an eighth of an epoch
        (1000, 13, 0.5, True),
        (1000, 1000, 0.05, False),  # hardly any work is frozen
    ],
)
def test_rows_are_kept_if_enough_is_left_to_use_them(
    steps_left: int, to_next: int, share: float, worth: bool
) -> None:
    found = worth_filling(
        steps_left, to_next, rows=1000, batch_size=10, steps_per_epoch=100, share=share
    )
    assert found == worth


# Three units that cost 1, 2 and 3 s forward and twice that backward; 10 epochs of 4 steps and one
# batch of validation. The first freezes after 5 epochs, the second after 8.
COSTS = Costs((1.0, 2.0, 3.0), 2.0, (0.0, 0.1, 0.2, 0.3))
RUN = Run((20, 32, 40), 40, 4, 64, 16, 16)


def test_every_way_to_train_has_its_price() -> None:
    # Forward and backward of all units, and validations.
    assert sum(s.seconds for s in RUN.spans(COSTS, "without_freezing")) == 40 * 18 + 10 * 6
    only = 20 * 18 + 12 * 16 + 8 * 12 + 10 * 6
    limit = 20 * 18 + 12 * 15 + 8 * 9 + (5 * 6 + 3 * 5 + 2 * 3)
    found = RUN.forecast(COSTS)
    assert tuple(found) == WAYS
    assert found["freezing_only"] == pytest.approx(only)
    assert found["limit"] == pytest.approx(limit)
    # Every row once through the first unit, then, from what is kept, through the second; and each
    # is read once for every step and validation.
    fills = 5 * 1.0 + 5 * (2.0 + 0.1)
    reads = (12 + 3) * 0.1 + (8 + 2) * 0.2
    assert found["cached"] == pytest.approx(limit + fills + reads)
    assert found["limit"] < found["cached"] < found["freezing_only"] < found["without_freezing"]


def test_units_that_freeze_too_late_are_computed_in_every_step() -> None:
    late = dataclasses.replace(RUN, freeze_steps=(20, 36, 40))
    assert [late.fills_at(step, COSTS) for step in (0, 20, 36)] == [False, True, False]
    *_, last = late.spans(COSTS, "cached")
    assert last.before == 0
    assert last.seconds == pytest.approx(4 * (2 + 3 + 6 + 0.1) + 2 + 3 + 0.1)


def test_what_is_frozen_from_the_start_is_computed_once() -> None:
    run = dataclasses.replace(RUN, freeze_steps=(0, 40, 40))
    (span,) = run.spans(COSTS, "cached")
    assert span.before == 5 * 1.0
    assert span.seconds == pytest.approx(40 * 15.1 + 10 * 5.1)


def test_pixels_that_stay_in_memory_are_waited_for_once() -> None:
    costs = dataclasses.replace(COSTS, load=1.0)
    dearer = {keeps: dataclasses.replace(RUN, keeps_pixels=keeps) for keeps in (False, True)}
    for keeps, run in dearer.items():
        more = {way: run.forecast(costs)[way] - RUN.forecast(COSTS)[way] for way in WAYS}
        assert more["freezing_only"] == pytest.approx(50)
        assert more["cached"] == pytest.approx(5 if keeps else 50)


def test_costs_add_up_to_the_step_that_was_measured() -> None:
    costs = Costs.measured(10.0, 1.0, [1.0, 2.0], [300, 600], frozen=1)
    assert costs.backward * 2.0 + sum(costs.forward) + costs.load == 10.0
    assert costs.read[0] == 0
    assert costs.read[1] > costs.read[2] == 0
    assert Costs.from_json(dataclasses.asdict(costs), 2) == costs


class Slow(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(400):
            super().forward(x)
        return super().forward(x)


def test_the_forward_pass_is_timed_by_unit_and_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(64, 64), Slow(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    units = units_of(model)
    assert [unit.name for unit in units] == ["0", "1", "3"]
    random = torch.get_rng_state()
    seconds, sizes = forward_seconds(model, units, torch.randn(8, 64), None)
    torch.set_rng_state(random)
    assert seconds[1] > 0.8 * sum(seconds)
    assert sizes == [8 * 64 * 4] * 3
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model[0]._forward_pre_hooks


def test_parameters_beside_modules_are_timed_too() -> None:
    model = build("torchvision:vit_b_32", 3, image_size=32)
    units = units_of(model)
    seconds, _ = forward_seconds(model, units, torch.randn(2, 3, 32, 32), None)
    assert all(each > 0 for each in seconds)
    assert isinstance(units[0], Unit)


def test_time_that_is_left_follows_the_prediction_at_the_speed_that_was_seen() -> None:
    spans = [Span(10, 100.0), Span(10, 20.0, before=30.0)]
    eta = Eta(spans, step=0, now=0.0)
    assert eta.seconds_left(0, 0.0) == pytest.approx(150)
    assert eta.seconds_left(5, 50.0) == pytest.approx(100)
    assert eta.seconds_left(5, 100.0) > 150  # it takes twice as long
    assert eta.seconds_left(10, 130.0) == pytest.approx(20)  # the filling is done by then
    assert eta.seconds_left(20, 150.0) == 0
    unknown = Eta(spans, step=0, now=0.0, trust=0.0)
    assert unknown.seconds_left(0, 5.0) is None
    assert unknown.seconds_left(5, 10.0) == pytest.approx(20)  # of 150 parts, 50 took 10 s


def test_a_plan_needs_neither_data_nor_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--plan", "--dataset", "imagefolder", "--rows", "5000", "500", "--classes", "7"]
    assert main([*options, "--arch", "wrn10_1", "--image-size", "32", "-b", "32"]) == 0
    told = capsys.readouterr().out
    assert "5,000 training and 500 validation images, 3x32x32, 7 classes" in told
    for words in ("stem", "freezing only", "with the cache", "limit", "predicted from 5 steps"):
        assert words in told
    assert list(tmp_path.iterdir()) == []
