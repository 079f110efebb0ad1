"""How long a run will still take: by its plan, at the speed that was seen."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefreeze.outlook import Outlook, Stretch, stretches, stretches_by_units
from cachefreeze.planner import Costs, Drop, Keep, Move, Run, cheapest_plan, eager_plan

from .test_planner import instances

# 10 steps of 1 s, then 2 s of filling, then 20 steps of 0.1 s: 14 s in all.
PLANNED = (Stretch(10, 10.0), Stretch(20, 2.0, before=2.0))


def test_what_is_left_is_what_the_steps_that_are_left_cost() -> None:
    outlook = Outlook(0, 100.0, PLANNED)
    assert outlook.cost_after(0) == pytest.approx(14)
    assert outlook.cost_after(4) == pytest.approx(10)
    assert outlook.cost_after(10) == pytest.approx(4), "the store has still to be filled"
    assert outlook.cost_after(11) == pytest.approx(1.9)
    assert outlook.cost_after(29) == pytest.approx(0.1)
    assert outlook.cost_after(30) == outlook.cost_after(31) == 0


def test_a_run_that_goes_as_predicted_takes_as_long_as_predicted() -> None:
    outlook = Outlook(0, 100.0, PLANNED)
    assert outlook.seconds_left(0, 100.0) == pytest.approx(14)
    assert outlook.seconds_left(4, 104.0) == pytest.approx(10)
    # By the steps alone it would be 26 times 1 s.
    assert outlook.seconds_left(11, 112.1) == pytest.approx(1.9)
    assert outlook.seconds_left(30, 114.0) == 0


def test_what_was_seen_scales_what_is_left() -> None:
    outlook = Outlook(0, 0.0, PLANNED, trust=0.0)
    # Half as fast as predicted.
    assert outlook.seconds_left(4, 8.0) == pytest.approx(20)
    # A twentieth of the 14 s counts as seen beforehand: (8 + 0.7) of (4 + 0.7).
    assert Outlook(0, 0.0, PLANNED).seconds_left(4, 8.0) == pytest.approx(10 * 8.7 / 4.7)


def test_one_slow_step_does_not_turn_seconds_into_minutes() -> None:
    left = Outlook(0, 0.0, (Stretch(1000, 1000.0),)).seconds_left(1, 20.0)
    assert left is not None
    assert left < 1500, "and not 20,000"


def test_an_outlook_may_be_made_in_the_middle() -> None:
    outlook = Outlook(70, 500.0, PLANNED)
    assert outlook.seconds_left(70, 500.0) == pytest.approx(14)
    assert outlook.seconds_left(74, 504.0) == pytest.approx(10)
    assert outlook.seconds_left(100, 514.0) == 0


def test_without_seconds_nothing_is_said_before_anything_was_seen() -> None:
    # 4 steps an epoch, one unit of two freezes at step 4 of 8. No validation rows.
    run = Run((4, 8), 8, train_rows=8, val_rows=0, batch_size=2)
    outlook = Outlook(0, 0.0, stretches_by_units(run, 2, 0, 0), trust=0)
    # 3 + 3 a row at first, then 1 + 3: 24 and 16 for the halves, had each 4 rows; here twice that.
    assert outlook.cost_after(0) == pytest.approx(80)
    assert outlook.cost_after(4) == pytest.approx(32)
    assert outlook.seconds_left(0, 1.0) is None
    assert outlook.seconds_left(4, 6.0) == pytest.approx(4), "32 of work at 8 a second"
    assert outlook.seconds_left(8, 10.0) == 0


def test_rows_that_come_from_a_store_cost_no_prefix() -> None:
    run = Run((0, 8), 8, train_rows=8, val_rows=4, batch_size=2)
    computed = Outlook(0, 0.0, stretches_by_units(run, 2, 0, 0), trust=0)
    served = Outlook(0, 0.0, stretches_by_units(run, 2, 0, 1), trust=0)
    # 16 rows of training by 1 + 3, 8 of validation by 1 + 1; then without the first 1.
    assert computed.cost_after(0) == pytest.approx(16 * 4 + 8 * 2)
    assert served.cost_after(0) == pytest.approx(16 * 3 + 8)


def test_a_plan_adds_up_by_hand() -> None:
    run = Run((4, 8), 8, train_rows=8, val_rows=4, batch_size=2)
    keep = Keep(1, "raw", row_bytes=1.0, write=0.5, read=0.25)
    costs = Costs((3.0, 2.0), (1.0, 0.5), 0.125, 0.0, 10.0, 0.0, (keep,))
    first, second = stretches(costs, run, 0, None, [Move(4, keep, 12.0, 7.0, 0.0)])
    # Four steps, eight rows, and the validation of 4 rows comes at the end of the epoch: with what
    # froze by then, so it is the second stretch's.
    assert first == Stretch(4, 4 * 10 + 8 * (0.125 + 5))
    assert second == Stretch(4, 4 * 10 + 8 * (0.25 + 2) + 2 * 4 * (0.25 + 0.5), before=7.0)
    _, dropped = stretches(costs, run, 0, keep, [Drop(4)])
    assert dropped.cost == pytest.approx(4 * 10 + 8 * (0.125 + 1 + 2) + 8 * (0.125 + 1 + 0.5))
    assert dropped.before == 0


@settings(max_examples=60, deadline=None)
@given(instances(codecs=True), st.integers(0, 10), st.booleans())
def test_what_is_left_of_a_plan_is_what_the_planner_says_it_takes(
    instance: tuple[Costs, Run, float], start: int, eager: bool
) -> None:
    costs, run, max_bytes = instance
    start = min(start, run.total_steps - 1)
    plan = (eager_plan if eager else cheapest_plan)(costs, run, max_bytes, start=start)
    outlook = Outlook(start, 0.0, stretches(costs, run, start, None, plan.events))
    assert outlook.cost_after(start) == pytest.approx(plan.seconds)
    left = [outlook.cost_after(step) for step in range(start, run.total_steps + 1)]
    assert all(a >= b - 1e-9 for a, b in pairwise(left))
    assert left[-1] == 0
    seconds = outlook.seconds_left(start, 0.0)
    assert seconds is not None
    assert math.isfinite(seconds)
