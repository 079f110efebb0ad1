"""The time that is left of a run, predicted from its first steps once they have been timed."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from cachefreeze.freezeout import Unit
from cachefreeze.plan.costs import Costs
from cachefreeze.plan.forecast import Run
from cachefreeze.report.summary_text import forecast_line
from cachefreeze.training.device import synchronize
from cachefreeze.training.measuring import TIMED, WARM_UP, forward_seconds
from cachefreeze.training.progress import Eta
from cachefreeze.training.ranks import Ranks
from cachefreeze.training.run_state import RunState
from cachefreeze.training.terminal import say

# Measuring costs about a step: too much for a run of fewer.
LEAST_STEPS = 100


class TimeLeft:
    """Times the first steps of a run, and predicts the time that is left.

    Args:
        run: Sizes of the run.
        state: Progress of the run. It gets the measured costs.
        units: Units of the network.
        ranks: Processes of the run. All of them go by the costs that the first one measures.
        counts: Function that returns the rows that the cache of this process has served and
            computed, as `rows_served` and `rows_computed`.
        cached: Whether the run keeps the outputs of frozen units.
    """

    def __init__(
        self,
        run: Run,
        state: RunState,
        units: Sequence[Unit],
        ranks: Ranks,
        counts: Callable[[], Mapping[str, float]],
        *,
        cached: bool,
    ) -> None:
        self._run, self._state, self._units, self._cached = run, state, units, cached
        self._ranks, self._counts = ranks, counts
        self._noted = 0
        self._mark: dict[str, float] = {}
        self.look_ahead()

    @property
    def costs(self) -> Costs:
        """Measured costs of a batch, or a guess of their proportions before they are measured."""
        return self._state.costs or Costs.unknown(len(self._units))

    def look_ahead(self) -> None:
        """Begins a new prediction at the present step."""
        way = "cached" if self._cached else "freezing_only"
        trust = {} if self._state.costs else {"trust": 0.0}
        spans = self._run.spans(self.costs, way)
        self._eta = Eta(spans, self._state.step, time.perf_counter(), **trust)

    def seconds_left(self) -> float | None:
        """Returns the predicted seconds to the end of the run, or None if nothing is known yet."""
        return self._eta.seconds_left(self._state.step, time.perf_counter())

    def begin_again(self) -> None:
        """Forgets the steps that were timed so far: they are not like those that come."""
        self._noted = 0

    def note_step(
        self, model: nn.Module, x: Tensor, autocast_dtype: torch.dtype | None, frozen: int
    ) -> None:
        """Times a step of training. After the last that is timed, measures the forward pass.

        Args:
            model: Network that trains.
            x: Batch of network input.
            autocast_dtype: Type for autocast, or None.
            frozen: Number of frozen units.
        """
        run = self._run
        if self._state.costs is not None or run.total_steps < LEAST_STEPS:
            return
        if run.freeze_steps[0] >= run.total_steps:
            return
        self._noted += 1
        if self._noted not in (WARM_UP, WARM_UP + TIMED):
            return
        with self._state.timing("train"):
            synchronize(x.device)
        now = {**self._state.seconds, **self._counts()}
        before, self._mark = self._mark, now
        if self._noted > WARM_UP:
            step, load, served, computed = (
                (now[name] - before[name]) / TIMED
                for name in ("train", "load", "rows_served", "rows_computed")
            )
            share = served / max(served + computed, 1.0)
            forward, sizes = forward_seconds(model, self._units, x, autocast_dtype)
            on_gpu = x.device.type == "cuda"
            costs = asdict(Costs.measured(step, load, forward, sizes, frozen, share, on_gpu))
            self._state.costs = Costs.from_json(self._ranks.from_first(costs), len(self._units))
            if self._cached:
                say(forecast_line(run.forecast(self._state.costs)))
            self.look_ahead()
