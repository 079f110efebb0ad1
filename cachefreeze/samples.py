"""A look at a few of a store's rows: their values, and what codecs would make of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachefreeze.encoding import Encoding, as_array
from cachefreeze.store import CODECS, Description, StoreError, encoded_bytes, open_store

# Chunks that are read, but no more of them than make so many bytes; and rows that are looked at.
CHUNKS, CHUNK_BYTES, ROWS = 4, 2**26, 256
SEED = 0
BINS = 10


@dataclass(frozen=True)
class Sample:
    """Rows of a store, drawn by a fixed seed.

    Args:
        description: of the store.
        chunks: arrays as they are stored, whole chunks of one split each, (rows, *row_shape).
        x: some of their rows as those who train get them, (n, ...), on the CPU.
    """

    description: Description
    chunks: tuple[NDArray[Any], ...]
    x: Tensor


@dataclass(frozen=True)
class Values:
    """What the numbers in a sample are.

    Args:
        rows, numbers: that were looked at.
        nan, infinite, zeros: how many of the numbers are that.
        low, high, mean, deviation: of the finite ones; None if there are none.
        edges, counts: a histogram of the finite ones that are not 0: `len(counts) + 1` edges.
    """

    rows: int
    numbers: int
    nan: int
    infinite: int
    zeros: int
    low: float | None
    high: float | None
    mean: float | None
    deviation: float | None
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, sample: Sample) -> "Values":
        numbers = sample.x.double().numpy().reshape(-1)
        finite = numbers[np.isfinite(numbers)]
        known = len(finite) > 0
        others = finite[finite != 0]
        counts, edges = np.histogram(others, BINS) if len(others) else (np.zeros(0, int), ())
        return cls(
            rows=len(sample.x),
            numbers=numbers.size,
            nan=int(np.isnan(numbers).sum()),
            infinite=int(np.isinf(numbers).sum()),
            zeros=len(finite) - len(others),
            low=float(finite.min()) if known else None,
            high=float(finite.max()) if known else None,
            mean=float(finite.mean()) if known else None,
            deviation=float(finite.std()) if known else None,
            edges=tuple(map(float, edges)),
            counts=tuple(map(int, counts)),
        )


@dataclass(frozen=True)
class Encoded:
    """What a store would take.

    Args:
        option: of the command line, that asks for it.
        bytes: of all chunk files, as far as the sample tells.
        error: of ways that lose precision, root mean square of the difference as a share of that
            of the values; None if nothing is lost.
    """

    option: str
    bytes: int
    error: float | None = None


def sample(folder: Path, seed: int = SEED) -> Sample:
    """Rows of the store in `folder`, from a few chunks that are drawn with `seed`.

    Raises:
        StoreError: it is not complete, not one of ours, or no chunk that was drawn is as it was
            written.
    """
    try:
        store = open_store(folder.parent, folder.name)
    except OSError as error:
        raise StoreError("it is being written") from error
    if store is None:
        raise StoreError("it is not complete")
    try:
        about, random = store.description, np.random.default_rng(seed)
        places = [(name, n) for name, split in about.splits.items() for n in range(split.chunks)]
        size = max(split.chunk_bytes for split in about.splits.values())
        count = max(min(CHUNKS, CHUNK_BYTES // max(size, 1), len(places)), 1)
        drawn = sorted(random.choice(len(places), count, replace=False))
        chunks = []
        for name, number in (places[index] for index in drawn):
            rows, layout = store.readers[name].chunk(number), about.splits[name]
            chunks.append(rows.view(layout.dtype).reshape(len(rows), *layout.row_shape))
    except OSError as error:
        raise StoreError(str(error)) from error
    finally:
        store.close()
    rows = np.concatenate(chunks)
    rows = rows[np.sort(random.choice(len(rows), min(ROWS, len(rows)), replace=False))]
    return Sample(about, tuple(chunks), _decoded(rows, Encoding.described(about)))


def encodings(sample: Sample) -> list[Encoded]:
    """What the store would take in every way there is, the raw one first; ways that lose precision
    only for rows that have not lost any."""
    about = sample.description
    plain = sum(split.rows * split.row_bytes for split in about.splits.values())
    held = sum(chunk.nbytes for chunk in sample.chunks)
    found = []
    for codec in CODECS:
        encoded = sum(encoded_bytes(chunk, codec) for chunk in sample.chunks)
        found.append(Encoded(f"--cache-codec {codec}", round(plain * encoded / max(held, 1))))
    if not about.lossy and sample.x.dtype.is_floating_point:
        for option, stored in (("--cache-dtype bf16", "bfloat16"), ("--cache-codec int8", "int8")):
            found += _rounded(option, stored, sample)
    return found


def _rounded(option: str, stored: str, sample: Sample) -> Sequence[Encoded]:
    """Nothing if it would be stored in its own type all the same."""
    about, encoding = sample.description, Encoding.of(sample.x, stored)
    if encoding.stored == about.stored:
        return ()
    rows = as_array(encoding.encode(sample.x))
    numbers = sum(split.rows * prod(split.row_shape) for split in about.splits.values())
    finite = sample.x.isfinite()
    exact, kept = (x[finite].double() for x in (sample.x, _decoded(rows, encoding)))
    size = float(exact.square().sum().sqrt())
    error = float((kept - exact).square().sum().sqrt()) / size if size else 0.0
    return (Encoded(option, numbers * rows.itemsize, error),)


def _decoded(rows: NDArray[Any], encoding: Encoding) -> Tensor:
    stored, room = encoding.empty(len(rows), rows.shape[1:])
    room[:] = rows.reshape(len(rows), -1).view(np.uint8)
    return encoding.decode(stored, torch.device("cpu"))
