"""A forecast learns from what is observed, and keeps books that add up."""

import dataclasses
import json

import pytest

from cachefreeze.forecast import Filled, Forecast, correction, pays_at_best
from cachefreeze.planner import Drop, Move, Run
from cachefreeze.prefix_cache import Materialization
from cachefreeze.profiler import Boundary, CodecCost, Profile, Residence
from cachefreeze.freezeout.schedule import Schedule

SPLITS = {"train": 5000, "val": 1000}
UNITS = 6


def make_profile(**changes: object) -> Profile:
    codecs = {"lz4": CodecCost(0.8, 2e-9, 5e-10), "zstd": CodecCost(0.5, 4e-9, 1e-9)}
    boundary = Boundary((32, 32, 16), "float32", 0.0, 0.0, codecs)
    plain: dict[str, object] = {
        "train": (3e-3,) * UNITS,
        "forward": (1e-3,) * UNITS,
        "normalize": 1e-5,
        "decode": 2e-4,
        "step": 1e-3,
        "boundaries": (boundary,) * (UNITS - 1),
        "pixel_bytes": 3072,
        "write": 1e-9,
        "read": 2e-10,
        "verify": 3e-10,
        "store": 0.01,
        "problem": None,
        "rows": 128,
        "passes": 6,
        "seconds": 1.0,
    }
    return Profile(**{**plain, **changes})  # type: ignore[arg-type]


def make_run(epochs: int = 40, t0: float = 0.5) -> Run:
    steps = epochs * 40
    return Run(Schedule(UNITS, steps, t0).freeze_steps, steps, 5000, 1000, 128)


def make(max_bytes: float = float("inf"), **options: object) -> Forecast:
    profile = options.pop("profile", make_profile())
    return Forecast(profile, options.pop("run", make_run()), SPLITS, max_bytes, **options)  # type: ignore[arg-type]


def done(keep_boundary: int, seconds: float, compute: float, **changes: object) -> Materialization:
    plain: dict[str, object] = {
        "boundary": keep_boundary,
        "rows": 6000,
        "bytes": 1,
        "seconds": seconds,
        "compute_seconds": compute,
        "reused": False,
        "held": 0,
        "codec": "raw",
        "lossy": False,
    }
    return Materialization(**{**plain, **changes})  # type: ignore[arg-type]


def test_a_profile_can_be_written_down() -> None:
    assert json.loads(json.dumps(make_profile().as_json()))["train"] == [3e-3] * UNITS


def test_pixels_are_kept_from_the_start_and_each_boundary_from_its_freeze() -> None:
    forecast = make()
    assert [move.keep.boundary for move in forecast.first.moves] == [0, 1, 2, 3, 4, 5]
    assert [move.step for move in forecast.first.moves] == [0, *make_run().freeze_steps[:-1]]


def test_eager_keeps_what_is_frozen_though_it_costs_more() -> None:
    profile = make_profile(write=1e-7)  # 10 MB/s
    planned, eager = make(profile=profile), make(profile=profile, policy="eager")
    assert len(planned.first.moves) < len(eager.first.moves) == 6
    assert planned.first.seconds < eager.first.seconds


def test_compressed_stores_are_planned_only_where_raw_ones_do_not_fit() -> None:
    raw = 6000 * 65536
    assert {m.keep.codec for m in make(codec="auto").first.moves} == {"raw"}
    # One raw store fits, but no two of them side by side.
    moves = make(1.6 * raw, codec="auto").first.moves
    assert {move.keep.codec for move in moves if move.keep.boundary} >= {"zstd"}
    assert {m.keep.codec for m in make(codec="lz4").first.moves if m.keep.boundary} == {"lz4"}


def test_slow_steps_make_all_arithmetic_dearer() -> None:
    forecast = make()
    predicted = forecast.step_seconds(0, None)
    forecast.observe_steps([predicted * 2] * 10, 0, None)
    assert forecast.step_seconds(0, None) == pytest.approx(2 * predicted)
    assert forecast.costs.forward == pytest.approx((2e-3,) * UNITS)


def test_a_few_steps_are_not_believed() -> None:
    forecast = make()
    forecast.observe_steps([9.0] * 3, 0, None)
    assert forecast.costs == make().costs


def test_one_odd_observation_does_not_decide_it_all() -> None:
    assert correction(100, 1) == 5
    assert correction(0.001, 1) == 0.2
    assert correction(1, 0) == 1
    assert correction(0, 1) == 1


def test_slow_writing_stops_further_stores_that_no_longer_pay() -> None:
    forecast = make()
    keep = forecast.keep(1, "raw")
    forecast.observe_filling(None, keep, done(1, seconds=100.0, compute=7.3))
    assert forecast.keep(1, "raw").write == pytest.approx(keep.write * 5)
    for _ in range(3):
        forecast.observe_filling(None, forecast.keep(1, "raw"), done(1, 1e4, compute=7.3))
    step = make_run().freeze_steps[1]
    plan = forecast.revise(step, forecast.keep(1, "raw"))
    assert len(plan.moves) < 2


def test_a_store_that_was_found_says_nothing_of_what_filling_costs() -> None:
    forecast = make()
    forecast.observe_filling(None, forecast.keep(1, "raw"), done(1, 50.0, 0.0, reused=True))
    assert forecast.costs == make().costs


SMALL, LARGE = (Boundary((32, 32, n), "float32", 0.0, 0.0, {}) for n in (8, 16))


def beside_a_gpu(**options: object) -> Forecast:
    """Every second boundary fits into the device's memory, the others come from the disk."""
    room = 6000 * SMALL.row_bytes
    residence = Residence(lambda needed: "device" if needed <= room else "disk", beside=4)
    profile = make_profile(boundaries=(SMALL, LARGE) * 2 + (SMALL,))
    return make(residence=residence, **{"profile": profile, **options})


def test_rows_in_memory_say_nothing_of_the_disk() -> None:
    """They are written while training goes on: to fill them took the arithmetic, and a little."""
    forecast = beside_a_gpu()
    disk = forecast.keep(2, "raw").write
    forecast.observe_filling(None, forecast.keep(1, "raw"), done(1, 8.3, 7.3, tier="device"))
    assert (forecast.keep(2, "raw").write, forecast.costs.store) == (disk, 0.01)
    # Nor where they should have gone to the disk, or should not have.
    forecast.observe_filling(None, forecast.keep(2, "raw"), done(2, 8.3, 8.2, tier="host"))
    forecast.observe_filling(None, forecast.keep(1, "raw"), done(1, 99.0, 7.3))
    assert (forecast.keep(2, "raw").write, forecast.costs.store) == (disk, 0.01)
    # Those that lose precision are on the disk before they are in memory.
    rounded = beside_a_gpu(
        profile=make_profile(boundaries=(dataclasses.replace(SMALL, lossy=True), LARGE) * 2)
    )
    rounded.observe_filling(
        None, rounded.keep(1, "raw"), done(1, 99.0, 7.3, tier="device", lossy=True)
    )
    assert rounded.keep(2, "raw").write == pytest.approx(5 * disk)


@pytest.mark.parametrize("decode", [0.0, 1e-5])
def test_reading_that_takes_what_it_should_corrects_nothing(decode: float) -> None:
    """With four threads beside the device, training waits for a quarter of it."""
    large = dataclasses.replace(LARGE, decode=decode)
    forecast = beside_a_gpu(profile=make_profile(boundaries=(SMALL, large) * 2 + (SMALL,)))
    keep = forecast.keep(2, "raw")
    assert keep.read == pytest.approx(65536 * 2e-10 / 4 + decode)
    before = forecast.costs
    forecast.observe_reading(keep, keep.read / 65536)
    assert forecast.costs == before
    forecast.observe_reading(keep, 3 * keep.read / 65536)
    assert forecast.keep(4, "raw").read == pytest.approx(3 * keep.read)


def test_what_is_observed_holds_for_what_was_given_up_too() -> None:
    forecast = make()
    forecast.observe_reading(forecast.keep(1, "raw"), 1e-9)
    forecast.forget(forecast.keep(1, "raw"))
    assert not any(keep.boundary == 2 for keep in forecast.costs.keeps)
    assert forecast.keep(2, "raw").read == pytest.approx(65536e-9)


def test_slow_reading_goes_back_to_the_input() -> None:
    forecast = make(profile=make_profile(decode=0.0))
    for _ in range(2):  # seen twice, counted once
        # A row in 66 ms, which computing has in 2.
        forecast.observe_reading(forecast.keep(2, "raw"), 1e-6)
    source = forecast.keep(2, "raw")
    assert source.read == pytest.approx(65536e-6)
    step = make_run().freeze_steps[2]
    assert forecast.revise(step, source).events == (Drop(step),)


def test_what_could_not_be_had_is_not_planned_again() -> None:
    sizes = [Boundary((32, 32, n), "float32", 0.0, 0.0, {}) for n in (16, 8, 16, 4, 16)]
    forecast = make(profile=make_profile(boundaries=tuple(sizes)))
    forecast.forget(forecast.keep(2, "raw"))
    plan = forecast.revise(make_run().freeze_steps[1], None)
    assert [move.keep.boundary for move in plan.moves] == [0, 4]
    # What rows come from now is known all the same.
    source = forecast.keep(3, "raw")
    assert forecast.revise(make_run().freeze_steps[2], source).seconds > 0


def test_a_store_of_another_codec_can_be_planned_from() -> None:
    forecast = make()
    keep = forecast.keep(2, "zstd")
    assert (keep.boundary, keep.codec) == (2, "zstd")
    plan = forecast.revise(make_run().freeze_steps[2], keep)
    assert plan.moves[0].keep.boundary == 3


def test_the_books_add_up() -> None:
    """Two stores, one made of the other: what both saved is what serving spared."""
    forecast = make()
    move = forecast.first.moves[0]
    forecast.settle(0, 0.0, dropped=False)
    first = Filled(0, "stem", move, done(1, 5.0, 4.0), seconds_per_row=4e-3)
    forecast.add(first)
    forecast.settle(1000, 0.5, dropped=False)
    second = Filled(9, "block", move, done(2, 3.0, 2.0), seconds_per_row=2e-3)
    forecast.add(second)
    forecast.settle(4000, 1.1, dropped=True)
    assert first.served == 4000
    assert second.served == 3000
    # 1,000 rows spared 4 ms less 0.5 ms, 3,000 rows 4 + 2 ms less 0.2 ms.
    spared = 1000 * (4e-3 - 0.5e-3) + 3000 * (4e-3 + 2e-3 - 0.2e-3)
    assert first.saving + second.saving == pytest.approx(spared)
    # Dropped: what is served from a later store is not theirs.
    third = Filled(20, "block", move, done(3, 3.0, 2.0), seconds_per_row=1e-3)
    forecast.add(third)
    forecast.settle(5000, 1.2, dropped=True)
    assert (first.served, second.served, third.served) == (4000, 3000, 1000)


def test_it_says_why_nothing_is_kept() -> None:
    assert make(profile=make_profile(problem="disk full")).why_nothing == "disk full"
    assert "--cache-max-gb" in make(1000).why_nothing
    assert "no store would save more time" in make(run=make_run(1)).why_nothing


def test_it_says_what_more_room_would_bring_only_if_it_would() -> None:
    assert make().with_more_room is None
    assert make(6000 * 1e9).with_more_room is None
    roomy = make(1000).with_more_room
    assert roomy is not None
    assert roomy.peak_bytes == pytest.approx(2 * 6000 * 65536, rel=0.01)


@pytest.mark.parametrize(
    ("epochs", "t0", "decoding", "pays"),
    [
        (1, 0.5, False, False),
        (1, 0.5, True, False),
        (2, 0.5, True, True),
        (3, 0.5, False, True),
        (10, 1.0, False, False),
        (10, 1.0, True, True),
    ],
)
def test_short_runs_are_not_even_measured(
    epochs: int, t0: float, decoding: bool, pays: bool
) -> None:
    assert pays_at_best(make_run(epochs, t0), decoding) == pays


def test_what_is_not_measured_would_not_have_paid_for_free() -> None:
    """The shortcut must agree with the planner where everything but serving is free."""
    free = make_profile(write=0.0, store=0.0, read=0.0, verify=0.0)
    for epochs in range(1, 5):
        for t0 in (0.05, 0.2, 0.5, 0.8, 0.95, 1.0):
            for decode in (0.0, 1e-3):
                run = make_run(epochs, t0)
                profile = dataclasses.replace(free, decode=decode)
                plan = make(profile=profile, run=run).first
                kept = any(isinstance(event, Move) for event in plan.events)
                assert not kept or pays_at_best(run, decode > 0)
