"""What a run will take: predicted at its start, corrected by what is observed, and decided by."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from cachefreeze.files import human_bytes
from cachefreeze.outlook import prefix_seconds
from cachefreeze.planner import Keep, Move, Plan, Run, cheapest_plan, eager_plan
from cachefreeze.prefix_cache import Materialization
from cachefreeze.profiler import ON_DISK, Profile, Residence

# Steps that have to be seen before their time is believed.
ENOUGH_STEPS = 5
# An observation counts as no more than this many times the measurement, or its inverse.
MOST_CORRECTION = 5.0


@dataclass
class Filled:
    """A materialisation as it was predicted and as it happened.

    Args:
        step: before which it was made.
        unit: whose output it holds.
        move: what was predicted for it just before.
        done: what it took.
        seconds_per_row: what computing a row of it takes, from the source before it.
        read_seconds: that reading rows from it took.
        served: rows that came from it, or from stores that were made of it.
    """

    step: int
    unit: str
    move: Move
    done: Materialization
    seconds_per_row: float
    read_seconds: float = 0.0
    served: int = 0

    @property
    def saving(self) -> float:
        """Seconds that rows served from it, and from the stores made of it, have spared so far."""
        return self.served * self.seconds_per_row - self.read_seconds

    def as_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "unit": self.unit,
            **dataclasses.asdict(self.done),
            "predicted_seconds": self.move.cost,
            "predicted_saving_seconds": self.move.saving,
            "saving_seconds": self.saving,
        }


class Forecast:
    """Plans a run, and plans the rest of it again as it goes on.

    Args:
        profile: what was measured before the start.
        run: the run.
        splits: rows of each split.
        max_bytes: that stores may take together.
        codec: see `Profile.costs`.
        policy: `planned`, the cheapest plan there is, or `eager`.
        residence: see `Profile.costs`.
        start: the step from which on to plan.
        source: boundary and codec of the store that rows come from at the start, if any.
        found: boundaries of stores that are on disk already.

    Attributes:
        first: the plan made at the start.
        filled: what was materialised.
    """

    def __init__(
        self,
        profile: Profile,
        run: Run,
        splits: Mapping[str, int],
        max_bytes: float,
        *,
        codec: str = "raw",
        policy: str = "planned",
        residence: Residence = ON_DISK,
        start: int = 0,
        source: tuple[int, str] | None = None,
        found: Set[int] = frozenset(),
    ) -> None:
        self.profile = profile
        self.run = run
        self.max_bytes = max_bytes
        self.policy = policy
        self.start = start
        self.residence = residence
        self.costs = profile.costs(splits, codec, residence)
        self._all_keeps = self.costs.keeps
        self._splits = splits
        self.filled: list[Filled] = []
        # Those that the present source of rows was made of, and what had been served by then.
        self._chain: list[Filled] = []
        self._settled = (0, 0.0)
        self.first = self.revise(start, None if source is None else self.keep(*source), found)

    def revise(self, step: int, source: Keep | None, found: Set[int] = frozenset()) -> Plan:
        """The plan for the run from `step` on, by what is known now.

        Args:
            step: the next one to be taken.
            source: what rows come from now, as `keep` gives it; None is the network's input.
            found: boundaries of stores that are on disk already.
        """
        if self.policy == "eager":
            return eager_plan(self.costs, self.run, self.max_bytes, start=step, source=source)
        return cheapest_plan(
            self.costs, self.run, self.max_bytes, start=step, source=source, found=found
        )

    @property
    def why_nothing(self) -> str:
        """Why a plan may keep nothing."""
        if self.profile.problem is not None:
            return self.profile.problem
        sizes = [keep.row_bytes * self.run.rows for keep in self.costs.keeps if keep.boundary]
        if sizes and min(sizes) > self.max_bytes:
            return (
                f"the smallest store would take {human_bytes(min(sizes))} of "
                f"{human_bytes(self.max_bytes)} (--cache-max-gb)"
            )
        return "no store would save more time than filling it takes"

    @property
    def with_more_room(self) -> Plan | None:
        """The plan made at the start, had the cache all the room that it can use; None if that
        would save less than a hundredth of the time."""
        if self.profile.problem is not None or self.policy == "eager":
            return None
        costs = self.profile.costs(self._splits, "raw", self.residence)
        roomy = cheapest_plan(costs, self.run, math.inf, start=self.start)
        better = roomy.seconds < 0.99 * self.first.seconds
        return roomy if better and roomy.peak_bytes > self.max_bytes else None

    def forget(self, keep: Keep) -> None:
        """It could not be had: plan neither it again nor anything that is larger."""
        keeps = tuple(each for each in self.costs.keeps if each.row_bytes < keep.row_bytes)
        self.costs = dataclasses.replace(self.costs, keeps=keeps)

    def keep(self, boundary: int, codec: str) -> Keep:
        """What is known of the costs of keeping a boundary in this way."""
        for keep in self.costs.keeps:
            if (keep.boundary, keep.codec) == (boundary, codec):
                return keep
        # A store of another run may be encoded in a way that this one would not have chosen.
        same = [keep for keep in self._all_keeps if keep.boundary == boundary]
        # Or what is known of it is that it is there: reading it costs nothing, for all we know.
        known = same[0] if same else Keep(boundary, codec, 0.0, 0.0, 0.0, 0.0)
        keep = dataclasses.replace(known, codec=codec, reserve=False)
        self.costs = dataclasses.replace(self.costs, keeps=(*self.costs.keeps, keep))
        return keep

    def step_seconds(self, frontier: int, source: Keep | None) -> float:
        """Predicted seconds of a training step on a whole batch."""
        costs = self.costs
        per_row = prefix_seconds(costs, source, frontier) + sum(costs.train[frontier:])
        return costs.step + min(self.run.batch_size, self.run.train_rows) * per_row

    def observe_steps(self, seconds: Sequence[float], frontier: int, source: Keep | None) -> None:
        """Correct what computing costs by steps that were all taken in the same state."""
        if len(seconds) >= ENOUGH_STEPS:
            ratio = correction(statistics.median(seconds), self.step_seconds(frontier, source))
            # A machine that is slower than it was is so forward and backward.
            self._correct(train=ratio, forward=ratio, inputs=ratio)

    def observe_filling(self, source: Keep | None, keep: Keep, done: Materialization) -> None:
        """Correct what computing forward and writing cost by a materialisation."""
        if done.reused or done.held:
            return
        costs = self.costs
        per_row = prefix_seconds(costs, source, keep.boundary)
        forward = correction(done.compute_seconds, done.rows * per_row)
        write = 1.0
        # What goes to memory first is written in the background: of the disk it tells nothing.
        awaited = keep.write > 0 and (done.lossy or done.tier == "disk")
        if keep.boundary and awaited:  # pixels are too few bytes to tell
            writing = done.rows * (keep.write + keep.load) + costs.store
            write = correction(done.seconds - done.compute_seconds, writing)
        self._correct(forward=forward, write=write)

    def add(self, filled: Filled) -> None:
        """A materialisation that rows come from, from here on."""
        self.filled.append(filled)
        self._chain.append(filled)

    def settle(self, rows_served: int, read_seconds: float, *, dropped: bool) -> None:
        """Before the source changes, and at the end: credit the rows that came from stores.

        Args:
            rows_served, read_seconds: of the whole run so far.
            dropped: rows are computed from the network's input from here on.
        """
        rows, seconds = rows_served - self._settled[0], read_seconds - self._settled[1]
        self._settled = (rows_served, read_seconds)
        if self._chain:
            self._chain[-1].read_seconds += seconds
        for filled in self._chain:
            filled.served += rows
        if dropped:
            self._chain = []

    def observe_reading(self, keep: Keep, seconds_per_byte: float) -> None:
        """Correct what reading costs by what it took.

        Args:
            keep: what was read, as `keep` gives it now: an activation's boundary.
            seconds_per_byte: that training waited for its rows, decoding included.
        """
        if keep.read > 0 and seconds_per_byte > 0:  # a factor of 0 could never be corrected again
            row_bytes = self.profile.boundaries[keep.boundary - 1].row_bytes
            self._correct(read=seconds_per_byte * row_bytes / keep.read)

    def _correct(self, **factors: float) -> None:
        """Multiply costs, those of what was forgotten, too; see `Costs.scaled`."""
        everything = dataclasses.replace(self.costs, keeps=self._all_keeps)
        self._all_keeps = everything.scaled(**factors).keeps
        self.costs = self.costs.scaled(**factors)


def correction(observed: float, predicted: float) -> float:
    """What to multiply a cost with, within bounds: one odd observation must not decide it all."""
    if predicted <= 0 or observed <= 0:
        return 1.0
    return min(max(observed / predicted, 1 / MOST_CORRECTION), MOST_CORRECTION)


def pays_at_best(run: Run, decoding: bool) -> bool:
    """Whether any store could spare more than filling it takes, whatever things cost: a store is
    filled with as many rows as there are, so more than those must be left to serve.

    Args:
        decoding: images are decoded, so that their pixels may be kept from the start.
    """
    first = 0 if decoding else min(run.freeze_steps)
    if first >= run.total_steps:
        return False
    served = [i for i in run.intervals() if i.step >= first]
    rows = sum(i.train_rows + i.validations * run.val_rows for i in served)
    return rows > run.rows
