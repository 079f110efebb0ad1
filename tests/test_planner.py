"""The plan is the cheapest there is, keeps to the budget, and adds up."""

from collections.abc import Iterator, Set
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefreeze.planner import (
    Costs,
    Drop,
    Interval,
    Keep,
    Move,
    Plan,
    Run,
    cheapest_plan,
    eager_plan,
)
from cachefreeze.freezeout.schedule import Schedule

SECONDS = st.floats(0, 10, allow_nan=False)


@st.composite
def instances(draw: st.DrawFn, codecs: bool = False) -> tuple[Costs, Run, float]:
    units = draw(st.integers(2, 4))
    epochs, train_rows, batch = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 7)),
        draw(st.integers(1, 4)),
    )
    total = epochs * -(-train_rows // batch)
    freezes = sorted(draw(st.lists(st.integers(0, total), min_size=units - 1, max_size=units - 1)))
    run = Run((*freezes, total), total, train_rows, draw(st.integers(0, 5)), batch)
    keeps = []
    for boundary in range(units):
        keep = Keep(
            boundary, "raw", draw(st.integers(1, 9)), draw(SECONDS), draw(SECONDS), verify=1
        )
        keeps.append(keep)
        if codecs and boundary < 2:
            size = draw(st.integers(1, 9))
            keeps.append(
                Keep(boundary, "zstd", size, draw(SECONDS), 0.1, draw(SECONDS), reserve=True)
            )
    costs = Costs(
        train=tuple(draw(SECONDS) for _ in range(units)),
        forward=tuple(draw(SECONDS) for _ in range(units)),
        inputs=draw(SECONDS),
        normalize=0.0,
        step=draw(SECONDS),
        store=draw(st.floats(0, 5)),
        keeps=tuple(keeps),
    )
    return costs, run, draw(st.sampled_from([0.0, 20.0, 60.0, 120.0, 1e9]))


def start_of(keep: Keep | None) -> int:
    return 0 if keep is None else keep.boundary


def seconds_of(costs: Costs, run: Run, step: int, keep: Keep | None) -> float:
    """One step of training, and validation where an epoch ends: counted out one by one."""
    read = costs.inputs if keep is None else keep.read
    frontier = sum(freeze <= step for freeze in run.freeze_steps)
    per_epoch = -(-run.train_rows // run.batch_size)
    rows = min(run.batch_size, run.train_rows - step % per_epoch * run.batch_size)
    prefix = sum(costs.forward[start_of(keep) : frontier])
    return costs.step + rows * (read + prefix + sum(costs.train[frontier:]))


def validation(costs: Costs, run: Run, keep: Keep | None) -> float:
    read = costs.inputs if keep is None else keep.read
    return run.val_rows * (read + sum(costs.forward[start_of(keep) :]))


def filling(costs: Costs, run: Run, origin: Keep | None, keep: Keep) -> float:
    read = costs.inputs if origin is None else origin.read
    between = sum(costs.forward[start_of(origin) : keep.boundary])
    return run.rows * (read + between + keep.write + keep.load) + costs.store


def allowed(costs: Costs, run: Run, budget: float, origin: Keep | None, keep: Keep) -> bool:
    held = 0 if origin is None else origin.row_bytes * run.rows
    if keep.reserve:
        raw = next(k for k in costs.keeps if k.boundary == keep.boundary and not k.reserve)
        if held + raw.row_bytes * run.rows <= budget:
            return False
    later = origin is None or keep.boundary > origin.boundary
    return later and held + keep.row_bytes * run.rows <= budget


def paths_at_a_freeze(
    costs: Costs,
    run: Run,
    budget: float,
    frontier: int,
    source: Keep | None,
    found: Set[int] = frozenset(),
) -> Iterator[tuple[float, Keep | None]]:
    """Every way to change the source at one moment, several changes in a row included."""

    def walk(
        seconds: float, source: Keep | None, seen: tuple[Keep | None, ...]
    ) -> Iterator[tuple[float, Keep | None]]:
        yield seconds, source
        if None not in seen:
            yield from walk(seconds, None, (*seen, None))
        for keep in costs.keeps:
            if keep in seen or keep.boundary > frontier:
                continue
            if allowed(costs, run, budget, source, keep):
                more = filling(costs, run, source, keep)
                if keep.boundary in found:
                    more = min(more, run.rows * (keep.verify + keep.load) + costs.store)
                yield from walk(seconds + more, keep, (*seen, keep))

    yield from walk(0.0, source, (source,))


def brute_force(
    costs: Costs,
    run: Run,
    budget: float,
    start: int = 0,
    source: Keep | None = None,
    found: Set[int] = frozenset(),
) -> float:
    """Least seconds over all sequences, step by step."""
    per_epoch = -(-run.train_rows // run.batch_size)
    best: dict[Keep | None, float] = {source: 0.0}
    frontier = sum(freeze <= start for freeze in run.freeze_steps)
    best = moved(costs, run, budget, frontier, best, found)
    if start and start % per_epoch == 0:  # frozen after an epoch's last step: before validation
        for each in best:
            best[each] += validation(costs, run, each)
    for step in range(start, run.total_steps):
        frontier = sum(freeze <= step for freeze in run.freeze_steps)
        if step > start and step in run.freeze_steps and step % per_epoch:
            best = moved(costs, run, budget, frontier, best)
        for source in best:
            best[source] += seconds_of(costs, run, step, source)
        if (step + 1) % per_epoch == 0:
            if step + 1 in run.freeze_steps and step + 1 < run.total_steps:
                after = sum(freeze <= step + 1 for freeze in run.freeze_steps)
                best = moved(costs, run, budget, after, best)
            for source in best:
                best[source] += validation(costs, run, source)
    return min(best.values())


def moved(
    costs: Costs,
    run: Run,
    budget: float,
    frontier: int,
    best: dict[Keep | None, float],
    found: Set[int] = frozenset(),
) -> dict[Keep | None, float]:
    reached: dict[Keep | None, float] = {}
    for source, seconds in best.items():
        for more, target in paths_at_a_freeze(costs, run, budget, frontier, source, found):
            reached[target] = min(reached.get(target, np.inf), seconds + more)
    return reached


@settings(max_examples=120, deadline=None)
@given(instances())
def test_no_sequence_of_materialisations_is_cheaper(instance: tuple[Costs, Run, float]) -> None:
    costs, run, budget = instance
    plan = cheapest_plan(costs, run, budget)
    assert plan.seconds == pytest.approx(brute_force(costs, run, budget), rel=1e-9, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(instances(codecs=True))
def test_nor_with_compressed_stores_where_raw_ones_do_not_fit(
    instance: tuple[Costs, Run, float],
) -> None:
    costs, run, budget = instance
    plan = cheapest_plan(costs, run, budget)
    assert plan.seconds == pytest.approx(brute_force(costs, run, budget), rel=1e-9, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(instances(codecs=True), st.data())
def test_nor_from_the_middle_of_a_run_with_stores_on_the_disk(
    instance: tuple[Costs, Run, float], data: st.DataObject
) -> None:
    costs, run, budget = instance
    starts = [interval.step for interval in run.intervals()]
    start = data.draw(st.sampled_from(starts))
    frontier = sum(step <= start for step in run.freeze_steps)
    sources = [
        k for k in costs.keeps if k.boundary <= frontier and k.row_bytes * run.rows <= budget
    ]
    source = data.draw(st.sampled_from([None, *sources]))
    found = data.draw(st.sets(st.integers(0, frontier)))
    plan = cheapest_plan(costs, run, budget, start=start, source=source, found=found)
    best = brute_force(costs, run, budget, start, source, found)
    assert plan.seconds == pytest.approx(best, rel=1e-9, abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(instances(codecs=True))
def test_a_plan_keeps_to_the_budget_adds_up_and_never_costs_time(
    instance: tuple[Costs, Run, float],
) -> None:
    costs, run, budget = instance
    plan = cheapest_plan(costs, run, budget)
    assert plan.seconds <= plan.freezing_only + 1e-6
    assert plan.limit <= plan.freezing_only + 1e-6
    held: Keep | None = None
    for event in plan.events:
        if isinstance(event, Drop):
            held = None
            continue
        assert allowed(costs, run, budget, held, event.keep)
        assert event.bytes == event.keep.row_bytes * run.rows
        assert event.cost == pytest.approx(filling(costs, run, held, event.keep))
        assert event.keep.boundary <= sum(step <= event.step for step in run.freeze_steps)
        held = event.keep
    gained = sum(move.saving - move.cost for move in plan.moves)
    assert gained == pytest.approx(plan.freezing_only - plan.seconds, rel=1e-9, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(instances())
def test_going_on_with_the_plan_half_way_is_what_the_whole_plan_says(
    instance: tuple[Costs, Run, float],
) -> None:
    costs, run, budget = instance
    whole = cheapest_plan(costs, run, budget)
    starts = [interval.step for interval in run.intervals()]
    middle = starts[len(starts) // 2]
    source = None
    for event in whole.events:
        if event.step < middle:
            source = event.keep if isinstance(event, Move) else None
    rest = cheapest_plan(costs, run, budget, start=middle, source=source)
    after = [event for event in whole.events if event.step >= middle]
    before = sum(
        seconds_of_interval(costs, run, interval, whole)
        for interval in run.intervals()
        if interval.step < middle
    )
    assert before + rest.seconds == pytest.approx(whole.seconds, rel=1e-9, abs=1e-5)
    assert len(rest.events) <= len(after) or rest.seconds <= whole.seconds


def seconds_of_interval(costs: Costs, run: Run, interval: Interval, plan: Plan) -> float:
    """What a plan spends in one interval, its materialisations included."""
    source, total = None, 0.0
    for event in plan.events:
        if event.step <= interval.step:
            source = event.keep if isinstance(event, Move) else None
        if event.step == interval.step and isinstance(event, Move):
            total += event.cost
    read = costs.inputs if source is None else source.read
    f, validated = interval.frontier, interval.validations * run.val_rows
    total += (interval.train_rows + validated) * (read + sum(costs.forward[start_of(source) : f]))
    total += interval.train_rows * sum(costs.train[f:]) + validated * sum(costs.forward[f:])
    return total + interval.steps * costs.step


@settings(max_examples=100, deadline=None)
@given(instances(), st.integers(0, 30))
def test_the_intervals_are_the_run(instance: tuple[Costs, Run, float], start: int) -> None:
    _, run, _ = instance
    start = min(start, run.total_steps - 1)
    intervals = run.intervals(start)
    epochs = run.total_steps // run.steps_per_epoch
    assert sum(interval.steps for interval in intervals) == run.total_steps - start
    assert sum(i.train_rows for i in intervals) == epochs * run.train_rows - run.train_rows_before(
        start
    )
    if start == 0:
        assert sum(interval.validations for interval in intervals) == epochs


def test_what_freezes_early_makes_a_run_shorter() -> None:
    assert run_of(8, t0=1.0).row_passes == 50 * 5000
    frozen_half_way = Run((1000, 2000), 2000, 5000, 1000, 128)
    assert frozen_half_way.row_passes == 50 * 5000 * 0.75
    assert run_of(8, t0=0.5).row_passes < run_of(8, t0=0.8).row_passes < 50 * 5000


def costs_of(units: int, **changes: object) -> Costs:
    plain: dict[str, object] = {
        "train": (3e-3,) * units,
        "forward": (1e-3,) * units,
        "inputs": 1e-5,
        "normalize": 1e-5,
        "step": 1e-3,
        "store": 1e-3,
        "keeps": tuple(Keep(b, "raw", 1e5, 1e-4, 1e-5, verify=3e-5) for b in range(1, units)),
    }
    return Costs(**{**plain, **changes})  # type: ignore[arg-type]


def run_of(units: int, epochs: int = 50, t0: float = 0.5) -> Run:
    steps = epochs * 40
    return Run(Schedule(units, steps, t0).freeze_steps, steps, 5000, 1000, 128)


def test_cheap_boundaries_are_all_kept_in_a_long_run() -> None:
    plan = cheapest_plan(costs_of(8), run_of(8), float("inf"))
    assert [move.keep.boundary for move in plan.moves] == [1, 2, 3, 4, 5, 6, 7]
    assert plan.efficiency is not None
    assert plan.efficiency > 0.9


def test_nothing_is_kept_when_it_does_not_pay() -> None:
    run = run_of(8, epochs=1)
    assert cheapest_plan(costs_of(8), run, float("inf")).events == ()
    assert cheapest_plan(costs_of(8), run_of(8), 0).events == ()
    assert cheapest_plan(costs_of(8), run_of(8, t0=1.0), float("inf")).events == ()


def test_a_huge_boundary_is_passed_over_for_the_small_one_behind_it() -> None:
    keeps = [Keep(b, "raw", 1e5, 1e-4, 1e-5) for b in range(1, 8)]
    keeps[2] = Keep(3, "raw", 5e6, 0.06, 5e-3)
    plan = cheapest_plan(costs_of(8, keeps=tuple(keeps)), run_of(8), float("inf"))
    assert [move.keep.boundary for move in plan.moves] == [1, 2, 4, 5, 6, 7]


def test_a_store_that_is_there_is_verified_instead_of_filled() -> None:
    run = run_of(8)
    now = run.freeze_steps[2]
    plan = cheapest_plan(costs_of(8), run, float("inf"), start=now, found={3})
    first = plan.moves[0]
    assert (first.step, first.keep.boundary, first.found) == (now, 3, True)
    assert first.cost == pytest.approx(6000 * 3e-5 + 1e-3)
    assert not any(move.found for move in plan.moves[1:])


def test_what_is_found_may_be_what_another_store_is_filled_from() -> None:
    """Decoding takes two seconds a row, verifying kept pixels one, and all else next to nothing."""
    raw = [Keep(boundary, "raw", 1, 0, 0, verify=1) for boundary in range(4)]
    packed = [Keep(boundary, "zstd", 1, 0, 0.1, reserve=True) for boundary in range(2)]
    costs = Costs((0.0,) * 4, (0.0, 0.0, 1.0, 0.0), 2.0, 0.0, 0.0, 0.0, (*raw, *packed))
    run = Run((0, 0, 0, 2), 2, 1, 0, 1)
    plan = cheapest_plan(costs, run, 20, found={0})
    assert [(move.keep.boundary, move.found) for move in plan.moves] == [(0, True), (3, False)]
    assert plan.seconds == brute_force(costs, run, 20, found={0}) == 2.0


def test_slow_rows_are_given_up() -> None:
    slow = tuple(Keep(b, "raw", 1e5, 1e-4, 0.1) for b in range(1, 8))
    run, costs = run_of(8), costs_of(8, keeps=slow)
    plan = cheapest_plan(costs, run, float("inf"), start=run.freeze_steps[3], source=slow[1])
    assert plan.events == (Drop(run.freeze_steps[3]),)


def test_room_is_made_by_going_back_to_the_input_where_that_pays() -> None:
    """Two stores do not fit side by side, so each must be filled from the network's input."""
    plan = cheapest_plan(costs_of(4), run_of(4, epochs=100), 6000 * 1.5e5)
    kinds = [type(event) for event in plan.events]
    assert kinds == [Move, Drop, Move, Drop, Move]


def test_two_changes_at_one_moment_where_one_does_not_fit() -> None:
    """The large store at 3 does not fit beside that at 1, but both do beside the small one at 2."""
    sizes = {1: 10, 2: 1, 3: 10}
    keeps = tuple(Keep(b, "raw", size, 1e-3, 1e-5) for b, size in sizes.items())
    costs = costs_of(5, keeps=keeps, forward=(9.0, 1e-3, 1.0, 1e-3, 1e-3))
    run = Run((10, 50, 50, 4000, 4000), 4000, 100, 10, 1)
    plan = cheapest_plan(costs, run, 11 * 110)
    assert [(move.step, move.keep.boundary) for move in plan.moves] == [(10, 1), (50, 2), (50, 3)]
    assert not any(isinstance(event, Drop) for event in plan.events)


def test_eager_keeps_one_boundary_of_those_that_freeze_together() -> None:
    run = Run((10, 50, 50, 50, 4000), 4000, 100, 10, 1)
    plan = eager_plan(costs_of(5), run, float("inf"))
    assert [(move.step, move.keep.boundary) for move in plan.moves] == [(10, 1), (50, 4)]


@pytest.mark.parametrize("budget", [float("inf"), 6000 * 1.5e5, 6000 * 3e5])
def test_two_hundred_units_and_freezes_are_no_matter(budget: float) -> None:
    """30 ms or less, see docs/log.md; what could go wrong at this size is the arithmetic."""
    run, costs = run_of(201, epochs=100), costs_of(201)
    assert len(run.intervals()) > 195
    plan = cheapest_plan(costs, run, budget)
    gained = sum(move.saving - move.cost for move in plan.moves)
    assert gained == pytest.approx(plan.freezing_only - plan.seconds, rel=1e-9)
    assert plan.peak_bytes <= budget


def test_the_planner_knows_no_torch() -> None:
    import subprocess
    import sys

    package = Path(__file__).parents[1] / "cachefreeze"
    code = (
        "import sys, importlib.util as util\n"
        f"spec = util.spec_from_file_location('planner', {str(package / 'planner.py')!r})\n"
        "module = sys.modules['planner'] = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules and 'zarr' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
