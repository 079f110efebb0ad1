"""What the planner needs to know, measured on the real device with the real network.

Everything happens on a copy of the network and with random numbers of its own: weights, running
statistics, gradients and all random state of the run stay as they are.
"""

import contextlib
import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachefreeze.device import autocast, free_memory
from cachefreeze.encoding import Encoding
from cachefreeze.models.units import Units, canonical, partition
from cachefreeze.planner import Costs, Keep
from cachefreeze.rows import PixelRows
from cachefreeze.store import CODECS, TRASH, Description, Layout, StoreWriter, codec_for

# Of the predicted run: what measuring may take; aimed below the promised hundredth.
SHARE = 0.008
# A pass in eval mode and one in training mode take as long as this many training steps.
PASS_STEPS = 1.4
MAX_PASSES = 6
# Of the share: what is left for the disk.
DISK_SHARE = 0.2
FIRST_SCRATCH_BYTES, MAX_SCRATCH_BYTES = 2**19, 256 * 2**20
# Rows of a boundary that codecs are tried on.
CODEC_BYTES = 2**20
# Of free memory: what the decoded rows of a compressed store may take.
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Boundary:
    """One boundary as measured: the shape and type of a stored row, seconds a row to make one of
    a tensor and back where that takes more than a copy, and what each codec makes of it."""

    row_shape: tuple[int, ...]
    dtype: str
    encode: float
    decode: float
    codecs: dict[str, "CodecCost"]


@dataclass(frozen=True)
class CodecCost:
    """Of one codec on one boundary: encoded bytes over plain ones, and seconds a plain byte."""

    ratio: float
    encode: float
    decode: float


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

    def costs(self, splits: Mapping[str, int], codec: str) -> Costs:
        """What the planner takes.

        Args:
            splits: rows of each split.
            codec: `raw`, `lz4`, `zstd`, or `auto`: raw, and the others where raw does not fit.
        """
        if self.problem is not None:
            return self._costs(())
        keeps = []
        if self.decode > 0:
            keep = self._keep(0, (self.pixel_bytes,), "uint8", splits)
            keeps.append(dataclasses.replace(keep, read=keep.read + self.normalize))
        for number, boundary in enumerate(self.boundaries, 1):
            raw = self._keep(number, boundary.row_shape, boundary.dtype, splits)
            raw = dataclasses.replace(
                raw, write=raw.write + boundary.encode, read=raw.read + boundary.decode
            )
            if codec in ("raw", "auto"):
                keeps.append(raw)
            names = [codec] if codec in boundary.codecs else []
            for name in boundary.codecs if codec == "auto" else names:
                compressed = self._compressed(raw, boundary, name, codec == "auto", splits)
                if compressed is not None:
                    keeps.append(compressed)
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
        self, boundary: int, shape: Sequence[int], dtype: str, splits: Mapping[str, int]
    ) -> Keep:
        layouts = [Layout.of(rows, shape, dtype) for rows in splits.values()]
        on_disk = sum(layout.bytes for layout in layouts) / sum(splits.values())
        plain = prod(shape) * np.dtype(dtype).itemsize
        return Keep(
            boundary,
            "raw",
            row_bytes=on_disk,
            write=plain * self.write,
            read=plain * self.read,
            verify=plain * self.verify,
        )

    def _compressed(
        self, raw: Keep, boundary: Boundary, codec: str, reserve: bool, splits: Mapping[str, int]
    ) -> Keep | None:
        """None if its rows would not fit into memory, from which they are served."""
        plain = prod(boundary.row_shape) * np.dtype(boundary.dtype).itemsize
        if plain * sum(splits.values()) > MEMORY_SHARE * free_memory():
            return None
        cost = boundary.codecs[codec]
        decode = plain * (cost.ratio * self.read + cost.decode)
        return dataclasses.replace(
            raw,
            codec=codec,
            row_bytes=raw.row_bytes * cost.ratio,
            write=plain * (cost.ratio * self.write + cost.encode) + boundary.encode,
            load=decode,
            verify=decode,
            reserve=reserve,
        )


def profile(
    model: nn.Sequential,
    inputs: PixelRows,
    pixels: Tensor,
    *,
    batch_size: int,
    row_passes: float,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    decode_seconds: float,
    directory: Path,
    max_bytes: float = float("inf"),
    stored: str | None = None,
    codec: str = "raw",
) -> Profile:
    """Measure a network and a disk.

    Args:
        model: of the run; a copy of it is trained for a few batches.
        inputs: knows the way from pixels to network input.
        pixels: uint8 (n, C, H, W), as many as a batch may have; they are used as often as needed.
        batch_size: of training.
        row_passes: training rows of the whole run, over all epochs; measuring takes about `SHARE`
            of the time that they take. Infinite measures as well as can be.
        decode_seconds: of an image, known from reading the data.
        directory: of the cache, prepared; a scratch store is written there and removed.
        max_bytes: that the scratch store may take.
        stored, codec: how activations are to be kept; only those codecs are tried.
    """
    start = time.perf_counter()
    rows, passes = _sample_size(batch_size, row_passes)
    pixels = pixels[torch.arange(rows) % len(pixels)]
    with _untouched_random_state(device):
        copied = copy.deepcopy(model)
        units = partition(copied)
        bench = _Bench(copied, units, device, autocast_dtype)
        x, normalize = _timed(device, lambda: inputs.from_pixels(pixels))
        for _ in range(passes):
            x, normalize = _timed(device, lambda: inputs.from_pixels(pixels))
            bench.measure(x)
        step = bench.step_seconds()
        codecs = CODECS[1:] if codec == "auto" else tuple({codec} & set(CODECS[1:]))
        boundaries = bench.boundaries(x, stored, codecs)
    spent = time.perf_counter() - start
    train, forward = bench.medians(rows)
    predicted = row_passes * sum(train)
    row = pixels[0].nelement()
    sizes = [prod(each.row_shape) * np.dtype(each.dtype).itemsize for each in boundaries]
    seconds = max(SHARE * predicted - spent, DISK_SHARE * SHARE * predicted)
    disk = _measure_disk(directory, int(statistics.median([row, *sizes])), max_bytes, seconds)
    return Profile(
        train=train,
        forward=forward,
        normalize=normalize / rows,
        decode=decode_seconds,
        step=step,
        boundaries=boundaries,
        pixel_bytes=row,
        write=disk.write,
        read=disk.read,
        verify=disk.verify,
        store=disk.store,
        problem=disk.problem,
        rows=rows,
        passes=passes,
        seconds=time.perf_counter() - start,
    )


def _sample_size(batch_size: int, row_passes: float) -> tuple[int, int]:
    """Rows a pass, and passes, the first of which is to warm up."""
    affordable = SHARE * (1 - DISK_SHARE) * row_passes / PASS_STEPS
    if affordable >= 3 * batch_size:
        return batch_size, int(min(affordable / batch_size, MAX_PASSES))
    # Smaller batches take longer a row; a run that short has little to lose or to win. Two rows at
    # least, for batch norm takes no statistics of a single value.
    return min(max(int(affordable / 3), 2), batch_size), 3


@contextlib.contextmanager
def _untouched_random_state(device: torch.device) -> Iterator[None]:
    """Dropout in the copy draws from the global generators: put back what they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


def _timed(device: torch.device, work: Any) -> tuple[Any, float]:
    """What `work` returns, and the seconds that it took."""
    _wait(device)
    mark = time.perf_counter()
    result = work()
    _wait(device)
    return result, time.perf_counter() - mark


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class _Bench:
    """Runs a network unit by unit, and keeps the times of every unit in every pass."""

    def __init__(
        self, model: nn.Module, units: Units, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self.model = model
        self.units = units
        self.device = device
        self.dtype = dtype
        self.forward: list[list[float]] = [[] for _ in units]
        self.train: list[list[float]] = [[] for _ in units]

    def measure(self, x: Tensor) -> None:
        """One pass in eval mode, one in training mode, of a batch of network input."""
        self._eval_pass(x)
        self._train_pass(x)

    def _eval_pass(self, x: Tensor) -> list[Tensor]:
        """Also the batch at the boundaries 1 .. L."""
        self.model.eval()
        outputs = []
        x = canonical(x)
        for unit, times in zip(self.units, self.forward, strict=True):
            x, seconds = _timed(self.device, lambda unit=unit, x=x: self._eval(unit, x))
            times.append(seconds)
            outputs.append(x)
        return outputs[:-1]

    def _eval(self, unit: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self.device, self.dtype):
            return canonical(unit(x))

    def _train_pass(self, x: Tensor) -> None:
        self.model.train()
        for number, (unit, times) in enumerate(zip(self.units, self.train, strict=True)):
            # The first unit's input takes no gradient, in training neither.
            x = x.detach().requires_grad_(number > 0)
            last = number == len(self.units) - 1
            x, seconds = _timed(self.device, lambda u=unit, x=x, last=last: self._train(u, x, last))
            times.append(seconds)

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
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        optimizer = torch.optim.SGD(parameters, lr=1e-9, momentum=0.9, nesterov=True)
        times = [_timed(self.device, optimizer.step)[1] for _ in range(3)]
        return min(times)

    def medians(self, rows: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Seconds a row of each unit, training and forward; the first pass is not counted."""

        def middle(times: Sequence[float]) -> float:
            return statistics.median(times[1:] or times) / rows

        return tuple(map(middle, self.train)), tuple(map(middle, self.forward))

    def boundaries(
        self, x: Tensor, stored: str | None, codecs: Sequence[str]
    ) -> tuple[Boundary, ...]:
        """Boundaries 1 .. L, and what storing their rows takes."""
        result = []
        for y in self._eval_pass(x):
            encoding = Encoding.of(y, stored)
            plain, encode = _timed(self.device, lambda y=y, e=encoding: e.encode(y))
            room, held = encoding.empty(len(y), plain.shape[1:])
            held[:] = plain.reshape(len(y), -1).view(np.uint8)
            _, decode = _timed(self.device, lambda r=room, e=encoding: e.decode(r, self.device))
            lossless = encoding.stored == encoding.of(y, None).stored
            few = plain[: max(CODEC_BYTES // max(plain[0].nbytes, 1), 1)]
            result.append(
                Boundary(
                    row_shape=tuple(plain.shape[1:]),
                    dtype=plain.dtype.name,
                    # Copying is part of what writing and reading take.
                    encode=0.0 if lossless else encode / len(y),
                    decode=0.0 if lossless else decode / len(y),
                    codecs={name: _try_codec(name, few) for name in codecs},
                )
            )
        return tuple(result)


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


@dataclass(frozen=True)
class _Disk:
    """Seconds a byte; `store` is seconds. `problem`: why nothing can be kept at all."""

    write: float = 0.0
    read: float = 0.0
    verify: float = 0.0
    store: float = 0.0
    problem: str | None = None


def _measure_disk(directory: Path, row_bytes: int, max_bytes: float, seconds: float) -> _Disk:
    """Write a scratch store into the cache's folder and read it, for about as long as given."""
    most = int(min(max_bytes, MAX_SCRATCH_BYTES)) // row_bytes
    few = min(max(FIRST_SCRATCH_BYTES // row_bytes, 1), most)
    if few < 1:
        return _Disk(problem="there is no room for anything")
    try:
        start = time.perf_counter()
        disk = _measure_scratch(directory, few, row_bytes)
    except OSError as error:
        return _Disk(problem=error.strerror or str(error))
    left = seconds - (time.perf_counter() - start)
    per_row = (disk.write + disk.read + disk.verify) * row_bytes
    rows = int(min(most, left / per_row))
    if rows > 2 * few:
        with contextlib.suppress(OSError):  # the disk is fuller than we may fill it
            disk = _measure_scratch(directory, rows, row_bytes)
    return disk


def _measure_scratch(directory: Path, rows: int, row_bytes: int) -> _Disk:
    # Named so that what a killed run leaves of it is removed with the rest of its rubbish.
    with tempfile.TemporaryDirectory(prefix=TRASH, dir=directory) as folder:
        layout = Layout.of(rows, (row_bytes,), "uint8")
        name = "0" * 32
        about = Description(name, "", 0, "", "uint8", "uint8", time.time(), {"train": layout}, {})
        content = np.random.default_rng(0).integers(0, 256, (min(rows, 64), row_bytes), np.uint8)
        mark = time.perf_counter()
        writer = StoreWriter(Path(folder), about)
        store_seconds = time.perf_counter() - mark
        try:
            mark = time.perf_counter()
            for start in range(0, rows, len(content)):
                writer.append("train", content[: rows - start])
            write = time.perf_counter() - mark
            mark = time.perf_counter()
            store = writer.commit()
        except BaseException:
            writer.abort()
            raise
        store_seconds += time.perf_counter() - mark
        try:
            mark = time.perf_counter()
            damage = next(store.damage(), None)
            verify = time.perf_counter() - mark
            if damage is not None:
                raise OSError(damage)
            order = np.random.default_rng(0).permutation(rows)
            mark = time.perf_counter()
            for batch in np.array_split(order, -(-rows // 64)):
                # Into new memory, as in training.
                store.readers["train"].read(batch, np.empty((len(batch), row_bytes), np.uint8))
            read = time.perf_counter() - mark
        finally:
            store.close()
    size = rows * row_bytes
    return _Disk(write / size, read / size, verify / size, store_seconds)
