"""The schedule is the paper's, to rounding."""

import math

import pytest

from cachefreeze.freezeout.schedule import Schedule

POWERS = {"linear": 1, "squared": 2, "cubic": 3}
UNITS, STEPS = 9, 1000


def closed_form(unit: int, step: int, t0: float, power: int, scaled: bool) -> float:
    """Section 2 of the paper, written down independently; base rate 1."""
    end = (t0 + (1 - t0) * unit / (UNITS - 1)) ** power
    time = step / STEPS
    if time > end:
        return 0.0
    return (0.5 / end if scaled else 0.5) * (1 + math.cos(math.pi * time / end))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("shape", POWERS)
@pytest.mark.parametrize("t0", [0.8, 0.5, 0.1, 1.0])
def test_every_rate_is_the_closed_form_to_1e_12(shape: str, scaled: bool, t0: float) -> None:
    schedule = Schedule(UNITS, STEPS, t0, shape, scaled)
    for unit in range(UNITS):
        for step in range(STEPS + 1):
            expected = closed_form(unit, step, t0, POWERS[shape], scaled)
            assert abs(schedule.factor(unit, step) - expected) < 1e-12


def test_t0_is_given_before_the_cube() -> None:
    assert Schedule(UNITS, STEPS).freeze_steps[0] == 512


@pytest.mark.parametrize("shape", POWERS)
def test_scaled_rates_of_all_units_have_the_same_integral(shape: str) -> None:
    steps = 20_000
    schedule = Schedule(UNITS, steps, 0.5, shape, scale_lr=True)
    # The trapezoidal rule: the first step counts half. Exactly 1/2 by calculus.
    sums = [
        (sum(schedule.factor(unit, step) for step in range(steps)) - schedule.factor(unit, 0) / 2)
        / steps
        for unit in range(UNITS)
    ]
    assert sums == pytest.approx([0.5] * UNITS, abs=1e-6)


def test_unscaled_rates_give_later_units_more() -> None:
    schedule = Schedule(UNITS, STEPS, 0.5, "cubic", scale_lr=False)
    sums = [sum(schedule.factor(unit, step) for step in range(STEPS)) for unit in range(UNITS)]
    assert sums == sorted(sums)
    assert sums[0] < 0.2 * sums[-1]


@pytest.mark.parametrize("shape", POWERS)
def test_units_freeze_in_order_and_the_head_never_does(shape: str) -> None:
    schedule = Schedule(UNITS, STEPS, 0.3, shape)
    assert list(schedule.freeze_steps) == sorted(schedule.freeze_steps)
    frontiers = [schedule.frontier(step) for step in range(STEPS + 1)]
    assert frontiers[0] == 0
    assert frontiers == sorted(frontiers)
    assert frontiers[-1] == UNITS - 1


def test_a_unit_freezes_at_the_first_step_whose_rate_is_zero() -> None:
    schedule = Schedule(UNITS, 997, 0.37, "squared")
    for unit in range(UNITS - 1):
        step = schedule.freeze_steps[unit]
        assert schedule.factor(unit, step) == 0
        assert schedule.factor(unit, step - 1) > 0
        assert schedule.frontier(step) > unit >= schedule.frontier(step - 1)


def test_a_whole_number_of_steps_is_not_rounded_up() -> None:
    # 0.1 + 0.9 * 2 / 9 is 0.30000000000000004 in floating point.
    assert Schedule(10, 10, 0.1, "linear").freeze_steps == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


@pytest.mark.parametrize("shape", POWERS)
def test_with_t0_of_one_nothing_freezes_and_all_follow_one_cosine(shape: str) -> None:
    schedule = Schedule(UNITS, STEPS, 1.0, shape)
    assert schedule.frontier(STEPS) == 0
    for step in (0, 1, 500, 999):
        rates = {schedule.factor(unit, step) for unit in range(UNITS)}
        assert rates == {0.5 * (1 + math.cos(math.pi * step / STEPS))}


def test_a_network_of_one_unit_trains_to_the_end() -> None:
    assert Schedule(1, 10, 0.5).freeze_steps == (10,)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"t0": 0.0}, "t0"),
        ({"t0": 1.1}, "t0"),
        ({"t0": float("nan")}, "t0"),
        ({"shape": "quartic"}, "quartic"),
        ({"total_steps": 0}, "total_steps"),
        ({"units": 0}, "units"),
    ],
)
def test_a_value_out_of_range_is_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Schedule(**{"units": 3, "total_steps": 10, **change})  # type: ignore[arg-type]
