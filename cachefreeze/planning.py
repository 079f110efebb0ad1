"""Runs a training loop's cache by plan: measures, plans, fills, and plans anew at every freeze."""

import platform
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cachefreeze.data import InputRows
from cachefreeze.device import numerics
from cachefreeze.forecast import Filled, Forecast, pays_at_best
from cachefreeze.moments import Moments
from cachefreeze.outlook import Outlook, stretches
from cachefreeze.planner import Keep, Move, Plan, Run, efficiency
from cachefreeze.prefix_cache import PrefixCache
from cachefreeze.profiler import (
    Arithmetic,
    Profile,
    Residence,
    StepClock,
    measure,
    passes_for,
    profile,
    warm_up,
)
from cachefreeze.report import duration, materialize_line, plan_words, revision_words, room_words
from cachefreeze.timing import timed

# Images that are decoded to measure with.
SAMPLE_ROWS = 16
# Steps whose time is remembered: the device keeps an event for the ends of each.
LAST_STEPS = 500
# What a run without a cache spends on planning one.
NO_PLANNING = {"profile": 0.0, "materialize": 0.0}


class Planning:
    """What a training loop tells of its steps, and what that means for its cache.

    Args:
        cache: with a directory; it is filled and left from here.
        optimizer: of the run.
        inputs: the training rows' way from pixels to network input.
        run: when units freeze.
        decode_seconds: of an image; 0 if pixels lie in memory.
        policy, codec: see `Forecast`.
        tell: is given lines for the user.
        record: is given the profile, in plain values.
        checkpoint: called before a store is filled while another is out of use, but named by an
            earlier checkpoint: a new one lets it go (`PrefixCache.release`).

    Attributes:
        forecast: once there is one. A run too short for a store to pay has none.
        outlook: what is left of the run by the present plan, likewise.
        seconds: spent on measuring (`profile`), and on filling stores and planning (`materialize`).

    Example:
        >>> planning.start()  # doctest: +SKIP
        >>> for batch in batches:  # doctest: +SKIP
        ...     planning.before_step()
        ...     step(batch)
        ...     planning.after_step(len(batch))  # until here it is a step's time
        ...     planning.decide()
    """

    def __init__(
        self,
        cache: PrefixCache,
        optimizer: torch.optim.Optimizer,
        inputs: InputRows,
        run: Run,
        *,
        decode_seconds: float,
        policy: str,
        codec: str,
        tell: Callable[[str], None],
        record: Callable[[dict[str, Any]], None],
        checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        self.cache = cache
        self.optimizer = optimizer
        self.inputs = inputs
        self.run = run
        self.decode_seconds = decode_seconds
        self.policy = policy
        self.codec = codec
        self.tell = tell
        self.record = record
        self.checkpoint = checkpoint
        self.forecast: Forecast | None = None
        self.outlook: Outlook | None = None
        self.seconds = dict(NO_PLANNING)
        self.step = 0
        self._clock: StepClock | None = None
        # The one store of a run that has nothing to plan.
        self._found: Filled | None = None
        # Of a checkpoint.
        self._cache_state: dict[str, Any] | None = None
        self._measured_before: Profile | None = None
        self._frontier = cache.units.frontier
        # Of the steps with whole batches since the frontier or the source of rows moved: when the
        # device began and ended with them.
        self._steps: deque[tuple[Any, Any]] = deque(maxlen=LAST_STEPS)
        self._moments = Moments(cache.device)
        # When the step began, for the host and for the device.
        self._began: tuple[float, Any] = (0.0, None)
        self._served_from = cache.store
        # Boundaries that the user was told would be kept.
        self._announced: set[int] = set()
        # Boundary and codec of the last store whose reading the cache has watched.
        self._read: tuple[int, str] | None = None
        # Of the steps before there was a plan.
        self._unplanned = 0.0
        self._computed_before, self._rows_before = 0.0, 0

    @property
    def events(self) -> list[dict[str, Any]]:
        """Every materialisation as predicted and as it happened, in plain values."""
        if self._found is not None:
            self._found.served = self.cache.rows_served
            self._found.read_seconds = self.cache.read_seconds
            return [self._found.as_json()]
        if self.forecast is None:
            return []
        self._settle(self.forecast, dropped=False)
        return [each.as_json() for each in self.forecast.filled]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint is to say of it: what was measured, and where rows come from. A run
        that goes on and is cut off before it has come by them says what the last one did."""
        profile = self._measured_before if self.forecast is None else self.forecast.profile
        return {
            "profile": None if profile is None else profile.as_json(),
            "on": self._measured_on,
            "cache": self._cache_state or self.cache.state_dict(),
        }

    @property
    def _measured_on(self) -> list[str]:
        """What a profile is only good for."""
        here = numerics(self.cache.device)
        return [self.codec, str(self.cache.directory), str(sorted(here.items())), platform.node()]

    def load_state_dict(self, step: int, state: Mapping[str, Any]) -> None:
        """To be called before `start`, where a run goes on after `step` steps: with the weights of
        its checkpoint loaded and their units frozen."""
        self.step, self._frontier = step, self.cache.units.frontier
        if state["profile"] is not None and state["on"] == self._measured_on:
            self._measured_before = Profile.from_json(state["profile"])
        boundary, store = state["cache"]["boundary"], state["cache"]["store"]
        if boundary not in range(self._frontier + 1) or not isinstance(store, str | None):
            raise ValueError("it names no store that it can have had")
        self._cache_state = {"boundary": boundary, "store": store}

    def start(self) -> None:
        """Before the first step: measure and plan; or see to it that the first steps are measured,
        if the run is too short for anything else. Where a run goes on, it goes on with the store
        that its checkpoint names, and by what was measured then.

        Raises:
            Interrupted: see `PrefixCache.materialize`.
        """
        if self.cache.device.type == "cuda":
            with timed(self.seconds, "profile"):
                warm_up(
                    self.cache.units, self._batch(), self.cache.device, self.cache.autocast_dtype
                )
        if self._cache_state is not None:
            self._take_up(self._cache_state)
        if self._nothing_to_plan():
            return
        if self._measured_before is not None:
            self._plan(self._measured_before, "before it was interrupted")
            return
        decoding = self.decode_seconds > 0
        if self.policy == "planned" and not (
            pays_at_best(self.run, decoding) or (decoding and self.cache.has(0))
        ):
            never = min(self.run.freeze_steps) >= self.run.total_steps
            why = "nothing freezes" if never else "units freeze too late in the run to pay"
            self.tell(f"plan      nothing is kept: {why}")
            return
        passes = passes_for(self.run.row_passes, self.run.batch_size)
        # (Hooks in what is compiled would be compiled, too.)
        unseen = not self.cache.units.compiled
        if passes < 2 and unseen and min(self.run.freeze_steps) > self.step + StepClock.STEPS:
            self._clock = StepClock(self.cache.units, self.optimizer, self.cache.device)
            return
        with timed(self.seconds, "profile"):
            measured = measure(
                self.cache.units,
                self._batch(),
                passes=max(passes, 2),
                device=self.cache.device,
                autocast_dtype=self.cache.autocast_dtype,
            )
        self._measure_the_rest(measured)

    def before_step(self) -> None:
        """Before every step, and before its rows are asked for."""
        watched = self._moments.free or self._clock is not None
        self._began = time.perf_counter(), self._moments.now() if watched else None

    def after_step(self, rows: int) -> None:
        """After every step, with a batch of so many rows, and what the schedule froze then. It is
        part of the step: where there is something to `decide`, it waits for the device, whose work
        would be taken for the time that deciding takes."""
        self.step += 1
        wall, began = self._began
        ended = None if began is None else self._moments.now()
        if self.cache.store is not self._served_from:  # it was given up in the middle
            self._served_from = self.cache.store
            self._steps.clear()
        elif rows == self.run.batch_size and began is not None:
            self._steps.append((began, ended))
        if self._clock is not None:
            self._clock.step_taken(began, ended)
        if self._due:
            self._moments.wait()
        if self.forecast is None:
            self._unplanned += time.perf_counter() - wall

    def decide(self) -> None:
        """After `after_step`, and not part of the step: plan, and fill a store, if it is time."""
        if self._due and self._clock is not None:
            measured = self._clock.result()
            self.stop()
            self._measure_the_rest(measured)
        elif self._due and self.forecast is not None:
            with timed(self.seconds, "materialize"):
                plan = self._plan_again(self.forecast)
            self._carry_out(self.forecast, plan)
        frontier = self.cache.units.frontier
        if frontier > self._frontier:
            self._frontier = frontier
            self._steps.clear()

    @property
    def _due(self) -> bool:
        """Whether there is something to decide."""
        if self._clock is not None:
            return self._clock.done
        return self.forecast is not None and self.cache.units.frontier > self._frontier

    def stop(self) -> None:
        """Measure no more: the run is over, or was given up."""
        if self._clock is not None:
            self._clock.stop()
            self._clock = None

    def comparison(self, seconds: float) -> dict[str, Any] | None:
        """The plan made at the start beside what happened, at the end; None if there was none.

        Args:
            seconds: of all training and validation.
        """
        forecast = self.forecast
        if forecast is None:
            return None
        self._settle(forecast, dropped=True)
        cache, plan = self.cache, forecast.first
        seconds = seconds - self._unplanned + self.seconds["materialize"]
        measured = seconds + self.seconds["profile"]
        freezing_only = limit = reached = None
        if self._moments.free:  # elsewhere the parts of a step are not timed
            freezing_only = seconds + cache.saved_seconds
            # What a free cache would spare too. Normalising what nothing is frozen before stays.
            wasted = self.seconds["materialize"] + cache.read_seconds + cache.compute_seconds
            wasted -= self._computed_before
            unfrozen = cache.unfrozen_rows - self._rows_before
            limit = seconds - wasted + unfrozen * forecast.profile.normalize
            reached = efficiency(freezing_only, measured, limit)
        return {
            "from_step": forecast.start,
            "profile_seconds": self.seconds["profile"],
            "predicted": {
                "seconds": plan.seconds,
                "freezing_only": plan.freezing_only,
                "no_freezing": plan.no_freezing,
                "limit": plan.limit,
                "efficiency": plan.efficiency,
                "materializations": len(plan.moves),
            },
            "actual": {
                "seconds": seconds,
                "freezing_only": freezing_only,
                "limit": limit,
                "efficiency": reached,
                "materializations": len(forecast.filled),
            },
        }

    def _take_up(self, state: Mapping[str, Any]) -> None:
        with timed(self.seconds, "materialize"):
            found = self.cache.load_state_dict(state)
            self._cache_state = None
        if found is not None:
            self._served_from = self.cache.store
            what = "pixels" if found.boundary == 0 else f"activations after {self.cache.unit}"
            self.tell(f"  step {self.step}: {what} are still in the cache: {found.rows:,} rows")

    def _nothing_to_plan(self) -> bool:
        """Whether all that freezes in this run is frozen, and a store holds what it gives: one of
        an earlier run, say. No frozen unit need run then, not even to be measured."""
        frontier = self.cache.units.frontier
        if not frontier or any(
            self.step < step < self.run.total_steps for step in self.run.freeze_steps
        ):
            return False
        if self.cache.store is None and self.cache.has(frontier):
            with timed(self.seconds, "materialize"):
                done = self.cache.materialize(fill=False)
            if done is not None:
                codec, size = done.codec, float(done.bytes)
                move = Move(self.step, Keep(frontier, codec, 0.0, 0.0, 0.0), size, 0.0, 0.0, True)
                spared = self.cache.prefix_seconds_per_row
                self._found = Filled(self.step, self.cache.unit, move, done, spared)
                self.tell(materialize_line(self._found.as_json()))
        self._served_from = self.cache.store
        return self.cache.boundary == frontier

    def _batch(self) -> torch.Tensor:
        """A batch of network input, of a few images again and again."""
        pixels = self._pixels()
        rows = torch.arange(self.run.batch_size) % len(pixels)
        return self.inputs.from_pixels(pixels[rows])

    def _pixels(self) -> torch.Tensor:
        """A few real images, decoded: arithmetic takes as long whatever it is done on, but how
        small a codec makes its results depends on them."""
        rows = SAMPLE_ROWS if self.codec == "raw" else self.run.batch_size
        return self.inputs.images.sample(min(rows, self.run.batch_size)).permute(0, 3, 1, 2)

    def _measure_the_rest(self, measured: Arithmetic) -> None:
        """Arithmetic is measured; measure the disk, and plan."""
        assert self.cache.directory is not None
        with timed(self.seconds, "profile"):
            profiled = profile(
                measured,
                self.inputs,
                self._pixels(),
                row_passes=self.run.row_passes,
                device=self.cache.device,
                decode_seconds=self.decode_seconds,
                directory=self.cache.directory,
                max_bytes=self.cache.max_bytes,
                stored=self.cache.stored,
                codec=self.codec,
            )
        self.record(profiled.as_json())
        how = f"in {duration(self.seconds['profile'])}"
        if measured.seconds == 0:
            how = f"in {measured.passes} steps of the run, and the disk {how}"
        self._plan(profiled, how)

    def _plan(self, profiled: Profile, how: str) -> None:
        """Plan from here on, tell, and begin with it; `how` it was measured."""
        self._computed_before = self.cache.compute_seconds
        self._rows_before = self.cache.unfrozen_rows
        frontier = self.cache.units.frontier
        kept = {0, frontier} if self.decode_seconds > 0 else {frontier} - {0}
        store = self.cache.store
        with timed(self.seconds, "profile"):
            forecast = self.forecast = Forecast(
                profiled,
                self.run,
                self.cache.rows,
                self.cache.max_bytes,
                codec=self.codec,
                policy=self.policy,
                residence=Residence(self.cache.tiers.first_with_room, self.cache.threads),
                start=self.step,
                source=None if store is None else (self.cache.boundary, store.description.codec),
                found={boundary for boundary in kept if self.cache.has(boundary)},
            )
        names = self.cache.units.names
        self._announced = {move.keep.boundary for move in forecast.first.moves}
        for line in plan_words(forecast.first, self.run, names, how, forecast.why_nothing):
            self.tell(line)
        if (roomy := forecast.with_more_room) is not None:
            self.tell(room_words(roomy, self.cache.max_bytes))
        self._carry_out(forecast, forecast.first)

    def _plan_again(self, forecast: Forecast) -> Plan:
        """After a freeze: with all that has been seen since the last."""
        source = self._source(forecast)
        steps = [self._moments.seconds(*step) for step in self._steps]
        forecast.observe_steps(steps, self._frontier, source)
        reading = self.cache.seconds_per_byte_read
        if reading is not None and self._read is not None:
            forecast.observe_reading(forecast.keep(*self._read), reading)
        now = self.cache.units.frontier
        found = {now} if self.cache.has(now) else frozenset()
        return forecast.revise(self.step, source, found)

    def _source(self, forecast: Forecast) -> Keep | None:
        """Where rows come from now, as the planner names it; None is the network's input."""
        if self.cache.store is None:
            return None
        return forecast.keep(self.cache.boundary, self.cache.store.description.codec)

    def _carry_out(self, forecast: Forecast, plan: Plan) -> None:
        """What the plan asks for at this step."""
        self._tell_if_other(forecast, plan)
        for event in plan.events:
            if event.step > self.step:
                break
            self._settle(forecast, dropped=not isinstance(event, Move))
            if not isinstance(event, Move):
                self.cache.leave()
            elif not self._materialize(forecast, event):
                # What was found is not what it seemed to be, or what was to be made cannot be: the
                # next best, which has it no more.
                again = forecast.revise(self.step, self._source(forecast))
                self._carry_out(forecast, again)
                return
        self._served_from = self.cache.store
        if self.cache.store is not None and self.cache.boundary and self.cache.tier == "disk":
            self._read = self.cache.boundary, self.cache.store.description.codec
        self._steps.clear()
        coming = [event for event in plan.events if event.step > self.step]
        left = stretches(forecast.costs, self.run, self.step, self._source(forecast), coming)
        self.outlook = Outlook(self.step, time.perf_counter(), left)

    def _tell_if_other(self, forecast: Forecast, plan: Plan) -> None:
        """If this is not what the user was told last."""
        kept = {each.done.boundary for each in forecast.filled}
        kept |= {move.keep.boundary for move in plan.moves}
        if kept != self._announced:
            self._announced = kept
            names = self.cache.units.names
            self.tell(revision_words(self.step, plan.moves, self.run, names))

    def _materialize(self, forecast: Forecast, move: Move) -> bool:
        source, before = self._source(forecast), self.cache.prefix_seconds_per_row
        keep = move.keep
        needed = 0.0 if move.found else move.bytes
        with timed(self.seconds, "materialize"):
            if self.cache.holds_retired and self.cache.bytes_in_use + needed > self.cache.max_bytes:
                # The plan counts on its room. (Where that is not short, it waits for the epoch's
                # end, which brings a checkpoint anyway.)
                self.checkpoint()
            done = self.cache.materialize(keep.boundary, keep.codec, fill=not move.found)
        if done is None:
            if not move.found:
                forecast.forget(keep)
            return False
        forecast.observe_filling(source, move.keep, done)
        spared = self.cache.prefix_seconds_per_row - before
        filled = Filled(self.step, self.cache.unit, move, done, spared)
        forecast.add(filled)
        self.tell(materialize_line(filled.as_json()))
        return True

    def _settle(self, forecast: Forecast, *, dropped: bool) -> None:
        gone = dropped or self.cache.store is None
        forecast.settle(self.cache.rows_served, self.cache.read_seconds, dropped=gone)
