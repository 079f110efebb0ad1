"""Predictions of the time of a run, with the cache and without, made from its first steps.

A step costs a forward pass through every unit that is not served, and a backward pass, which is
shared among the units that train as the forward pass is.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise

from cachefreeze.plan.costs import LEAST_SHARE, Costs
from cachefreeze.plan.fill import Fill, worth_filling

WAYS = ("without_freezing", "freezing_only", "cached", "limit")
# Batches that are computed once more and compared when a new set of rows has been kept, and forward
# passes that tracing takes.
COMPARED, TRACED = 2, 1.5


@dataclass(frozen=True)
class Span:
    """Steps in a row that cost the same.

    Args:
        steps: Number of steps.
        seconds: Seconds of all these steps, with their share of the validations.
        before: Seconds before the first of these steps, spent on filling the cache.
    """

    steps: int
    seconds: float
    before: float = 0.0


@dataclass(frozen=True)
class Run:
    """Sizes of a run, which a forecast is made from.

    Args:
        freeze_steps: First step at which each unit is frozen; `total_steps` if it never is.
        total_steps: Number of steps of the run.
        steps_per_epoch: Number of steps of an epoch.
        train_rows: Number of training rows.
        val_rows: Number of validation rows.
        batch_size: Number of rows in a batch.
        views: Number of views of each row. Each of them is computed once.
        keeps_pixels: Whether decoded pixels stay in memory.
    """

    freeze_steps: tuple[int, ...]
    total_steps: int
    steps_per_epoch: int
    train_rows: int
    val_rows: int
    batch_size: int
    views: int = 1
    keeps_pixels: bool = False

    @property
    def val_batches(self) -> int:
        """Number of batches of a validation."""
        return -(-self.val_rows // self.batch_size)

    def spans(self, costs: Costs, way: str) -> list[Span]:
        """Predicts the run, as spans of steps that cost the same.

        Args:
            costs: Costs of a batch.
            way: Way to train: one of `WAYS`.
        """
        found, kept = [], 0
        forward = [0.0, *accumulate(costs.forward)]  # through so many units
        freezes = [step for step in self.freeze_steps if step < self.total_steps]
        batches = self.steps_per_epoch + self.val_batches
        for start, stop in pairwise(sorted({0, *freezes, self.total_steps})):
            frozen = bisect_right(self.freeze_steps, start)
            before = 0.0
            if way == "cached" and self.fills_at(start, kept, costs):
                before, kept = self.fill(start, kept, costs).cost, frozen
            reads, skipped = {"cached": (kept, kept), "limit": (0, frozen)}.get(way, (0, 0))
            trained = 0 if way == "without_freezing" else frozen
            load = costs.load
            if self.keeps_pixels and way in ("cached", "limit"):
                before += batches * load if not start else 0.0
                load = 0.0
            validate = load + costs.read[reads] + forward[-1] - forward[skipped]
            step = validate + costs.backward * (forward[-1] - forward[trained]) + costs.other
            share = self.val_batches / self.steps_per_epoch
            steps = stop - start
            found.append(Span(steps, steps * (step + share * validate), before))
        return found

    def passes(self, step: int) -> int:
        """Returns the number of views that are still to be shown from a step on."""
        left = self.total_steps - step + step % self.steps_per_epoch
        return min(self.views, -(-left // self.steps_per_epoch))

    def fill(self, step: int, kept: int, costs: Costs) -> Fill:
        """Predicts a pass over the training set that keeps its rows, once for each view.

        Args:
            step: Number of the step before which the pass is made, from 0. Before step 0 there is
                no pass: rows are kept during the first epoch, which costs the same.
            kept: Number of units whose rows are kept already.
            costs: Costs of a batch.
        """
        frozen = bisect_right(self.freeze_steps, step)
        work = costs.read[kept] + sum(costs.forward[kept:frozen])
        spared = work - costs.read[frozen]
        compared = TRACED * sum(costs.forward) + COMPARED * sum(costs.forward[:frozen])
        batches = self.steps_per_epoch * self.passes(step)
        written = batches * costs.write[frozen]
        computed = batches * work
        read = batches * costs.read[frozen]
        return Fill(
            cost=computed + written + compared,
            again=written + read + compared,
            spared=spared,
            steps_left=self.total_steps - step,
        )

    def fills_at(self, step: int, kept: int, costs: Costs) -> bool:
        """Says whether rows are kept when units have frozen before a step.

        Args:
            step: Number of the step, from 0.
            kept: Number of units whose rows are kept already.
            costs: Costs of a batch.
        """
        frozen = bisect_right(self.freeze_steps, step)
        if frozen <= kept or sum(costs.forward[:frozen]) < LEAST_SHARE * sum(costs.forward):
            return False
        next_step = min(
            (one for one in self.freeze_steps if step < one < self.total_steps), default=None
        )
        later = None if next_step is None else self.fill(next_step, kept, costs)
        return worth_filling(self.fill(step, kept, costs), later)

    def forecast(self, costs: Costs) -> dict[str, float]:
        """Predicts the seconds of the whole run, for each of `WAYS`."""
        spans = {way: self.spans(costs, way) for way in WAYS}
        return {way: sum(one.before + one.seconds for one in spans[way]) for way in WAYS}
