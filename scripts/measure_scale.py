"""Measures a store of many rows: filling, opening, finding, an epoch in random order, memory.

    OMP_NUM_THREADS=1 python scripts/measure_scale.py [--rows 1300000] [--row-bytes 1536]
        [--chunk-rows N] [--readers 8] [--dir .]

Every measurement of a reader is made in a process of its own. With `--chunk-rows 27` chunks hold as
many rows as if these had 300 kB, so that the store has as many files as 1.3 million such rows.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from cachefreeze.store import Directory, Row, format

NAME, BATCH = b"0" * 16, 256


def keys_of(rows: int) -> np.ndarray:
    """Returns the keys of all rows: as random as hashes of content are, and always the same."""
    return np.random.default_rng(0).integers(0, 2**64, (rows, 2), dtype=np.uint64)


def fill(folder: Path, rows: int, row: Row) -> dict[str, float]:
    """Writes all rows, as a training run does."""
    began = time.perf_counter()
    directory = Directory(folder, None)
    kept, keys = directory.rows(NAME, row, {}), keys_of(rows)
    for first in range(0, rows, BATCH):
        last = min(first + BATCH, rows)
        values = np.random.default_rng(first).integers(0, 256, (last - first, row.nbytes), np.uint8)
        kept.append(keys[first:last], values)
    directory.close()
    seconds = time.perf_counter() - began
    return {"fill_s": seconds, "fill_mb_per_s": rows * row.nbytes / 1e6 / seconds}


def read(folder: Path, rows: int, row: Row, batches: int, queue: Any) -> None:
    """Opens the directory, finds and reads rows in random order, and reports the figures."""
    before = memory()
    began = time.perf_counter()
    directory = Directory(folder, None)
    kept = directory.rows(NAME, row, {})
    opened = time.perf_counter() - began
    used = memory() - before
    keys, order = keys_of(rows), np.random.default_rng(os.getpid()).permutation(rows)
    out = np.empty((BATCH, row.nbytes), dtype=np.uint8)
    find, load = [], []
    for start in range(0, min(batches * BATCH, rows - BATCH), BATCH):
        wanted = keys[order[start : start + BATCH]]
        began = time.perf_counter()
        places = kept.find(wanted)
        found = time.perf_counter()
        good = kept.read(places, out)
        load.append(time.perf_counter() - found)
        find.append(found - began)
        assert good.all(), "a row is gone"
    queue.put(
        {
            "rows_found": len(kept),
            "open_s": opened,
            "memory_bytes_per_row": used / rows,
            "find_us_per_row": 1e6 * statistics.median(find) / BATCH,
            "read_us_per_row": 1e6 * statistics.median(load) / BATCH,
            "read_mb_per_s": len(load) * BATCH * row.nbytes / 1e6 / sum(load),
        }
    )
    directory.close()


def memory() -> int:
    """Returns the memory of this process on Linux, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def run_readers(count: int, *args: Any) -> list[dict[str, float]]:
    """Runs readers at the same time. Returns the figures of each."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    readers = [context.Process(target=read, args=(*args, queue)) for _ in range(count)]
    for one in readers:
        one.start()
    figures = [queue.get() for _ in readers]
    for one in readers:
        one.join()
    return figures


def show(name: str, figures: list[dict[str, float]]) -> None:
    for key in figures[0]:
        values = [one[key] for one in figures]
        spread = f"  ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
        print(f"{name:12s} {key:22s} {statistics.median(values):.4g}{spread}", flush=True)


def main() -> int:
    """Measures, and prints one figure a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_300_000)
    parser.add_argument("--row-bytes", type=int, default=1536)
    parser.add_argument("--chunk-rows", type=int, help="Rows of a chunk. Default: as usual.")
    parser.add_argument("--readers", type=int, default=8, help="Processes that read at once.")
    parser.add_argument("--batches", type=int, default=2000, help="Batches that each one reads.")
    parser.add_argument("--dir", type=Path, default=Path("."), help="Folder for the store.")
    parser.add_argument("--json", type=Path, help="File for the figures.")
    args = parser.parse_args()
    row = Row((args.row_bytes,), "uint8")
    size = format.CHUNK_BYTES if args.chunk_rows is None else args.chunk_rows * args.row_bytes
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="scale-") as name:
        folder = Path(name)
        with patch.object(format, "CHUNK_BYTES", size):
            results = {"filling": [fill(folder, args.rows, row)]}
        show("filling", results["filling"])
        common = (folder, args.rows, row)
        results["one reader"] = run_readers(1, *common, args.batches)
        show("one reader", results["one reader"])
        results["at once"] = run_readers(args.readers, *common, args.batches // args.readers)
        show(f"{args.readers} at once", results["at once"])
        files = sum(len(names) for _, _, names in os.walk(folder))
        print(f"files        {files}")
    if args.json is not None:
        args.json.write_text(json.dumps({**vars(args), **results}, default=str, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
