"""Whatever is planned, planned anew, given up or cut off by a budget: the weights are the same."""

import dataclasses
import json
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cachefreeze import forecast, moments, planning, profiler
from cachefreeze.files import size_of_tree
from cachefreeze.planner import Costs, Drop, Keep, Move, Plan, Run, cheapest_plan
from cachefreeze.prefix_cache import WATCHED_BATCHES
from cachefreeze.rows import Indices
from cachefreeze.stored_rows import StoredRows

from .conftest import Train
from .test_parity import NETWORKS, SCHEDULE, assert_same_run

WRN = (*NETWORKS["wrn"], *SCHEDULE)


def any_plan(seed: int):
    """A planner that decides by dice, and otherwise differently whenever it is asked."""
    dice = random.Random(seed)

    def plan(
        costs: Costs,
        run: Run,
        max_bytes: float,
        *,
        start: int = 0,
        source: Keep | None = None,
        found: object = None,
    ) -> Plan:
        real = cheapest_plan(costs, run, max_bytes, start=start, source=source)
        frontier = sum(step <= start for step in run.freeze_steps)
        events: list[Move | Drop] = []
        held = source
        for _ in range(dice.randint(0, 3)):
            ahead = [
                keep
                for keep in costs.keeps
                if keep.boundary <= frontier and (held is None or keep.boundary > held.boundary)
            ]
            if held is not None and dice.random() < 0.4:
                events.append(Drop(start))
                held = None
            elif ahead:
                held = dice.choice(ahead)
                events.append(Move(start, held, 0.0, 0.0, 0.0))
        return Plan(
            tuple(events), real.seconds, real.freezing_only, real.no_freezing, real.limit, 0.0
        )

    return plan


@pytest.mark.parametrize("arch", ["wrn", "densenet"])
@pytest.mark.parametrize("seed", [1, 6])
def test_the_weights_do_not_depend_on_the_plan(
    train: Train, arch: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*NETWORKS[arch], *SCHEDULE)
    plain = train(*options, "--no-cache")
    monkeypatch.setattr(forecast, "cheapest_plan", any_plan(seed))
    odd = train(*options, "--cache-policy", "planned")
    assert_same_run(odd, plain)
    events = odd.summary["cache"]["boundaries"]
    assert len(events) >= 3
    boundaries = [event["boundary"] for event in events]
    assert boundaries != sorted(set(boundaries)), "it went back at least once"


@pytest.mark.parametrize("arch", ["wrn", "densenet"])
def test_the_weights_do_not_depend_on_the_planner_being_there(train: Train, arch: str) -> None:
    options = (*NETWORKS[arch], *SCHEDULE)
    planned = train(*options, "--cache-policy", "planned")
    assert planned.summary["plan"] is not None
    assert_same_run(planned, train(*options, "--no-cache"))


def test_a_plan_that_changes_is_told_once(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the lines at the start would promise stores that never come."""

    def second_thoughts(
        costs: Costs, run: Run, max_bytes: float, *, start: int, **_: object
    ) -> Plan:
        """Two stores at first, the first of them to the end, and nothing besides."""
        real = cheapest_plan(costs, run, max_bytes, start=start)
        frontier = sum(step <= start for step in run.freeze_steps)
        moves = []
        if frontier == 0:
            keeps = [keep for keep in costs.keeps if keep.boundary in (1, 2)]
            steps = sorted(run.freeze_steps)[:2]
            moves = [Move(s, k, 1.0, 0.0, 1.0) for s, k in zip(steps, keeps, strict=True)]
        elif frontier == 1:
            keep = next(keep for keep in costs.keeps if keep.boundary == 1)
            moves = [Move(start, keep, 1.0, 0.0, 1.0)]
        return dataclasses.replace(real, events=tuple(moves))

    monkeypatch.setattr(forecast, "cheapest_plan", second_thoughts)
    run = train(*WRN, "--cache-policy", "planned")
    assert [each["boundary"] for each in run.summary["cache"]["boundaries"]] == [1]
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.strip().startswith("keeps after")]) == 1
    anew = [line for line in lines if "planned anew" in line]
    assert len(anew) == 1
    assert re.search(r"planned anew: keeps after \w+ \(epoch \d\)$", anew[0])
    written = next(line for line in lines if "activations after" in line and "written" in line)
    assert lines.index(anew[0]) < lines.index(written)


def test_nor_on_measuring_before_the_first_step(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long runs do; short ones measure in their first steps."""
    short = train(*WRN)
    monkeypatch.setattr(profiler, "SHARE", 1.0)
    measured = train(*WRN)
    steps = [run.summary["cache"]["boundaries"][0]["step"] for run in (short, measured)]
    assert steps == [3, 0]
    assert measured.summary["weights_sha256"] == short.summary["weights_sha256"]
    assert_same_run(measured, train(*WRN, "--no-cache"))


@pytest.mark.parametrize("codec", ["lz4", "zstd", "auto"])
def test_compressed_stores_change_no_bit(train: Train, codec: str) -> None:
    packed = train(*WRN, "--cache-codec", codec)
    assert_same_run(packed, train(*WRN, "--no-cache"))
    used = {e["codec"] for e in packed.summary["cache"]["boundaries"] if e["boundary"]}
    assert used == {"raw" if codec == "auto" else codec}
    assert packed.summary["cache"]["rows_served"] > 3 * 150


def test_auto_compresses_where_raw_does_not_fit(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Prices at which every store pays, so that the budget alone decides.
    real = forecast.cheapest_plan

    def at_these_prices(costs: Costs, *args: object, **options: object) -> Plan:
        return real(costs.scaled(write=1e-6, forward=100), *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(forecast, "cheapest_plan", at_these_prices)
    # A row after the stem has 64 kB, 12 MB in all; beside another of that size it does not fit.
    budget = ("--cache-max-gb", 0.0235)
    packed = train(*WRN, "--cache-codec", "auto", "--cache-policy", "planned", *budget)
    codecs = [e["codec"] for e in packed.summary["cache"]["boundaries"] if e["boundary"]]
    assert {"lz4", "zstd"} & set(codecs)
    assert "raw" in codecs
    assert_same_run(packed, train(*WRN, "--no-cache"))


@pytest.mark.parametrize("options", [("--cache-codec", "int8"), ("--cache-dtype", "bf16")])
def test_lossy_stores_say_so_everywhere(
    train: Train, options: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    lossy, plain = train(*WRN, *options), train(*WRN, "--no-cache")
    out = capsys.readouterr().out
    assert "at a loss of precision" in out.splitlines()[4]
    assert "kB, at a loss of precision" in out or "MB, at a loss of precision" in out
    assert "the weights without what the cache rounded" in out
    assert "the same weights" not in out
    events = [e for e in lossy.summary["cache"]["boundaries"] if e["boundary"]]
    assert all(event["lossy"] for event in events)
    assert lossy.summary["weights_sha256"] != plain.summary["weights_sha256"]
    # Until the first store of activations is there, nothing differs; after it, little does.
    assert lossy.metrics[0]["train_loss"] == plain.metrics[0]["train_loss"]
    assert lossy.metrics[-1]["train_loss"] == pytest.approx(
        plain.metrics[-1]["train_loss"], abs=0.1
    )


class SlowDevice:
    """A device that does what it is asked for a thousand seconds after it was asked, and not until
    it has done what was asked before: time goes on for whoever waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = self.waited = 0.0
        self.queue_ends = 0.0
        real = time.perf_counter
        monkeypatch.setattr(time, "perf_counter", lambda: real() + self.ahead)
        for room in (planning, profiler):
            monkeypatch.setattr(room, "Moments", lambda device: self.Moments(self, device))

    class Moments(moments.Moments):
        def __init__(self, slow: "SlowDevice", device: torch.device) -> None:
            super().__init__(device)
            self.slow = slow

        def now(self) -> float:
            self.slow.queue_ends = max(self.slow.queue_ends, super().now()) + 1000
            return self.slow.queue_ends

        def seconds(self, start: float, end: float) -> float:
            left = max(end - super().now(), 0)
            self.slow.ahead += left
            self.slow.waited += left
            return end - start


def test_work_that_a_device_still_had_to_do_is_part_of_the_steps(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowDevice(monkeypatch)
    run = train(*WRN)
    assert len(run.summary["cache"]["boundaries"]) > 2
    # (Measuring waits, too: for normalising, and for its own steps.)
    waited = slow.waited - run.summary["profile_seconds"]
    assert run.summary["train_seconds"] == pytest.approx(waited, abs=999)
    assert run.summary["materialize_seconds"] < 1000
    # Beside its units a step has taken what the device did, and the host asked for in no time.
    profile = json.loads((run.folder / "profile.json").read_text())
    assert profile["step"] >= 1000
    # The plan is not about the three steps that it was made by.
    actual = run.summary["plan"]["actual"]["seconds"]
    assert actual < run.summary["train_seconds"] - 3000


class SlowDisk:
    """Stored rows come a tenth of a second late, from some time on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.left = after
        real = StoredRows.batches

        def slow(rows: StoredRows, order: Sequence[Indices]) -> Iterator[Tensor]:
            for batch in real(rows, order):
                self.left -= 1
                if self.left < 0:
                    time.sleep(0.1)
                yield batch

        monkeypatch.setattr(StoredRows, "batches", slow)


def test_rows_that_come_slower_than_computing_them_are_computed(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # 38 steps an epoch: enough to see it in the middle of one.
    options = (*WRN, "-b", 4, "--epochs", 3)
    plain = train(*options, "--no-cache")
    SlowDisk(monkeypatch, after=WATCHED_BATCHES // 2)
    learnt: list[float] = []
    real = forecast.Forecast.observe_reading

    def watch(self: forecast.Forecast, keep: Keep, seconds_per_byte: float) -> None:
        real(self, keep, seconds_per_byte)
        learnt.append(self.keep(keep.boundary, keep.codec).read)

    monkeypatch.setattr(forecast.Forecast, "observe_reading", watch)
    slow = train(*options)
    assert_same_run(slow, plain)
    out = capsys.readouterr().out
    assert "rows are computed from here on" in out
    assert slow.summary["cache"]["prefix_unit_rows_computed"] > 0
    served = slow.summary["cache"]["rows_served"]
    # Planning hears of it though the store is left: half of its four rows' tenth of a second.
    assert max(learnt) > 0.5 * 0.1 / 4
    assert 4 * WATCHED_BATCHES <= served < plain.summary["cache"]["prefix_unit_rows_computed"]


def test_a_budget_that_runs_out_changes_nothing_but_the_time(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A planner that believes in any budget: the cache itself must keep to the real one.
    real = forecast.eager_plan
    monkeypatch.setattr(
        forecast, "eager_plan", lambda c, r, b, **more: real(c, r, float("inf"), **more)
    )
    limited = train(*WRN, "--cache-max-gb", 0.015)
    assert "(--cache-max-gb)" in capsys.readouterr().out
    assert 0 < len(limited.summary["cache"]["boundaries"]) < 5
    assert_same_run(limited, train(*WRN, "--no-cache"))


class Watcher:
    """Samples the size of a folder while something runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, size_of_tree(self.folder))

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize("policy", ["planned", "eager"])
@pytest.mark.parametrize("megabytes", [0.7, 4, 13, 20, 26])
def test_the_folder_never_holds_more_than_the_budget(
    train: Train, tmp_path: Path, policy: str, megabytes: float
) -> None:
    (tmp_path / "cache").mkdir()
    with Watcher(tmp_path / "cache") as watched:
        train(*WRN, "--cache-policy", policy, "--cache-max-gb", megabytes / 1000)
    assert watched.peak <= megabytes * 1e6
    if policy == "eager":
        assert watched.peak > 0.5e6, "the watcher saw it at work"


def test_the_end_tells_predicted_beside_actual(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(*WRN)
    out = capsys.readouterr().out
    plan = run.summary["plan"]
    assert "predicted at the start" in out
    assert "saving: predicted" in out
    for event in run.summary["cache"]["boundaries"]:
        assert f"step {event['step']}: {event['unit']}" in out
        assert event["predicted_seconds"] > 0
        assert np.isfinite([event["saving_seconds"], event["predicted_saving_seconds"]]).all()
    # The books of the stores add up to those of the run.
    events, cache = run.summary["cache"]["boundaries"], run.summary["cache"]
    filling = sum(event["seconds"] for event in events)
    saving = sum(event["saving_seconds"] for event in events)
    assert saving == pytest.approx(cache["saved_seconds"] + filling, rel=0.01, abs=1e-3)
    assert events[-1]["saving_seconds"] != 0
    # What is compared is what the plan was made for: all but the few steps that were measured.
    parts = ("train_seconds", "validate_seconds", "materialize_seconds")
    whole = sum(run.summary[part] for part in parts)
    assert 0.5 * whole < plan["actual"]["seconds"] < whole
    assert plan["actual"]["limit"] < plan["actual"]["seconds"]
    assert plan["predicted"]["limit"] < plan["predicted"]["freezing_only"]


@pytest.mark.parametrize("t0", [0.1, 0.3, 0.5])
def test_units_that_freeze_in_the_first_steps_are_no_obstacle(train: Train, t0: float) -> None:
    options = ("--dataset", "digits", "--arch", "wrn10_1", "-b", 512, "--epochs", 4, "--t0", t0)
    run = train(*options, "--cache-policy", "planned")
    assert run.summary["plan"] is not None
    assert_same_run(run, train(*options, "--no-cache"))


def test_a_cache_folder_that_vanishes_costs_only_the_cache(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = forecast.Forecast.observe_steps

    def remove_it_first(*args: object) -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(forecast.Forecast, "observe_steps", remove_it_first)
    for policy in ("planned", "eager"):
        assert_same_run(train(*WRN, "--cache-policy", policy), train(*WRN, "--no-cache"))


def test_damaged_pixels_of_an_earlier_run_are_found_out(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*WRN, "--no-freeze", "--cache-policy", "planned")
    first = train(*options)
    (chunk, *_) = (tmp_path / "cache").glob("*/train/c.*")
    content = bytearray(chunk.read_bytes())
    content[1000] ^= 4
    chunk.write_bytes(content)
    capsys.readouterr()
    second = train(*options)
    assert "has a wrong checksum): computed and written once more" in capsys.readouterr().out
    assert_same_run(second, first)
    assert all(event["reused"] for event in second.summary["cache"]["boundaries"])


def test_a_second_run_finds_the_decoded_pixels(train: Train) -> None:
    first = train(*WRN, "--no-freeze", "--cache-policy", "planned")
    second = train(*WRN, "--no-freeze", "--cache-policy", "planned", "-b", 16)
    assert [e["reused"] for e in first.summary["cache"]["boundaries"]] == [False]
    assert [e["reused"] for e in second.summary["cache"]["boundaries"]] == [True]
