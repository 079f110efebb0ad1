"""Predictions of the time of a run, with the cache and without, made from its first steps.

A step costs a forward pass through every unit that is not served, and a backward pass, which is
shared among the units that train as the forward pass is. The arithmetic is pure; `forward_seconds`
measures.
"""

import copy
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cachefreeze.cache.selection import LEAST_SHARE
from cachefreeze.device import autocast, synchronize
from cachefreeze.freezeout import Unit
from cachefreeze.training.fill import Fill, worth_filling

WAYS = ("without_freezing", "freezing_only", "cached", "limit")
# Bytes of kept rows that are read in a second (found, copied, and their input hashed), and that are
# written, to memory and to the directory.
READ_RATE, WRITE_RATE = 1.5e9, 0.75e9
# Batches that are computed once more and compared when a new set of rows has been kept, and forward
# passes that tracing takes.
COMPARED, TRACED = 2, 1.5
# Steps that are timed, after some that are not like the others, and forward passes.
WARM_UP, TIMED, PASSES = 2, 5, 2


@dataclass(frozen=True)
class Costs:
    """Costs of a batch, in seconds.

    Args:
        forward: Seconds of the forward pass through each unit.
        backward: Seconds of the backward pass and the update, for each second of the forward pass
            through the units that train.
        read: Seconds of reading the batch's kept rows, for each number of frozen units.
        load: Seconds of waiting for the batch's pixels.
        write: Seconds of writing the batch's rows, for each number of frozen units.
    """

    forward: tuple[float, ...]
    backward: float
    read: tuple[float, ...]
    load: float
    write: tuple[float, ...]

    @classmethod
    def measured(
        cls, step: float, load: float, forward: Sequence[float], sizes: Sequence[int], frozen: int
    ) -> "Costs":
        """Computes costs from measured times.

        Args:
            step: Seconds of a whole step in which all units ran.
            load: Seconds of the step that were spent on waiting for pixels.
            forward: Seconds of the forward pass through each unit.
            sizes: Bytes of the input of each unit.
            frozen: Number of units that were frozen.
        """
        backward = max(step - load - sum(forward), 0.0) / max(sum(forward[frozen:]), 1e-9)
        kept = (0, *sizes[1:], 0)
        read = tuple(size / READ_RATE for size in kept)
        write = tuple(size / WRITE_RATE for size in kept)
        return cls(tuple(forward), backward, read, load, write)

    @classmethod
    def unknown(cls, units: int) -> "Costs":
        """Returns costs of one second for each unit, for when nothing was measured.

        Only their proportions mean anything.
        """
        return cls((1.0,) * units, 2.0, (0.0,) * (units + 1), 0.0, (0.0,) * (units + 1))

    @classmethod
    def from_json(cls, found: Mapping[str, Any], units: int) -> "Costs":
        """Reads costs from the dict that `dataclasses.asdict` made of them.

        Args:
            found: Dict of costs.
            units: Number of units of the network.

        Raises:
            KeyError: A field is missing.
            TypeError: A field has another type.
            ValueError: A field is no number, or the costs are those of another network.
        """
        names = ("forward", "read", "write")
        forward, read, write = (tuple(map(float, found[name])) for name in names)
        if (len(forward), len(read), len(write)) != (units, units + 1, units + 1):
            raise ValueError("costs of another network")
        return cls(forward, float(found["backward"]), read, float(found["load"]), write)


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
        keeps_pixels: Whether decoded pixels stay in memory.
    """

    freeze_steps: tuple[int, ...]
    total_steps: int
    steps_per_epoch: int
    train_rows: int
    val_rows: int
    batch_size: int
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
            step = validate + costs.backward * (forward[-1] - forward[trained])
            share = self.val_batches / self.steps_per_epoch
            steps = stop - start
            found.append(Span(steps, steps * (step + share * validate), before))
        return found

    def fill(self, step: int, kept: int, costs: Costs) -> Fill:
        """Predicts a pass over the training set that keeps its rows.

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
        written = self.steps_per_epoch * costs.write[frozen]
        computed = self.steps_per_epoch * work
        read = self.steps_per_epoch * costs.read[frozen]
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


def forward_seconds(
    model: nn.Module, units: Sequence[Unit], x: Tensor, dtype: torch.dtype | None
) -> tuple[list[float], list[int]]:
    """Measures the forward pass through each unit, in eval mode, on a copy of the model.

    The time of a unit begins when a module with its parameters is called. It ends when a module
    with parameters of another unit is called.

    Args:
        model: Model to measure.
        units: Units of the model.
        x: Batch of network input.
        dtype: Type for autocast, or None.

    Returns:
        Seconds of each unit, and bytes of its input.
    """
    unit_of = {id(p): number for number, unit in enumerate(units) for p in unit.parameters}
    owners = {
        path: next((unit_of[id(p)] for p in module.parameters(recurse=False)), None)
        for path, module in model.named_modules()
    }
    copied = copy.deepcopy(model).eval()
    marks: list[tuple[int, Any]] = []
    sizes = [0] * len(units)

    def entered(number: int, args: tuple[Any, ...]) -> None:
        if not marks or marks[-1][0] != number:
            marks.append((number, _now(x.device)))
            if args and isinstance(args[0], Tensor):
                sizes[number] = args[0].nbytes

    for path, module in copied.named_modules():
        number = owners.get(path)
        if number is not None:
            module.register_forward_pre_hook(lambda _, args, number=number: entered(number, args))
    found = [float("inf")] * len(units)
    with torch.no_grad(), autocast(x.device, dtype):
        for _ in range(PASSES):
            marks.clear()
            copied(x)
            marks.append((-1, _now(x.device)))
            synchronize(x.device)
            seconds = [0.0] * len(units)
            for (number, began), (_, ended) in pairwise(marks):
                seconds[number] += _between(began, ended)
            found = [min(pair) for pair in zip(found, seconds, strict=True)]
    return found, sizes


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(began: Any, ended: Any) -> float:
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1e3
