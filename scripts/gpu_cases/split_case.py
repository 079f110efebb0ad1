"""Measures a loop whose model has a frozen part that never changes."""

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cachefreeze
from cachefreeze import ActivationCache
from gpu_cases.counters import (
    Costs,
    count_waits,
    forget_peak,
    peak,
    seconds_of,
    waits_in_words,
)
from gpu_cases.loops import Batches, Loop, OnDevice, deterministic, difference, seed_all
from gpu_cases.machine import Machine, Save, attempt
from gpu_cases.networks import Loss, Split

# Epochs after the second one, in which all batches are served.
LATER = 3
# Number of steps of an epoch: of a tiny one, and the least and the largest of others. A quarter of
# the second epoch's steps are compared.
_TINY, _LEAST, _MOST = 6, 16, 64
# Epochs and steps of an epoch of the runs whose weights are compared.
_CHECKED_EPOCHS, _CHECKED_STEPS = 3, 6
# Epochs of `cachefreeze.probe` after the first one.
_PROBE_EPOCHS = 10
# Share of the time of a case that its runs are planned for, and steps of a repeat: two epochs of
# the plain loop, two of the cached one, its later ones, those of the trained part, and the rest.
_PLANNED, _PASSES = 0.7, 6.0


@dataclass
class SplitCase:
    """A loop whose model has a frozen part and a trained part.

    Attributes:
        build: Function that builds the model, tiny or not.
        rows: Function that makes batches for a number of rows.
        batch: Number of rows in a batch.
        loss: Loss of the model.
        dtype: Type of autocast on a GPU.
        scaled: Whether gradients are scaled.
        offloads: Whether frozen weights leave the device while they are not needed.
        beside: Further way that is measured on the same rows. It returns seconds by name.
    """

    build: Callable[[bool], Split]
    rows: Callable[[Machine, int, int], Batches]
    batch: int
    loss: Loss
    dtype: torch.dtype | None = torch.bfloat16
    scaled: bool = False
    offloads: bool = False
    beside: Callable[[Machine, Any, Any], dict[str, float]] | None = None

    def measure(self, machine: Machine, save: Save) -> None:
        """Measures all ways, and saves what is known after each repeat."""
        device = machine.device
        batch = 4 if machine.tiny else self.batch
        found: dict[str, Any] = {"batch": batch}
        few = self.rows(machine, batch * _CHECKED_STEPS, batch)
        found["weights"] = attempt(lambda: self._compare_weights(machine, few))
        save(found)
        loop, opened = self._loop(machine), few.opened(None)
        # The first epoch chooses kernels.
        seconds = [seconds_of(lambda: loop.epoch(opened, 0), device) for _ in range(2)]
        planned = _PLANNED * machine.left / (seconds[1] / _CHECKED_STEPS * _PASSES)
        repeats = max(min(machine.repeats, int(planned / (_TINY if machine.tiny else _LEAST))), 1)
        count = _TINY if machine.tiny else min(max(int(planned / repeats), _LEAST), _MOST)
        found |= {"steps": count, "rows": count * batch, "counted": {}}
        batches = self.rows(machine, count * batch, batch)
        features = loop.features(batches)
        times: dict[str, list[float]] = {}
        peaks: dict[str, int | None] = {}
        for repeat in range(repeats):
            if repeat and machine.left < 0:
                break
            self._plain(loop, batches, count, times, peaks)
            self._limit(loop, features, times)
            self._cached(loop, batches, count, times, peaks, found)
            found |= _summary(times, count) | {"peak_bytes": peaks, "repeats": repeat + 1}
            save(found)
        found["plain_waits"] = attempt(lambda: self._waits_of_plain(loop, batches, count))
        save(found)
        if (beside := self.beside) is not None:
            found["beside"] = attempt(lambda: beside(machine, loop.model, batches))
            save(found)

    def _loop(self, machine: Machine) -> Loop:
        seed_all(0)
        model = self.build(machine.tiny).to(machine.device).train()
        dtype = None if machine.device.type == "cpu" else self.dtype
        return Loop(model, self.loss, machine.device, dtype, self.scaled)

    def _open(self, loop: Loop) -> ActivationCache:
        return ActivationCache(loop.model, offload_frozen=self.offloads)

    def _compare_weights(self, machine: Machine, batches: Batches) -> dict[str, Any]:
        """Compares the weights after some epochs with those of the plain loop."""
        notes: set[str] = set()
        with deterministic(notes):
            loops = [self._loop(machine), self._loop(machine)]
            for loop, has_cache in zip(loops, (False, True), strict=True):
                cache = self._open(loop) if has_cache else None
                opened = batches.opened(cache)
                seed_all(1)
                for epoch in range(_CHECKED_EPOCHS):
                    loop.epoch(opened, epoch)
                if cache is not None:
                    served, said = cache.stats.rows_served, cache.messages
                    cache.close()
        largest = difference(loops[0].model, loops[1].model)
        return {
            "equal": largest is None, "largest_difference": largest or 0, "rows_served": served,
            "messages": list(said), "not_deterministic": sorted(notes),
        }  # fmt: skip

    def _plain(self, loop: Loop, batches: Batches, count: int, times: Any, peaks: Any) -> None:
        opened = batches.opened(None)
        forget_peak(loop.device)
        for epoch, name in enumerate(("plain_first", "plain")):
            seconds = seconds_of(lambda: loop.epoch(opened, epoch), loop.device)  # noqa: B023
            times.setdefault(name, []).append(seconds / count)
        peaks["plain"] = peak(loop.device)

    def _limit(self, loop: Loop, features: list[tuple[Tensor, Tensor]], times: Any) -> None:
        def steps() -> None:
            for x, y in features:
                loop.step(loop.model.trained, x, y)

        steps()
        seconds = min(seconds_of(steps, loop.device) for _ in range(LATER))
        times.setdefault("limit", []).append(seconds / len(features))

    def _cached(
        self, loop: Loop, batches: Batches, count: int, times: Any, peaks: Any, found: Any
    ) -> None:
        device = loop.device
        forget_peak(device)
        with self._open(loop) as cache:
            opened = batches.opened(cache)
            later = []
            for epoch in range(2 + LATER):
                seconds = seconds_of(lambda: loop.epoch(opened, epoch), device) / count  # noqa: B023
                if epoch < 2:
                    times.setdefault(("first", "second")[epoch], []).append(seconds)
                else:
                    later.append(seconds)
                if epoch in (0, LATER):
                    peaks["later" if epoch else "first"] = peak(device)
                    forget_peak(device)
            times.setdefault("later", []).append(statistics.median(later))
            peaks["last"] = peak(device)
            if not found["counted"]:
                found["counted"] = attempt(lambda: self._counted(loop, opened, cache, count))

    def _counted(
        self, loop: Loop, opened: Batches, cache: ActivationCache, count: int
    ) -> dict[str, Any]:
        """Counts waits, and seconds of the cache's own work, in two epochs that are served."""
        places, costs = Counter[str](), Costs()
        before = cache.stats.rows_served
        with count_waits(loop.device, places):
            loop.epoch(opened, 2 + LATER)
        served = cache.stats.rows_served - before
        with costs.count(loop.device):
            loop.epoch(opened, 3 + LATER)
        return {
            "served_of_an_epoch": served,
            "waits": waits_in_words(places, count, loop.device),
            **costs.of_steps(count, cache.stats.rows_kept, loop.device),
            "cache": str(cache).splitlines(),
            "kept_bytes": cache.stats.bytes,
        }

    def _waits_of_plain(self, loop: Loop, batches: Batches, count: int) -> dict[str, Any]:
        opened, places = batches.opened(None), Counter[str]()
        with count_waits(loop.device, places):
            loop.epoch(opened, 0)
        return {"waits": waits_in_words(places, count, loop.device)}


def _summary(times: dict[str, list[float]], count: int) -> dict[str, Any]:
    """Returns seconds of a step, and the ratios of the plain loop to the cached one."""
    middle = {name: statistics.median(found) for name, found in times.items()}
    most = middle["plain"] - middle["limit"]

    def ratios(name: str, one: str = "plain") -> list[float]:
        return [a / b for a, b in zip(times[one], times[name], strict=True)]

    return {
        "seconds_of_a_step": times,
        "ratio_first": statistics.median(ratios("first", "plain_first")),
        "ratio_later": statistics.median(ratios("later")),
        "ratios_later": ratios("later"),
        "ratio_limit": statistics.median(ratios("limit")),
        "efficiency": (middle["plain"] - middle["later"]) / most if most > 0 else None,
    }


def probe_beside(machine: Machine, model: Split, batches: OnDevice) -> dict[str, float]:
    """Times `cachefreeze.probe` with heads as those of the model, on the same rows.

    Returns:
        Seconds of a step of the first epoch, with all that comes before it, and of later ones.
    """
    data = torch.utils.data.TensorDataset(batches.x.cpu(), batches.y.cpu())
    val = torch.utils.data.Subset(data, range(batches.batch))
    steps = len(batches.x) / batches.batch

    def run(epochs: int) -> float:
        heads = [torch.nn.Linear(h.in_features, h.out_features) for h in model.trained.heads]  # type: ignore[union-attr]
        return seconds_of(
            lambda: cachefreeze.probe(
                model.frozen, data, val, heads, epochs=epochs, batch_size=batches.batch
            ),
            machine.device,
        )

    one = run(1)
    more = run(1 + _PROBE_EPOCHS)
    return {"probe_first": one / steps, "probe_later": (more - one) / _PROBE_EPOCHS / steps}
