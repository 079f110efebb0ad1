"""How long a run will still take: what is left by its plan, at the speed that was seen so far.

Epochs get shorter as units freeze, and longer where a store is filled. So the steps that are left
tell little of the time that is left: what they are predicted to cost does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cachefreeze.planner import Costs, Drop, Interval, Keep, Move, Run

# A prediction in seconds is held to have come true for this share of it before anything was seen:
# a first slow step must not turn minutes into hours.
TRUST = 0.05
# Where nothing was measured: of a unit's forward pass, and of forward and backward together.
FORWARD, TRAIN = 1.0, 3.0


@dataclass(frozen=True)
class Stretch:
    """Some steps in a row, one as costly as the other.

    Args:
        steps: how many.
        cost: of all of them, with the validation that falls among them.
        before: what is spent before the first: filling a store.
    """

    steps: int
    cost: float
    before: float = 0.0


class Outlook:
    """What is left of a run.

    Args:
        step: how many steps were taken when this was made.
        now: what the clock said then, in seconds.
        stretches: all that was left then, in order.
        trust: 0 if costs are not in seconds: their proportions alone count then.
    """

    def __init__(
        self, step: int, now: float, stretches: Sequence[Stretch], trust: float = TRUST
    ) -> None:
        self.now = now
        self.stretches = tuple(stretches)
        self._end = step + sum(stretch.steps for stretch in stretches)
        self._all = self.cost_after(step)
        self._believed = trust * self._all

    def cost_after(self, step: int) -> float:
        """Of what is left after so many steps of the run, as it was predicted."""
        cost, stop = 0.0, self._end
        for stretch in reversed(self.stretches):
            start = stop - stretch.steps
            if step > start:
                return cost + stretch.cost * max(stop - step, 0) / stretch.steps
            cost += stretch.before + stretch.cost
            stop = start
        return cost if step < self._end else 0.0

    def seconds_left(self, step: int, now: float) -> float | None:
        """Of the run, after so many steps of it, when the clock says `now`; None if nothing was
        seen yet that could tell."""
        ahead = self.cost_after(step)
        behind = self._all - ahead + self._believed
        if ahead == 0 or behind == 0:
            return 0.0 if ahead == 0 else None
        return ahead * (now - self.now + self._believed) / behind


def stretches(
    costs: Costs, run: Run, step: int, source: Keep | None, events: Sequence[Move | Drop]
) -> list[Stretch]:
    """The rest of a run as it is planned.

    Args:
        costs: measured.
        run: the run.
        step: so many steps were taken.
        source: what rows come from now; None is the network's input.
        events: of the plan, those that have still to come.
    """
    result, coming = [], list(events)
    for interval in run.intervals(step):
        before = 0.0
        while coming and coming[0].step <= interval.step:
            event = coming.pop(0)
            source = event.keep if isinstance(event, Move) else None
            before += event.cost if isinstance(event, Move) else 0.0
        cost = interval_seconds(costs, run, interval, source)
        result.append(Stretch(interval.steps, cost, before))
    return result


def stretches_by_units(run: Run, units: int, step: int, boundary: int) -> list[Stretch]:
    """The rest of a run of which nothing was measured, in forward passes of a row through a unit:
    one unit counts as much as another. Rows come from `boundary` to the end, for nothing."""
    costs = Costs((TRAIN,) * units, (FORWARD,) * units, 0.0, 0.0, 0.0, 0.0, ())
    source = Keep(boundary, "raw", 0.0, 0.0, 0.0) if boundary else None
    return stretches(costs, run, step, source, ())


def interval_seconds(costs: Costs, run: Run, interval: Interval, source: Keep | None) -> float:
    """Predicted, of the steps of an interval and the validation that falls into it."""
    prefix = prefix_seconds(costs, source, interval.frontier)
    trained = prefix + sum(costs.train[interval.frontier :])
    validated = prefix + sum(costs.forward[interval.frontier :])
    return (
        interval.train_rows * trained
        + interval.validations * run.val_rows * validated
        + interval.steps * costs.step
    )


def prefix_seconds(costs: Costs, source: Keep | None, stop: int) -> float:
    """Predicted, of a row from its source, through the units, to boundary `stop`."""
    if source is None:
        return costs.inputs + sum(costs.forward[:stop])
    return source.read + sum(costs.forward[source.boundary : stop])
