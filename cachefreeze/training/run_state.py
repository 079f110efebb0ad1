"""The progress of a run: what a checkpoint holds beside weights, optimizer and random state."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from cachefreeze.plan.costs import Costs
from cachefreeze.training.checkpoint import is_due

# Bytes of weights that become part of a checkpoint in a second, before one was timed.
SAVE_RATE = 2e8
PARTS = ("train", "fill", "validate", "checkpoint")
COUNTED = ("rows_served", "rows_computed", "seconds_saved")


class RunState:
    """Progress of a run, counted over all of its processes.

    Args:
        processes: Number of processes that train the run together.

    Attributes:
        epoch: Number of whole epochs so far.
        position: Number of batches so far in the present epoch.
        step: Number of steps so far.
        losses: Loss of each step of the present epoch. They stay on the device: `.item()` in every
            step would wait for it.
        metrics: Line of each whole epoch.
        costs: Measured costs of a batch, or None before they are measured.
        fills: Facts about each pass that filled the cache.
        resumed_at: Step of each time that the run was resumed.
        processes: Number of processes at first, and each time that another number went on.
        seconds: Seconds of each part of the run; `wall` are those of earlier processes.
        counts: Counts of the caches of earlier processes, less what fills counted.
        started: Clock when this process began with the run.
        epoch_start: Seconds and counts of `so_far` when the present epoch began.
    """

    def __init__(self, processes: int = 1) -> None:
        self.processes = [processes]
        self.epoch = self.position = self.step = 0
        self.losses: list[Tensor] = []
        self.metrics: list[dict[str, Any]] = []
        self.costs: Costs | None = None
        self.fills: list[dict[str, Any]] = []
        self.resumed_at: list[int] = []
        self.seconds = dict.fromkeys((*PARTS, "load", "wall"), 0.0)
        self.counts: dict[str, float] = dict.fromkeys(COUNTED, 0)
        self.started = time.perf_counter()
        self.epoch_start = self.so_far(self.counts)

    @property
    def best_val_accuracy(self) -> float:
        """Best accuracy of the epochs so far."""
        return max(line["val_accuracy"] for line in self.metrics)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Adds the time inside to a part of the run's time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began

    def so_far(self, counted: Mapping[str, float]) -> dict[str, float]:
        """Returns the seconds of each part and the cache's counts, of all processes of the run.

        Args:
            counted: Counts of the cache of this process.
        """
        wall = self.seconds["wall"] + time.perf_counter() - self.started
        counts = {name: self.counts[name] + count for name, count in counted.items()}
        return {**self.seconds, "wall": wall, **counts}

    def as_dict(self, now: Mapping[str, float]) -> dict[str, Any]:
        """Returns the progress as plain values and tensors.

        Args:
            now: Seconds and counts from `so_far`.
        """
        return {
            "epoch": self.epoch,
            "step": self.step,
            "position": self.position,
            "losses": torch.stack(self.losses).cpu() if self.losses else torch.zeros(0),
            "metrics": self.metrics,
            "costs": None if self.costs is None else asdict(self.costs),
            "fills": self.fills,
            "totals": dict(now),
            "epoch_start": self.epoch_start,
            "resumed_at": self.resumed_at,
            "processes": self.processes,
        }

    def restore(
        self, saved: Mapping[str, Any], steps_per_epoch: int, units: int, device: torch.device
    ) -> None:
        """Goes back to saved progress.

        Args:
            saved: Dict from `as_dict`.
            steps_per_epoch: Number of steps of an epoch.
            units: Number of units of the network.
            device: Device of the losses.

        Raises:
            KeyError: A value is missing.
            TypeError: A value has another type.
            ValueError: A value makes no sense, or two of them do not agree.
        """
        self.epoch, self.position = int(saved["epoch"]), int(saved["position"])
        self.step = self.epoch * steps_per_epoch + self.position
        self.metrics = [dict(line) for line in saved["metrics"]]
        if len(self.metrics) != self.epoch:
            raise ValueError("its parts are of different moments")
        for line in self.metrics:
            float(line["val_accuracy"])
        self.losses = list(saved["losses"].to(device).reshape(self.position))
        if saved["costs"] is not None:
            self.costs = Costs.from_json(saved["costs"], units)
        self.fills = [dict(fill) for fill in saved["fills"]]
        self.resumed_at = [*(int(step) for step in saved["resumed_at"]), self.step]
        before = [int(count) for count in saved.get("processes", [1])]
        self.processes = before if before[-1:] == self.processes else before + self.processes
        self.counts = {name: float(saved["totals"][name]) for name in COUNTED}
        self.seconds = {part: float(saved["totals"][part]) for part in self.seconds}
        start = saved["epoch_start"]
        self.epoch_start = {name: float(start[name]) for name in self.epoch_start}


def in_metrics(spent: Mapping[str, float]) -> dict[str, float]:
    """Returns what an epoch has spent, by the names in metrics.jsonl.

    Args:
        spent: Difference of two dicts from `RunState.so_far`.
    """
    return {
        "rows_served": int(spent["rows_served"]),
        "rows_computed": int(spent["rows_computed"]),
        "seconds": spent["train"] + spent["fill"] + spent["validate"],
        "train_seconds": spent["train"],
        "fill_seconds": spent["fill"],
        "validate_seconds": spent["validate"],
        "saved_seconds": spent["seconds_saved"],
    }


class SaveTimes:
    """Times of the checkpoints of this process, by which the next one is due."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds = 0.0

    def note(self, seconds: float) -> None:
        """Notes that a checkpoint was saved just now.

        Args:
            seconds: Seconds that it took.
        """
        self._last, self._seconds = time.perf_counter(), seconds

    def is_due(self, epoch_seconds: float, state: RunState, model: nn.Module) -> bool:
        """Returns whether a checkpoint is due at the end of an epoch.

        Args:
            epoch_seconds: Seconds that the epoch took.
            state: Progress of the run.
            model: Network, whose size tells what a first checkpoint costs.
        """
        # Weights, momentum, and the best weights.
        guess = 3 * sum(one.nbytes for one in model.parameters()) / SAVE_RATE
        return is_due(
            since=time.perf_counter() - self._last,
            epoch=epoch_seconds,
            cost=self._seconds or guess,
            spent=state.seconds["checkpoint"],
            wall=state.so_far({})["wall"],
        )
