"""What is predicted of a run: when rows are kept, what it costs, how long it still takes."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn

from cachefreeze.freezeout import Unit, units_of
from cachefreeze.models import build
from cachefreeze.plan import costs, forecast
from cachefreeze.plan.costs import Costs
from cachefreeze.plan.fill import Fill, worth_filling
from cachefreeze.plan.forecast import WAYS, Run, Span
from cachefreeze.train import main
from cachefreeze.training import time_left
from cachefreeze.training.launch import ALONE
from cachefreeze.training.measuring import TIMED, WARM_UP, forward_seconds
from cachefreeze.training.progress import Eta
from cachefreeze.training.ranks import Ranks
from cachefreeze.training.run_state import RunState
from cachefreeze.training.time_left import TimeLeft

RULE = [
    (module, name, getattr(module, name))
    for module, names in ((forecast, ("COMPARED", "TRACED")), (costs, ("READ_RATE", "WRITE_RATE")))
    for name in names
]


@pytest.fixture(autouse=True)
def rule_of_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in RULE:
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize(
    ("now", "later", "worth"),
    [
        (Fill(cost=9.0, again=2.0, spared=1.0, steps_left=10), None, True),
        (Fill(cost=10.0, again=2.0, spared=1.0, steps_left=10), None, False),
        # Until the next units freeze it spares three seconds, or two.
        (Fill(9.0, 2.0, 1.0, 20), Fill(9.0, 2.0, 2.0, 17), True),
        (Fill(9.0, 2.0, 1.0, 20), Fill(9.0, 2.0, 2.0, 18), False),
        # A pass at the next freeze would come too late.
        (Fill(9.0, 2.0, 1.0, 20), Fill(9.0, 2.0, 0.4, 18), True),
    ],
)
def test_a_pass_over_the_rows_must_pay_and_must_not_come_too_early(
    now: Fill, later: Fill | None, worth: bool
) -> None:
    assert worth_filling(now, later) == worth


def gain(run: Run, costs: Costs, steps: Iterable[int]) -> float:
    """Returns the seconds that passes over the rows before some steps spare a run."""
    kept, total = 0, 0.0
    for step in steps:
        total += run.fill(step, kept, costs).gain
        kept = sum(one <= step for one in run.freeze_steps)
    return total


@pytest.mark.parametrize("epochs", [6, 20])
@pytest.mark.parametrize("t0", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("backward", [0.5, 2.0])
@pytest.mark.parametrize("transfer", [0.0, 0.1, 0.5])  # seconds, beside a forward pass of 1
def test_no_other_choice_of_passes_is_much_better(
    epochs: int, t0: float, backward: float, transfer: float
) -> None:
    steps, units = 50 * epochs, 6
    freezes = [round(steps * (t0 + (1 - t0) * unit / units)) for unit in range(units)]
    run = Run((*freezes, steps), steps, 50, 3200, 640, 64)
    sizes = [transfer / (1 + unit) for unit in range(units)]
    kept = (0.0, *sizes, 0.0)
    forward = (1 / (units + 1),) * (units + 1)
    costs = Costs(forward, backward, kept, 0.0, tuple(2 * one for one in kept))
    chosen, done = [], 0
    for step in freezes:
        if run.fills_at(step, done, costs):
            chosen.append(step)
            done = sum(one <= step for one in freezes)
    best = max(
        gain(run, costs, some)
        for count in range(units + 1)
        for some in combinations(freezes, count)
    )
    assert best - gain(run, costs, chosen) <= 0.02 * run.forecast(costs)["freezing_only"]
    assert gain(run, costs, chosen) >= 0


# Three units that cost 1, 2 and 3 s forward and twice that backward; 10 epochs of 4 steps and one
# batch of validation. The first freezes after 5 epochs, the second after 8.
COSTS = Costs((1.0, 2.0, 3.0), 2.0, (0.0, 0.1, 0.2, 0.3), 0.0, (0.0, 0.2, 0.4, 0.6))
RUN = Run((20, 32, 40), 40, 4, 64, 16, 16)


@pytest.mark.parametrize(("step", "passes"), [(0, 3), (28, 3), (31, 3), (32, 2), (39, 1)])
def test_only_views_that_are_still_shown_are_computed(step: int, passes: int) -> None:
    run = dataclasses.replace(RUN, views=3)
    assert run.passes(step) == passes
    costs = Costs.unknown(3)
    once, often = (one.fill(20, 0, costs) for one in (RUN, run))
    assert (often.cost - once.cost) == pytest.approx(2 * 4 * 1.0)  # two more epochs of one unit
    assert often.spared == once.spared


def test_every_way_to_train_has_its_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "TRACED", 0.1)
    monkeypatch.setattr(forecast, "COMPARED", 1)
    # Forward and backward of all units, and validations.
    assert sum(s.seconds for s in RUN.spans(COSTS, "without_freezing")) == 40 * 18 + 10 * 6
    only = 20 * 18 + 12 * 16 + 8 * 12 + 10 * 6
    limit = 20 * 18 + 12 * 15 + 8 * 9 + (5 * 6 + 3 * 5 + 2 * 3)
    found = RUN.forecast(COSTS)
    assert tuple(found) == WAYS
    assert found["freezing_only"] == pytest.approx(only)
    assert found["limit"] == pytest.approx(limit)
    # Every row once through the first unit, then, from what is kept, through the second, each with
    # some tracing and a batch that is compared; and each is read for every step and validation.
    fills = 4 * (1.0 + 0.2) + 0.6 + 1.0 + 4 * (2.0 + 0.1 + 0.4) + 0.6 + 3.0
    reads = (12 + 3) * 0.1 + (8 + 2) * 0.2
    assert found["cached"] == pytest.approx(limit + fills + reads)
    assert found["limit"] < found["cached"] < found["freezing_only"] < found["without_freezing"]


def test_units_that_freeze_too_late_are_computed_in_every_step() -> None:
    late = dataclasses.replace(RUN, freeze_steps=(10, 36, 40))
    assert [late.fills_at(step, 0, COSTS) for step in (0, 10, 36)] == [False, True, False]
    assert not late.fills_at(36, 1, COSTS)
    *_, last = late.spans(COSTS, "cached")
    assert last.before == 0
    assert last.seconds == pytest.approx(4 * (2 + 3 + 6 + 0.1) + 2 + 3 + 0.1)


def test_what_is_frozen_from_the_start_is_computed_once() -> None:
    run = dataclasses.replace(RUN, freeze_steps=(0, 40, 40))
    (span,) = run.spans(COSTS, "cached")
    assert span.before == pytest.approx(4 * (1.0 + 0.2) + 1.5 * 6.0 + 2 * 1.0)
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
    assert costs.backward * 2.0 + sum(costs.forward) + costs.load + costs.other == 10.0
    assert costs.read[0] == 0
    assert costs.read[1] > costs.read[2] == 0
    assert Costs.from_json(dataclasses.asdict(costs), 2) == costs
    on_gpu = Costs.measured(10.0, 1.0, [1.0, 2.0], [300, 600], frozen=1, on_gpu=True)
    assert on_gpu.read[1] < costs.read[1] / 100


@pytest.mark.parametrize("served", [0.0, 0.75, 1.0])
def test_a_run_of_the_head_alone_foretells_the_training_of_all_units(
    served: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven eighths of the network are frozen, and rows may come from an earlier run."""
    forward, sizes, other = [2.0] * 7 + [0.25], [0] * 8, 3.0
    monkeypatch.setattr(time_left, "forward_seconds", lambda *given: (forward, sizes))
    run = Run((*(0,) * 7, 100), 100, 10, 160, 16, 16)
    state, counts = RunState(1), dict.fromkeys(("rows_served", "rows_computed"), 0.0)
    model, x = nn.Linear(1, 1), torch.zeros(16, 1)
    units = [Unit("layer", [])] * 8
    left = TimeLeft(run, state, units, Ranks(ALONE), lambda: counts, cached=True)
    for step in range(WARM_UP + TIMED):
        # The first steps take longer, and are not timed.
        extra = 1000.0 * (step < WARM_UP)
        state.seconds["train"] += (1 - served) * 14.0 + 0.25 + 2 * 0.25 + other + 1.0 + extra
        state.seconds["load"] += 1.0
        counts["rows_served"] += 16 * served
        counts["rows_computed"] += 16 * (1 - served)
        left.note_step(model, x, None, frozen=7)
    assert state.costs is not None
    found = run.forecast(state.costs)
    close = partial(pytest.approx, rel=0.01)  # a moment of real time is measured, too
    assert found["without_freezing"] == close(100 * (3 * 14.25 + other + 1) + 10 * 15.25)
    assert found["freezing_only"] == close(100 * (14 + 0.75 + other + 1) + 10 * 15.25)
    assert found["limit"] == close(100 * (0.75 + other + 1) + 10 * 1.25)


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
    views = ["--augment", "--views", "2"]
    assert main([*options, "--arch", "wrn10_1", "--image-size", "32", "-b", "32", *views]) == 0
    told = " ".join(capsys.readouterr().out.split())  # lines are broken at 80 columns
    assert "5,000 training and 500 validation images, 3x32x32, 7 classes" in told
    for words in ("stem", "freezing only", "with the cache", "limit", "predicted from 5 steps"):
        assert words in told
    assert "1 - 2/30 = 93% can be left out (2 views of each image)" in told
    assert list(tmp_path.iterdir()) == []
