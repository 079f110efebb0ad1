"""Counters of one epoch: waits for the GPU, memory, and seconds of the cache's own work."""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from cachefreeze.cache.batch_inputs import BatchInputs
from cachefreeze.cache.kept_values import KeptValues

ROOT = Path(__file__).parents[2]
# Number of places in the code that are listed, and of calls around a wait for an event.
_PLACES, _CALLS = 5, 4
# Number of times that `index_select` is timed.
_TIMES = 20


def finish(device: torch.device) -> None:
    """Waits until a device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Returns the seconds from the start of a call until the device has done its work."""
    finish(device)
    began = perf_counter()
    call()
    finish(device)
    return perf_counter() - began


def forget_peak(device: torch.device) -> None:
    """Begins to look for the largest memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Returns the largest number of bytes of tensors on a GPU, or None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@contextmanager
def count_waits(device: torch.device, places: Counter[str]) -> Iterator[None]:
    """Counts how often the host waits for the GPU, by place in the code. Does nothing on a CPU.

    torch warns of operations that wait. It says nothing of waits for an event or a stream, which
    are counted by their methods.

    Args:
        device: Device that the loop runs on.
        places: Counter that is added to.
    """
    if device.type != "cuda":
        yield
        return

    def counted(method: Any) -> Any:
        def wait(*args: Any, **kwargs: Any) -> Any:
            frame: FrameType | None = sys._getframe(1)
            calls: list[str] = []
            while frame is not None and len(calls) < _CALLS:
                calls.append(_place(frame.f_code.co_filename, frame.f_lineno))
                frame = frame.f_back
            places[" < ".join(calls)] += 1
            return method(*args, **kwargs)

        return wait

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with (
                patch.object(
                    torch.cuda.Event, "synchronize", counted(torch.cuda.Event.synchronize)
                ),
                patch.object(
                    torch.cuda.Stream, "synchronize", counted(torch.cuda.Stream.synchronize)
                ),
                patch.object(torch.cuda, "synchronize", counted(torch.cuda.synchronize)),
            ):
                yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for one in found:
        if "called a synchronizing" in str(one.message):
            places[_place(one.filename, one.lineno)] += 1


def _place(file: str, line: int) -> str:
    path = Path(file)
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
    return f"{name}:{line}"


def waits_in_words(places: Counter[str], steps: int, device: torch.device) -> dict[str, Any] | None:
    """Returns the number of waits of a step, and the most frequent places. None on a CPU."""
    if device.type != "cuda":
        return None
    return {"per_step": sum(places.values()) / steps, "places": dict(places.most_common(_PLACES))}


@dataclass
class Costs:
    """Seconds of the cache's own work in some steps.

    Attributes:
        keys: Seconds of making keys of rows.
        look_up: Seconds of finding rows by their keys.
        gather: Seconds of gathering rows.
        gathered: Number of rows that were gathered.
        shapes: Number of rows, of elements of a row, and type, of each kept value of a batch.
    """

    keys: float = 0.0
    look_up: float = 0.0
    gather: float = 0.0
    gathered: int = 0
    shapes: list[tuple[int, int, torch.dtype]] = field(default_factory=list)

    @contextmanager
    def count(self, device: torch.device) -> Iterator[None]:
        """Times the methods that the cache calls for this, each until the device is done."""

        def timed(name: str, method: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                finish(device)
                began = perf_counter()
                found = method(*args, **kwargs)
                finish(device)
                setattr(self, name, getattr(self, name) + perf_counter() - began)
                if name == "gather" and found:
                    values = list(found.values())
                    self.gathered += len(values[0])
                    self.shapes = [(len(v), v[0].numel(), v.dtype) for v in values if v.dim()]
                return found

            return call

        with (
            patch.object(BatchInputs, "keys", timed("keys", BatchInputs.keys)),
            patch.object(KeptValues, "find", timed("look_up", KeptValues.find)),
            patch.object(KeptValues, "read", timed("gather", KeptValues.read)),
        ):
            yield

    def of_steps(self, steps: int, rows: int, device: torch.device) -> dict[str, Any]:
        """Returns the seconds of a step, and the rate of gathering.

        Args:
            steps: Number of steps that were counted.
            rows: Number of rows that are kept.
            device: Device of the rows.
        """
        return {
            "keys_seconds": self.keys / steps,
            "look_up_seconds": self.look_up / steps,
            "gather": self._gathering(device, rows),
        }

    def _gathering(self, device: torch.device, rows: int) -> dict[str, Any] | None:
        """Compares the rate of gathering with that of `index_select` alone.

        Args:
            device: Device of the rows.
            rows: Number of rows to choose from.

        Returns:
            Rows gathered in a second, both ways, and bytes of a row. None if no rows were gathered.
        """
        if not self.shapes:
            return None
        seconds, count = 0.0, max(shape[0] for shape in self.shapes)
        for taken, numel, dtype in self.shapes:
            table = torch.zeros((max(rows, taken), numel), dtype=dtype, device=device)
            places = torch.randint(len(table), (taken,)).to(device)

            def gather(table: Tensor = table, places: Tensor = places) -> Tensor:
                return table.index_select(0, places)

            gather()
            seconds += min(seconds_of(gather, device) for _ in range(_TIMES))
        return {
            "rows_per_second": self.gathered / self.gather,
            "index_select_rows_per_second": count / seconds,
            "row_bytes": sum(numel * dtype.itemsize for _, numel, dtype in self.shapes),
        }
