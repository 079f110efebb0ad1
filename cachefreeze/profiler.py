"""What the planner needs to know, measured on the real device with the real network."""

import copy
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachefreeze.device import autocast, memory_for_rows
from cachefreeze.encoding import Encoding, as_array
from cachefreeze.models.units import Units, canonical
from cachefreeze.moments import Moments
from cachefreeze.planner import Costs, Keep
from cachefreeze.rows import PixelRows
from cachefreeze.scratch import measure_disk
from cachefreeze.store import CODECS, Layout, codec_for

# Of the predicted run: what measuring may take; aimed below the promised hundredth.
SHARE = 0.008
# A pass in eval mode and one in training mode take as long as this many training steps.
PASS_STEPS = 1.4
MAX_PASSES = 6
# Of the share: what is left for the disk.
DISK_SHARE = 0.2
# Rows of a boundary that codecs are tried on.
CODEC_BYTES = 2**20


@dataclass(frozen=True)
class Boundary:
    """One boundary as measured: the shape and type of a stored row, seconds a row to make one of
    a tensor and back where that takes more than a copy, what each codec makes of it, and whether
    storing it loses precision."""

    row_shape: tuple[int, ...]
    dtype: str
    encode: float
    decode: float
    codecs: dict[str, "CodecCost"]
    lossy: bool = False

    @property
    def row_bytes(self) -> int:
        """Of a stored row, before compression."""
        return prod(self.row_shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class CodecCost:
    """Of one codec on one boundary: encoded bytes over plain ones, and seconds a plain byte."""

    ratio: float
    encode: float
    decode: float


@dataclass(frozen=True)
class Residence:
    """Where rows will be held, and who moves them.

    Args:
        tier_for: says of so many bytes of rows in which of `TIERS` they would be, with no others
            there: those before them go once they have come, and what had to wait elsewhere for
            that room moves there then.
        beside: threads that read and write beside the device's work; 0 if that takes its time.
    """

    tier_for: Callable[[float], str] = lambda needed: "disk"
    beside: int = 0

    def read(self, needed: float) -> float:
        """The share of reading so many bytes' rows that training has to wait for. (Rows from the
        host overlap with a step; by how much, what is observed tells.)"""
        if not self.beside:
            return 1.0
        return 0.0 if self.tier_for(needed) == "device" else 1 / self.beside

    def write(self, needed: float, *, lossy: bool) -> float:
        """The share of writing them that filling a store has to wait for. (What loses precision is
        on disk before its first row is served, wherever that comes from.)"""
        if not self.beside:
            return 1.0
        return 1 / self.beside if lossy or self.tier_for(needed) == "disk" else 0.0

    def load(self, needed: float) -> float:
        """How often all of them have to be read before they are served from a store that is on
        disk."""
        return 0.0 if self.tier_for(needed) == "disk" else 1.0


ON_DISK = Residence()


@dataclass(frozen=True)
class Profile:
    """What was measured, in seconds a row where it does not say otherwise.

    Attributes:
        train, forward: of each unit: forward and backward; forward in eval mode.
        normalize: from decoded pixels to network input.
        decode: of an image.
        step: seconds of an optimiser step beside the units.
        boundaries: 1 .. L in order.
        pixel_bytes: of a row of decoded pixels.
        write, read: seconds a byte, of a store; `verify` likewise.
        store: seconds that a store takes beside its rows.
        problem: why nothing can be kept on the disk, if so.
        rows, passes: of each batch that was measured, and how many of them.
        seconds: that measuring took.
    """

    train: tuple[float, ...]
    forward: tuple[float, ...]
    normalize: float
    decode: float
    step: float
    boundaries: tuple[Boundary, ...]
    pixel_bytes: int
    write: float
    read: float
    verify: float
    store: float
    problem: str | None
    rows: int
    passes: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Names and plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Profile":
        """What `as_json` gave."""
        boundaries = tuple(
            Boundary(
                **{
                    **boundary,
                    "row_shape": tuple(boundary["row_shape"]),
                    "codecs": {n: CodecCost(**cost) for n, cost in boundary["codecs"].items()},
                }
            )
            for boundary in content["boundaries"]
        )
        units = {name: tuple(map(float, content[name])) for name in ("train", "forward")}
        plain = {name: float(value) for name, value in content.items() if name in _SECONDS}
        return cls(**{**content, **units, **plain, "boundaries": boundaries})

    def costs(self, splits: Mapping[str, int], codec: str, residence: Residence = ON_DISK) -> Costs:
        """What the planner takes.

        Args:
            splits: rows of each split.
            codec: `raw`, `lz4`, `zstd`, or `auto`: raw, and the others where raw does not fit.
            residence: where rows will be held.
        """
        if self.problem is not None:
            return self._costs(())
        keeps = []
        if self.decode > 0:
            keep = self._keep(0, (self.pixel_bytes,), "uint8", splits, residence)
            keeps.append(dataclasses.replace(keep, read=keep.read + self.normalize))
        for number, boundary in enumerate(self.boundaries, 1):
            raw = self._keep(
                number, boundary.row_shape, boundary.dtype, splits, residence, lossy=boundary.lossy
            )
            raw = dataclasses.replace(
                raw, write=raw.write + boundary.encode, read=raw.read + boundary.decode
            )
            if codec in ("raw", "auto"):
                keeps.append(raw)
            in_memory = boundary.row_bytes * sum(splits.values())
            if boundary.codecs and in_memory > memory_for_rows():
                continue  # decoded rows are served from memory, and would not fit
            for name, cost in boundary.codecs.items():
                if codec in (name, "auto"):
                    share = residence.write(in_memory, lossy=boundary.lossy)
                    keeps.append(
                        self._compressed(raw, boundary, name, cost, codec == "auto", share)
                    )
        return self._costs(tuple(keeps))

    def _costs(self, keeps: tuple[Keep, ...]) -> Costs:
        return Costs(
            train=self.train,
            forward=self.forward,
            inputs=self.decode + self.normalize,
            normalize=self.normalize,
            step=self.step,
            store=self.store,
            keeps=keeps,
        )

    def _keep(
        self,
        boundary: int,
        shape: Sequence[int],
        dtype: str,
        splits: Mapping[str, int],
        residence: Residence,
        *,
        lossy: bool = False,
    ) -> Keep:
        layouts = [Layout.of(rows, shape, dtype) for rows in splits.values()]
        on_disk = sum(layout.bytes + layout.overhead_bytes for layout in layouts)
        plain = prod(shape) * np.dtype(dtype).itemsize
        needed = plain * sum(splits.values())
        loading = plain * self.read * residence.load(needed)
        return Keep(
            boundary,
            "raw",
            row_bytes=on_disk / sum(splits.values()),
            write=plain * self.write * residence.write(needed, lossy=lossy),
            read=plain * self.read * residence.read(needed),
            # Other rows are in memory before they are on disk.
            load=loading if lossy else 0.0,
            verify=plain * self.verify + (0.0 if lossy else loading),
        )

    def _compressed(
        self,
        raw: Keep,
        boundary: Boundary,
        codec: str,
        cost: CodecCost,
        reserve: bool,
        share: float,
    ) -> Keep:
        plain = boundary.row_bytes
        decode = plain * (cost.ratio * self.read + cost.decode)
        return dataclasses.replace(
            raw,
            codec=codec,
            row_bytes=raw.row_bytes * cost.ratio,
            write=share * plain * (cost.ratio * self.write + cost.encode) + boundary.encode,
            # Decoding verifies, and rows that are in memory first need it only when found.
            load=raw.load + (decode if share else 0.0),
            verify=0.0 if share else decode,
            reserve=reserve,
        )


_SECONDS = ("normalize", "decode", "step", "write", "read", "verify", "store", "seconds")


@dataclass(frozen=True)
class Arithmetic:
    """What computing takes, in seconds a row, and `step` in seconds.

    Attributes:
        train, forward: of each unit, see `Profile`.
        step: see `Profile`.
        outputs: a batch at each of the boundaries 1 .. L.
        rows, passes: how much was measured.
        seconds: that measuring took.
    """

    train: tuple[float, ...]
    forward: tuple[float, ...]
    step: float
    outputs: tuple[Tensor, ...]
    rows: int
    passes: int
    seconds: float


def passes_for(row_passes: float, batch_size: int) -> int:
    """Passes over a batch (one in eval mode and one in training mode) that measuring may take.

    Args:
        row_passes: of the run, see `planner.Run.row_passes`.
    """
    affordable = SHARE * (1 - DISK_SHARE) * row_passes / PASS_STEPS / batch_size
    return int(min(affordable, MAX_PASSES))


def measure(
    units: Units,
    x: Tensor,
    *,
    passes: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
) -> Arithmetic:
    """Measure a network on a batch of network input, the first of two or more passes to warm up.

    Everything happens on a copy: weights, running statistics, gradients and all random state stay
    as they are.
    """
    start = time.perf_counter()
    with _same_random_state(device):  # dropout draws from the global generators
        bench = _Bench(copy.deepcopy(units), device, autocast_dtype)
        for _ in range(passes):
            outputs = bench.measure(x)
        step = bench.step_seconds()
    train, forward = bench.medians(len(x))
    seconds = time.perf_counter() - start
    return Arithmetic(train, forward, step, outputs, len(x), passes, seconds)


def warm_up(
    units: Units, x: Tensor, device: torch.device, autocast_dtype: torch.dtype | None
) -> None:
    """A whole training step, but for the optimiser's, on a copy: what it takes of the device's
    memory is in the allocator's books from then on.

    Args:
        x: a batch of network input.
    """
    with _same_random_state(device):
        copied = copy.deepcopy(units)
        copied.model.train()
        with autocast(device, autocast_dtype):
            y = copied.run(x, 0).float()
        F.cross_entropy(y, torch.zeros(len(y), dtype=torch.int64, device=device)).backward()


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    if mps is not None:
        torch.mps.set_rng_state(mps)


class StepClock:
    """Measures a network in the first steps of its training, at no cost but that of a few hooks.

    For runs that are too short to measure anything beforehand. What a unit takes in eval mode is
    taken to be what its forward pass takes in training. Nothing that is computed changes.

    Args:
        units: none of them frozen.
        optimizer: of the run.
        device: of the run.
    """

    STEPS = 3  # of which the first is to warm up

    def __init__(
        self, units: Units, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self.outputs: list[Tensor] = [torch.empty(0)] * len(units)
        self._moments = Moments(device)
        self._origin = self._moments.now()
        # When each unit's forward pass begins and ends.
        self._forward: list[list[tuple[Any, Any]]] = [[] for _ in units]
        # When each unit's backward pass begins, and when the last one has ended; None if it has
        # none.
        self._marks: list[list[Any]] = [[] for _ in range(len(units) + 1)]
        # When each step began and ended.
        self._steps: list[tuple[Any, Any]] = []
        self._rows: list[int] = []
        self._mark: Any = None
        self._handles = [optimizer.register_step_pre_hook(self._after_backward)]
        for number, unit in enumerate(units):
            self._handles.append(unit.register_forward_pre_hook(self._before_forward))
            after = functools.partial(self._after_forward, number)
            self._handles.append(unit.register_forward_hook(after))

    def step_taken(self, began: Any, ended: Any) -> None:
        """Told after every step of the moments between which the device was at it. (The host may
        have asked for all of it long before.)"""
        self._steps.append((began, ended))

    @property
    def done(self) -> bool:
        """Whether enough has been seen."""
        return len(self._steps) >= self.STEPS

    def stop(self) -> None:
        """Measure no more."""
        for handle in self._handles:
            handle.remove()

    def result(self) -> Arithmetic:
        """What the steps took, once it is `done`; waits until the device has done them."""
        rows = len(self.outputs[0])
        forward = [
            self._a_row([self._moments.seconds(*mark) for mark in marks]) for marks in self._forward
        ]
        # Backward passes go from the last unit to the first.
        ends = list(map(self._seconds, self._marks[0]))
        marks = [list(map(min, map(self._seconds, times), ends)) for times in self._marks]
        backward = [
            self._a_row([end - begin for begin, end in zip(begins, ends, strict=True)])
            for ends, begins in pairwise(marks)
        ]
        train = [f + b for f, b in zip(forward, backward, strict=True)]
        whole = self._a_row([self._moments.seconds(*step) for step in self._steps])
        return Arithmetic(
            train=tuple(train),
            forward=tuple(forward),
            step=max(whole - sum(train), 0.0) * rows,
            outputs=tuple(self.outputs[:-1]),
            rows=rows,
            passes=len(self._steps),
            seconds=0.0,
        )

    def _a_row(self, seconds: Sequence[float]) -> float:
        """Of seconds by step: the median of all but the first, by its rows."""
        by_row = [each / rows for each, rows in zip(seconds, self._rows, strict=True)]
        return statistics.median(by_row[1:])

    def _seconds(self, mark: Any) -> float:
        return math.inf if mark is None else self._moments.seconds(self._origin, mark)

    def _before_forward(self, unit: nn.Module, args: tuple[Any, ...]) -> None:
        self._mark = self._moments.now()

    def _after_forward(
        self, number: int, unit: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> None:
        if not unit.training:  # validation after an epoch of fewer steps
            return
        self._forward[number].append((self._mark, self._moments.now()))
        self.outputs[number] = output.detach()
        if number == 0:
            self._rows.append(len(output))
        if output.requires_grad:
            # Its gradient is there when the next unit's backward pass has ended.
            marks = self._marks[number + 1]
            output.register_hook(lambda gradient: marks.append(self._moments.now()))
        else:  # units without parameters in front: a backward pass of no length, at the very end
            self._marks[number + 1].append(None)

    def _after_backward(self, optimizer: object, args: object, kwargs: object) -> None:
        self._marks[0].append(self._moments.now())


def profile(
    arithmetic: Arithmetic,
    inputs: PixelRows,
    pixels: Tensor,
    *,
    row_passes: float,
    device: torch.device,
    decode_seconds: float,
    directory: Path,
    max_bytes: float = float("inf"),
    stored: str | None = None,
    codec: str = "raw",
) -> Profile:
    """All that the planner needs: what computing takes, and what storing its results would.

    Args:
        arithmetic: measured by `measure` or a `StepClock`.
        inputs: knows the way from pixels to network input.
        pixels: uint8 (n, C, H, W), a batch or less.
        row_passes: of the run; infinite measures as well as can be.
        device: of the run.
        decode_seconds: of an image, known from reading the data.
        directory: of the cache, prepared; a scratch store is written there and removed.
        max_bytes: that the scratch store may take.
        stored, codec: how activations are to be kept; only those codecs are tried.
    """
    start = time.perf_counter()
    inputs.from_pixels(pixels)
    _, normalize = _timed(device, lambda: inputs.from_pixels(pixels))
    codecs = CODECS[1:] if codec == "auto" else tuple({codec} & set(CODECS[1:]))
    boundaries = tuple(_boundary(y, stored, codecs, device) for y in arithmetic.outputs)
    spent = arithmetic.seconds + time.perf_counter() - start
    predicted = row_passes * sum(arithmetic.train)
    row = pixels[0].nelement()
    sizes = [boundary.row_bytes for boundary in boundaries]
    disk = measure_disk(
        directory,
        int(statistics.median([row, *sizes])),
        max_bytes,
        max(SHARE * predicted - spent, DISK_SHARE * SHARE * predicted),
    )
    return Profile(
        train=arithmetic.train,
        forward=arithmetic.forward,
        normalize=normalize / len(pixels),
        decode=decode_seconds,
        step=arithmetic.step,
        boundaries=boundaries,
        pixel_bytes=row,
        write=disk.write,
        read=disk.read,
        verify=disk.verify,
        store=disk.store,
        problem=disk.problem,
        rows=arithmetic.rows,
        passes=arithmetic.passes,
        seconds=arithmetic.seconds + time.perf_counter() - start,
    )


def _timed(device: torch.device, work: Any) -> tuple[Any, float]:
    """What `work` returns, and the seconds that it took."""
    moments = Moments(device)
    mark = moments.now()
    result = work()
    return result, moments.seconds(mark, moments.now())


class _Bench:
    """Runs a network unit by unit, and keeps the times of every unit in every pass."""

    def __init__(self, units: Units, device: torch.device, dtype: torch.dtype | None) -> None:
        self.units = units
        self.whole = units.model
        self.device = device
        self.dtype = dtype
        self.moments = Moments(device)
        # When each unit began and ended in each pass. Nobody waits for a device in between: on its
        # own a small unit would seem to take as long as starting it does.
        self.forward: list[list[tuple[Any, Any]]] = [[] for _ in units]
        self.train: list[list[tuple[Any, Any]]] = [[] for _ in units]

    def measure(self, x: Tensor) -> tuple[Tensor, ...]:
        """One pass in eval mode, one in training mode, of a batch of network input; returns it at
        the boundaries 1 .. L."""
        outputs = self._eval_pass(x)
        self._train_pass(x)
        return outputs

    def _eval_pass(self, x: Tensor) -> tuple[Tensor, ...]:
        self.whole.eval()
        outputs = []
        x = canonical(x)
        for unit, times in zip(self.units, self.forward, strict=True):
            mark = self.moments.now()
            x = self._eval(unit, x)
            times.append((mark, self.moments.now()))
            outputs.append(x)
        return tuple(outputs[:-1])

    def _eval(self, unit: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self.device, self.dtype):
            return canonical(unit(x))

    def _train_pass(self, x: Tensor) -> None:
        self.whole.train()
        for number, (unit, times) in enumerate(zip(self.units, self.train, strict=True)):
            # The first unit's input takes no gradient, in training neither.
            x = x.detach().requires_grad_(number > 0)
            last = number == len(self.units) - 1
            mark = self.moments.now()
            x = self._train(unit, x, last)
            times.append((mark, self.moments.now()))

    def _train(self, unit: nn.Module, x: Tensor, last: bool) -> Tensor:
        with autocast(self.device, self.dtype):
            y = unit(x)
        if last:
            labels = torch.zeros(len(y), dtype=torch.int64, device=y.device)
            F.cross_entropy(y.float(), labels).backward()
        elif y.requires_grad:
            y.backward(torch.full_like(y, 1e-3))
        return y

    def step_seconds(self) -> float:
        """Seconds of an optimiser step on the gradients that are there."""
        parameters = [p for p in self.whole.parameters() if p.grad is not None]
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.SGD(parameters, lr=1e-9, momentum=0.9, nesterov=True, fused=fused)
        times = [_timed(self.device, optimizer.step)[1] for _ in range(3)]
        return min(times)

    def medians(self, rows: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Seconds a row of each unit, training and forward; the first pass is not counted."""

        def middle(times: Sequence[tuple[Any, Any]]) -> float:
            seconds = [self.moments.seconds(*marks) for marks in times]
            return statistics.median(seconds[1:] or seconds) / rows

        return tuple(map(middle, self.train)), tuple(map(middle, self.forward))


def _boundary(
    y: Tensor, stored: str | None, codecs: Sequence[str], device: torch.device
) -> Boundary:
    """What storing a boundary's rows takes, tried on a batch of them."""
    encoding = Encoding.of(y, stored)
    encoded, encode = _timed(device, lambda: encoding.encode(y))
    plain = as_array(encoded)
    held, room = encoding.empty(len(y), plain.shape[1:])
    room[:] = plain.reshape(len(y), -1).view(np.uint8)
    _, decode = _timed(device, lambda: encoding.decode(held, device))
    lossless = encoding == Encoding.of(y, None)
    few = plain[: max(CODEC_BYTES // max(plain[0].nbytes, 1), 1)]
    return Boundary(
        row_shape=tuple(plain.shape[1:]),
        dtype=plain.dtype.name,
        # Copying is part of what writing and reading take.
        encode=0.0 if lossless else encode / len(y),
        decode=0.0 if lossless else decode / len(y),
        codecs={name: _try_codec(name, few) for name in codecs},
        lossy=not lossless,
    )


def _try_codec(name: str, rows: Any) -> CodecCost:
    codec = codec_for(name, rows.dtype.name)
    mark = time.perf_counter()
    encoded = codec.encode(rows)
    encode = time.perf_counter() - mark
    out = np.empty(rows.nbytes, np.uint8)
    mark = time.perf_counter()
    codec.decode(encoded, out)
    decode = time.perf_counter() - mark
    return CodecCost(len(encoded) / rows.nbytes, encode / rows.nbytes, decode / rows.nbytes)
