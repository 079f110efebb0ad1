"""Measures FreezeOut runs from scratch: plain, freezing alone, with the cache, and its limit."""

import copy
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cachefreeze import ActivationCache, FreezeOutLR, param_groups
from gpu_cases.counters import (
    Costs,
    count_waits,
    finish,
    forget_peak,
    peak,
    seconds_of,
    waits_in_words,
)
from gpu_cases.loops import OnDevice, deterministic, difference, seed_all
from gpu_cases.machine import Machine, Save, attempt, read_images

WAYS = ("plain", "freeze_only", "cached", "limit")
T0 = 0.5
# Epochs of a run.
_EPOCHS = 10
# Number of steps of an epoch: of a tiny one and of runs whose weights are compared, and the least
# and the largest of others. In short runs, new traces after each freeze take much of the time.
_TINY, _LEAST, _MOST = 4, 20, 200
# Share of the time of a case that its runs are planned for, and steps of the plain loop that take
# as long as a step of all ways.
_PLANNED, _PASSES = 0.7, 3.2


@dataclass
class FreezeOutCase:
    """FreezeOut runs of a network on small images.

    Attributes:
        build: Function that builds the network as a sequence of units, tiny or not.
        batch: Number of rows in a batch.
    """

    build: Callable[[bool], nn.Sequential]
    batch: int = 128

    def measure(self, machine: Machine, save: Save) -> None:
        """Measures all ways, and saves what is known after each repeat."""
        device, batch = machine.device, 8 if machine.tiny else self.batch
        seed_all(0)
        network = self.build(machine.tiny).to(device)
        found: dict[str, Any] = {"batch": batch, "t0": T0}
        few = _rows(machine, batch * _TINY, batch)
        found["weights"] = attempt(lambda: _compare_weights(network, few))
        save(found)
        _Run(network, few, "plain", 1)
        step = _Run(network, few, "plain", 2).seconds / (2 * _TINY)
        planned = _PLANNED * machine.left / (step * _PASSES * _EPOCHS)
        repeats = max(min(machine.repeats, int(planned / (_TINY if machine.tiny else _LEAST))), 1)
        count = _TINY if machine.tiny else min(max(int(planned / repeats), _LEAST), _MOST)
        found |= {"steps": count * _EPOCHS, "epochs": _EPOCHS, "rows": count * batch}
        batches = _rows(machine, count * batch, batch)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        peaks: dict[str, int | None] = {}
        for repeat in range(repeats):
            if repeat and machine.left < 0:
                break
            for way in WAYS:
                forget_peak(device)
                run = _Run(network, batches, way, _EPOCHS)
                times[way].append(run.seconds / (count * _EPOCHS))
                peaks[way] = peak(device)
                if way == "cached":
                    found |= {"cache": run.said, "rows_served": run.served}
            found |= _summary(times) | {"peak_bytes": peaks, "repeats": repeat + 1}
            save(found)
        for way, name in (("cached", "counted"), ("freeze_only", "plain_waits")):
            found[name] = attempt(lambda: _counted(network, batches, way))  # noqa: B023
            save(found)


def _rows(machine: Machine, count: int, batch: int) -> OnDevice:
    size = 16 if machine.tiny else 32
    random = torch.Generator().manual_seed(0)
    if machine.images is None:
        pixels = torch.randint(256, (count, 3, size, size), generator=random, dtype=torch.uint8)
    else:
        images = F.interpolate(read_images(machine.images).float(), size=size, mode="area")
        pixels = images[torch.arange(count) % len(images)]
    y = torch.randint(10, (count,), generator=random)
    x = pixels.float() / 127.5 - 1
    return OnDevice(x.to(machine.device), y.to(machine.device), batch)


class _Run:
    """One run from scratch.

    Args:
        network: Network that a copy is trained of.
        batches: Batches of an epoch.
        way: One of `WAYS`.
        epochs: Number of epochs.
        counts: Whether waits and the cache's own work are counted in the last epoch.

    Attributes:
        seconds: Seconds of the run.
        model: Trained network.
        served: Number of rows that the cache has served.
        said: Summary of the cache, in lines.
        places: Number of waits of the last epoch, by place, if counted.
        costs: Seconds of the cache's own work in the last epoch, if counted.
    """

    def __init__(
        self, network: nn.Sequential, batches: OnDevice, way: str, epochs: int, counts: bool = False
    ) -> None:
        self.model, self._way, self._device = copy.deepcopy(network), way, batches.x.device
        self.model.train()
        seed_all(1)
        groups = param_groups(self.model)
        self._optimizer = torch.optim.SGD(
            groups, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
        steps = epochs * len(batches.x) // batches.batch
        self._scheduler = None
        if way != "plain":
            self._scheduler = FreezeOutLR(self._optimizer, self.model, steps, T0)
            units = [name for name, _ in self.model.named_children()]
            assert list(self._scheduler.names) == units, "units are not the network's layers"
        self._tail: tuple[int, nn.Module] = (0, self.model)
        self._values: Tensor | None = None
        self._beside = 0.0
        self.served, self.said = 0, [""]
        self.places: Counter[str] = Counter()
        self.costs = Costs()
        cache = ActivationCache(self.model) if way == "cached" else None
        finish(self._device)
        began = perf_counter()
        for epoch in range(epochs):
            if counts and epoch == epochs - 1:
                with self.costs.count(self._device):
                    self._epoch(batches, epoch - 1)
                with count_waits(self._device, self.places):
                    self._epoch(batches, epoch)
            else:
                self._epoch(batches, epoch)
        finish(self._device)
        if cache is not None:
            cache.close()
            self.served, self.said = cache.stats.rows_served, str(cache).splitlines()
        self.seconds = perf_counter() - began - self._beside

    def _epoch(self, batches: OnDevice, number: int) -> None:
        for x, y in batches.epoch(number):
            frontier = 0 if self._scheduler is None else self._scheduler.frontier
            if self._way == "limit" and frontier:
                if frontier != self._tail[0]:
                    self._beside += seconds_of(lambda: self._cut(frontier, x), self._device)  # noqa: B023
                assert self._values is not None
                loss = F.cross_entropy(self._tail[1](self._values), y)
            else:
                loss = F.cross_entropy(self.model(x), y)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            if self._scheduler is not None:
                self._scheduler.step()

    def _cut(self, frontier: int, x: Tensor) -> None:
        """Computes the values that the layers behind a freeze take, outside of the clock."""
        with torch.no_grad():
            self._values = self.model[:frontier](x)
        self._tail = (frontier, self.model[frontier:])


def _counted(network: nn.Sequential, batches: OnDevice, way: str) -> dict[str, Any]:
    """Counts waits, and seconds of the cache's own work, in the last epochs of a run."""
    run, device = _Run(network, batches, way, _EPOCHS, counts=True), batches.x.device
    steps = len(batches.x) // batches.batch
    waits = {"waits": waits_in_words(run.places, steps, device)}
    return waits | run.costs.of_steps(steps, len(batches.x), device)


def _compare_weights(network: nn.Sequential, batches: OnDevice) -> dict[str, Any]:
    notes: set[str] = set()
    with deterministic(notes):
        plain, cached = (_Run(network, batches, way, _EPOCHS) for way in ("freeze_only", "cached"))
    largest = difference(plain.model, cached.model)
    return {
        "equal": largest is None, "largest_difference": largest or 0, "rows_served": cached.served,
        "messages": cached.said, "not_deterministic": sorted(notes),
    }  # fmt: skip


def _summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Returns seconds of a step, and the ratios of the plain loop and of freezing alone."""
    freeze, cached, limit = (statistics.median(times[way]) for way in WAYS[1:])
    pairs = list(zip(times["freeze_only"], times["cached"], strict=True))
    return {
        "seconds_of_a_step": times,
        "ratio_freeze_only": statistics.median(
            [a / b for a, b in zip(times["plain"], times["freeze_only"], strict=True)]
        ),
        "ratio_later": statistics.median([a / b for a, b in pairs]),
        "ratios_later": [a / b for a, b in pairs],
        "ratio_limit": freeze / limit,
        "efficiency": (freeze - cached) / (freeze - limit) if freeze > limit else None,
    }
