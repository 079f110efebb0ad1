"""What to keep, and when: the cheapest sequence of materialisations, from measured costs.

A run is a row of intervals between freezes. During each, rows come from one source: the network's
input, or one kept boundary. At the start of each, the source may change: a materialisation reads
all rows once, runs the units between, and writes. So a plan is a path through (interval, source),
and the best plan is a shortest path, found exactly. Pure arithmetic: no torch, no disk, no clock.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

# Less than this is rounding, not an improvement: seconds of a sum that may be days.
NOTHING = 1e-9


@dataclass(frozen=True)
class Keep:
    """One way to keep one boundary's rows: what a row of it costs.

    Args:
        boundary: 0 keeps decoded pixels.
        codec: how they are stored.
        row_bytes: on disk.
        write: seconds a row, once.
        read: seconds a row, whenever it is served.
        load: seconds a row, once, before any can be served (decoding into memory).
        verify: seconds a row, once, to check a store that is on disk already.
        reserve: to be used only where the raw store of its boundary does not fit.
    """

    boundary: int
    codec: str
    row_bytes: float
    write: float
    read: float
    load: float = 0.0
    verify: float = 0.0
    reserve: bool = False


@dataclass(frozen=True)
class Costs:
    """What was measured, in seconds a row where it does not say otherwise.

    Args:
        train: of each unit, forward and backward.
        forward: of each unit in eval mode, frozen or validating.
        inputs: of a row of network input: decoding and normalising.
        normalize: the part of `inputs` that is left when decoded pixels are at hand.
        step: seconds an optimiser step takes beside the units.
        store: seconds any store takes beside its rows: hashing, files, syncing.
        keeps: what could be kept.
    """

    train: tuple[float, ...]
    forward: tuple[float, ...]
    inputs: float
    normalize: float
    step: float
    store: float
    keeps: tuple[Keep, ...]

    def scaled(
        self,
        *,
        train: float = 1,
        forward: float = 1,
        inputs: float = 1,
        write: float = 1,
        read: float = 1,
    ) -> "Costs":
        """The same with its parts multiplied: what was observed, over what was measured."""
        return replace(
            self,
            train=tuple(seconds * train for seconds in self.train),
            forward=tuple(seconds * forward for seconds in self.forward),
            inputs=self.inputs * inputs,
            normalize=self.normalize * inputs,
            step=self.step * train,
            store=self.store * write,
            keeps=tuple(
                replace(
                    keep,
                    write=keep.write * write,
                    load=keep.load * write,
                    read=keep.read * read,
                    verify=keep.verify * read,
                )
                for keep in self.keeps
            ),
        )


@dataclass(frozen=True)
class Interval:
    """A stretch of the run in which `frontier` units are frozen, from `step` on."""

    step: int
    steps: int
    frontier: int
    train_rows: int
    validations: int


@dataclass(frozen=True)
class Move:
    """One materialisation: at `step` (before it is taken), `keep` is filled and served from.

    `cost`: predicted seconds to fill it. `saving`: predicted seconds that it spares from there to
    the end of the run, or until it is dropped, against the source before it. `found`: on disk
    already, and only to be verified.
    """

    step: int
    keep: Keep
    bytes: float
    cost: float
    saving: float
    found: bool = False


@dataclass(frozen=True)
class Drop:
    """At `step` the rows go back to being computed from the network's input: that is cheaper, or
    makes room."""

    step: int


@dataclass(frozen=True)
class Plan:
    """The cheapest plan, and predicted seconds of the intervals it covers.

    Attributes:
        events: in order; several may be at one step.
        seconds: of this plan.
        freezing_only: without a cache.
        no_freezing: with all units trained to the end.
        limit: with the frozen prefix's rows for nothing.
        peak_bytes: most that its stores take together at any moment.
    """

    events: tuple[Move | Drop, ...]
    seconds: float
    freezing_only: float
    no_freezing: float
    limit: float
    peak_bytes: float

    @property
    def moves(self) -> tuple[Move, ...]:
        return tuple(event for event in self.events if isinstance(event, Move))

    @property
    def efficiency(self) -> float | None:
        """Predicted share of what a free cache would save; None if that is nothing."""
        return efficiency(self.freezing_only, self.seconds, self.limit)


def efficiency(freezing_only: float, cached: float, limit: float) -> float | None:
    """(T_freezing_only - T_cached) / (T_freezing_only - T_limit); None if a free cache would save
    less than a thousandth, and the share of nothing means nothing."""
    possible = freezing_only - limit
    return (freezing_only - cached) / possible if possible > freezing_only / 1000 else None


@dataclass(frozen=True)
class Run:
    """What is known of a run beforehand.

    Args:
        freeze_steps: the first step at which each unit is frozen, ascending; units that train to
            the end have `total_steps` or more.
        total_steps: optimiser steps of the run.
        train_rows, val_rows: of the splits.
        batch_size: rows a step; the last step of an epoch may have fewer. Every epoch ends with a
            pass over the validation rows.
    """

    freeze_steps: tuple[int, ...]
    total_steps: int
    train_rows: int
    val_rows: int
    batch_size: int

    @property
    def rows(self) -> int:
        """What a materialisation goes through."""
        return self.train_rows + self.val_rows

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.train_rows // self.batch_size)

    @property
    def row_passes(self) -> float:
        """Training rows of the whole run, each counted by the share of the units that it trains:
        about what the run takes, in training passes of a row through the whole network."""
        units = len(self.freeze_steps)
        return sum(i.train_rows * (units - i.frontier) / units for i in self.intervals())

    def train_rows_before(self, step: int) -> int:
        """Training rows gone through when `step` is about to be taken."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * self.train_rows + rest * self.batch_size

    def intervals(self, start: int = 0) -> list[Interval]:
        """The run from step `start` on, cut at every freeze."""
        stop = self.total_steps
        cuts = {step for step in self.freeze_steps if start < step < stop}
        # An epoch's validation comes after its last step, and after whatever froze then.
        marks = [start, *sorted(cuts), stop]
        return [
            Interval(
                step=begin,
                steps=end - begin,
                frontier=sum(step <= begin for step in self.freeze_steps),
                train_rows=self.train_rows_before(end) - self.train_rows_before(begin),
                validations=self._validations(begin, end),
            )
            for begin, end in pairwise(marks)
        ]

    def _validations(self, begin: int, end: int) -> int:
        """Epochs that end at a step in begin .. end-1, or with the run."""
        last = end if end == self.total_steps else end - 1
        return last // self.steps_per_epoch - max(begin - 1, 0) // self.steps_per_epoch


def cheapest_plan(
    costs: Costs,
    run: Run,
    max_bytes: float,
    *,
    start: int = 0,
    source: Keep | None = None,
    found: Set[int] = frozenset(),
) -> Plan:
    """The plan of least predicted time for the rest of a run.

    Args:
        costs: measured.
        run: the run.
        max_bytes: that the old and the new store may take together, at any moment.
        start: the step from which on to plan.
        source: what rows come from now; None is the network's input.
        found: boundaries of stores that are on disk already, and would only be verified.
    """
    return _Search(costs, run, max_bytes, found).solve(run.intervals(start), source)


def eager_plan(
    costs: Costs, run: Run, max_bytes: float, *, start: int = 0, source: Keep | None = None
) -> Plan:
    """Every boundary is kept as soon as it is frozen, whatever that costs, if it fits.

    For comparison, and for whoever wants it so. The arguments are those of `cheapest_plan`.
    """
    search = _Search(costs, run, max_bytes, frozenset())
    intervals = run.intervals(start)
    held = search.number_of(source)
    changes = []
    for index, interval in enumerate(intervals):
        for number, keep in enumerate(search.keeps, 1):
            wanted = keep.boundary == interval.frontier and not keep.reserve
            if wanted and search.fits[number, held]:
                changes.append((index, held, number))
                held = number
    return search.plan(intervals, search.number_of(source), changes)


class _Search:
    """Sources are numbered: 0 is the network's input, 1 .. n are `keeps` by ascending boundary."""

    def __init__(self, costs: Costs, run: Run, max_bytes: float, found: Set[int]) -> None:
        self.costs = costs
        self.run = run
        self.keeps = sorted(costs.keeps, key=lambda keep: (keep.boundary, keep.reserve))
        self.found = found
        # Running sums: seconds of units 0 .. b-1.
        self.forward = np.concatenate([[0.0], np.cumsum(costs.forward)])
        self.train = np.concatenate([[0.0], np.cumsum(costs.train)])
        keeps = self.keeps
        self.start_unit = np.array([0, *(keep.boundary for keep in keeps)])
        self.read = np.array([costs.inputs, *(keep.read for keep in keeps)])
        self.bytes = np.array([0.0, *(keep.row_bytes * run.rows for keep in keeps)])
        self.fits = self._fits(max_bytes)
        # Where there is room for any two stores, filling one on the way to another only adds to the
        # cost: one change at a moment is enough.
        self.tight = bool((self.bytes[:, None] + self.bytes > max_bytes).any())
        # The cost of a change is a sum: one part depends on the old source, one on the new.
        once = np.array([np.inf, *(keep.write + keep.load for keep in keeps)])
        self.leave = run.rows * (self.read - self.forward[self.start_unit])
        self.arrive = run.rows * (self.forward[self.start_unit] + once) + costs.store

    def _fits(self, max_bytes: float) -> NDArray[np.bool_]:
        """[target, origin]: whether target may be filled from origin."""
        together = self.bytes[:, None] + self.bytes[None, :] <= max_bytes
        # From earlier boundaries only; pixels are kept on the way from the input.
        ahead = self.start_unit[:, None] > self.start_unit[None, :]
        ahead[:, 0] = True
        fits = together & ahead
        fits[0] = False
        raw = {keep.boundary: n for n, keep in enumerate(self.keeps, 1) if not keep.reserve}
        for number, keep in enumerate(self.keeps, 1):
            if keep.reserve and keep.boundary in raw:
                fits[number] &= ~together[raw[keep.boundary]]
        return fits

    def spent(self, interval: Interval) -> NDArray[np.float64]:
        """Seconds of an interval by source; meaningless for boundaries beyond its frontier."""
        frontier = interval.frontier
        prefix = self.read + self.forward[frontier] - self.forward[self.start_unit]
        return self._served(interval) * prefix + self._suffix(interval, frontier)

    def _served(self, interval: Interval) -> int:
        """Rows that an interval asks its source for."""
        return interval.train_rows + interval.validations * self.run.val_rows

    def _suffix(self, interval: Interval, frontier: int) -> float:
        validated = interval.validations * self.run.val_rows
        return float(
            interval.train_rows * (self.train[-1] - self.train[frontier])
            + validated * (self.forward[-1] - self.forward[frontier])
            + interval.steps * self.costs.step
        )

    def number_of(self, source: Keep | None) -> int:
        if source is None:
            return 0
        wanted = (source.boundary, source.codec)
        return 1 + [(keep.boundary, keep.codec) for keep in self.keeps].index(wanted)

    def solve(self, intervals: Sequence[Interval], source: Keep | None) -> Plan:
        now = self.number_of(source)
        best = np.full(len(self.start_unit), np.inf)
        best[now] = 0.0
        parents = []
        for interval in intervals:
            parents.append(self._relax(best, interval, first=interval is intervals[0]))
            best += self.spent(interval)
        number = int(np.argmin(best))
        events = list(self._walk_back(intervals, parents, number))[::-1]
        return self.plan(intervals, now, events)

    def _relax(
        self, best: NDArray[np.float64], interval: Interval, *, first: bool
    ) -> NDArray[np.int64]:
        """Change sources at the start of an interval wherever that is cheaper.

        Returns for each source the one it was filled from, or itself.
        """
        parents = np.arange(len(best))
        # What is found costs no more than its verification, so another may be filled from there.
        several = self.tight or (first and bool(self.found))
        reach = int(np.searchsorted(self.start_unit, interval.frontier, side="right"))
        for _ in range(len(best)):
            lowest = int(np.argmin(best))
            changed = best[lowest] < best[0] - NOTHING
            if changed:
                best[0], parents[0] = best[lowest], lowest
            leaving = best[:reach] + self.leave[:reach]
            allowed = np.where(self.fits[:reach, :reach], leaving, np.inf)
            origin = np.argmin(allowed, axis=1)
            total = allowed[np.arange(reach), origin] + self.arrive[:reach]
            if first:
                for number in range(1, reach):
                    if self.keeps[number - 1].boundary in self.found:
                        self._offer_found(best, number, origin, total)
            better = total < best[:reach] - NOTHING
            best[:reach][better] = total[better]
            parents[:reach][better] = origin[better]
            if not several or not (changed or better.any()):
                break
        return parents

    def _offer_found(
        self,
        best: NDArray[np.float64],
        number: int,
        origin: NDArray[np.int64],
        total: NDArray[np.float64],
    ) -> None:
        """A store that is there is only verified, whatever rows come from now."""
        reachable = np.where(self.fits[number, : len(total)], best[: len(total)], np.inf)
        cheapest = int(np.argmin(reachable))
        seconds = reachable[cheapest] + self._verification(number)
        if seconds < total[number]:
            total[number], origin[number] = seconds, cheapest

    def _verification(self, number: int) -> float:
        keep = self.keeps[number - 1]
        return self.run.rows * (keep.verify + keep.load) + self.costs.store

    def _walk_back(
        self, intervals: Sequence[Interval], parents: Sequence[NDArray[np.int64]], number: int
    ) -> Iterator[tuple[int, int, int]]:
        """(index of the interval, from, to), last change first."""
        for index in range(len(intervals) - 1, -1, -1):
            while parents[index][number] != number:
                origin = int(parents[index][number])
                yield index, origin, number
                number = origin

    def plan(
        self, intervals: Sequence[Interval], now: int, changes: Sequence[tuple[int, int, int]]
    ) -> Plan:
        spent = [self.spent(interval) for interval in intervals]
        events: list[Move | Drop] = []
        seconds = 0.0
        held, next_change = now, 0
        peak = float(self.bytes[now])
        # Of the moves whose stores the present source goes back to: event, origin and target.
        chain: list[tuple[int, int, int]] = []
        savings: defaultdict[int, float] = defaultdict(float)
        for index, interval in enumerate(intervals):
            while next_change < len(changes) and changes[next_change][0] == index:
                _, origin, target = changes[next_change]
                next_change += 1
                peak = max(peak, float(self.bytes[origin] + self.bytes[target]))
                held = target
                if target == 0:
                    chain = []
                    events.append(Drop(interval.step))
                    continue
                keep = self.keeps[target - 1]
                cost = float(self.leave[origin] + self.arrive[target])
                found = index == 0 and keep.boundary in self.found
                if found and self._verification(target) < cost:
                    cost = self._verification(target)
                else:
                    found = False
                seconds += cost
                chain.append((len(events), origin, target))
                size = float(self.bytes[target])
                events.append(Move(interval.step, keep, size, cost, 0.0, found))
            seconds += float(spent[index][held])
            for number, origin, target in chain:
                savings[number] += float(spent[index][origin] - spent[index][target])
        return Plan(
            events=tuple(
                replace(event, saving=savings[number]) if isinstance(event, Move) else event
                for number, event in enumerate(events)
            ),
            seconds=seconds,
            freezing_only=sum(float(each[0]) for each in spent),
            no_freezing=sum(
                self._suffix(interval, 0) + self._served(interval) * self.costs.inputs
                for interval in intervals
            ),
            limit=sum(
                self._suffix(interval, interval.frontier)
                # Where nothing is frozen, normalising pixels is left to do.
                + (interval.frontier == 0) * self._served(interval) * self.costs.normalize
                for interval in intervals
            ),
            peak_bytes=peak,
        )
