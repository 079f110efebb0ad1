"""Time reading random rows from a store, beside other ways to read them.

    python scripts/benchmark_read.py [--rows 4096] [--row-kib 128] [--batch 128] [--dir .]

One store, one set of batches, all ways in turn, page cache warm; medians. Ratios to plain
`np.memmap` are what counts: the speed of a machine is its own.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zarr

from cachefreeze.store import Description, Layout, StoreWriter, prepare_cache_dir

BASE = "np.memmap of one plain file, row by row"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096, help="in the store (default: 4096)")
    parser.add_argument("--row-kib", type=int, default=128, help="bytes a row (default: 128 KiB)")
    parser.add_argument("--batch", type=int, default=128, help="rows a read (default: 128)")
    parser.add_argument("--repeats", type=int, default=30, help="batches (default: 30)")
    parser.add_argument("--dir", type=Path, help="where to put the store (default: temporary)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cachefreeze-read-", dir=args.dir) as folder:
        for line in compare(Path(folder), args.rows, args.row_kib, args.batch, args.repeats):
            print(line)
    return 0


def compare(folder: Path, rows: int, row_kib: int, batch: int, repeats: int) -> list[str]:
    """Markdown table of MB/s and of ratios to np.memmap."""
    random = np.random.default_rng(0)
    shape = (rows, 8, 8, row_kib * 4)
    values = random.random(shape, dtype=np.float32)
    prepare_cache_dir(folder)
    layout = Layout.of(rows, shape[1:], "float32")
    splits = {"train": layout}
    about = Description("0" * 32, "", 1, "", "float32", "float32", time.time(), splits, {})
    writer = StoreWriter(folder, about)
    for start in range(0, rows, batch):
        writer.append("train", values[start : start + batch])
    store = writer.commit()
    reader = store.readers["train"]
    array = zarr.open_group(store.folder, mode="r")["train"]
    assert isinstance(array, zarr.Array)
    values.tofile(folder / "plain")
    plain = np.memmap(folder / "plain", np.float32, "r", shape=shape)
    memory = torch.from_numpy(values)
    out = torch.empty((batch, *shape[1:]))
    flat = out.view(torch.uint8).flatten(1).numpy()

    def from_store(indices: np.ndarray) -> None:
        reader.read(indices, flat)

    def from_store_into_new_memory(indices: np.ndarray) -> None:
        fresh = torch.empty((batch, *shape[1:]))
        reader.read(indices, fresh.view(torch.uint8).flatten(1).numpy())

    def from_memmap(indices: np.ndarray) -> None:
        # Faster than np.take, which goes through a buffer, and than indexing the np.memmap itself,
        # which makes an object of its subclass for every row.
        view, target = np.asarray(plain), out.numpy()
        for position, row in enumerate(indices.tolist()):
            target[position] = view[row]

    def from_memory(indices: np.ndarray) -> None:
        torch.index_select(memory, 0, torch.from_numpy(indices), out=out)

    def from_zarr(indices: np.ndarray) -> None:
        array.oindex[indices]

    ways: dict[str, Callable[[np.ndarray], None]] = {
        BASE: from_memmap,
        "the store, into a buffer": from_store,
        "the store, into new memory (what training does)": from_store_into_new_memory,
        "a tensor in memory, index_select(out=)": from_memory,
        "zarr's own array.oindex": from_zarr,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        indices = random.integers(0, rows, batch)
        for name, way in ways.items():
            mark = time.perf_counter()
            way(indices)
            seconds[name].append(time.perf_counter() - mark)
        from_store(indices)
        assert np.array_equal(out.numpy(), values[indices]), "the store gave other rows"
    megabytes = batch * row_kib * 1024 / 1e6
    base = statistics.median(seconds[BASE])
    lines = [f"| {batch} random rows of {row_kib} KiB | MB/s | of np.memmap |", "|---|---|---|"]
    for name, times in seconds.items():
        median = statistics.median(times)
        lines.append(f"| {name} | {megabytes / median:,.0f} | {base / median:.2f} |")
    store.close()
    return lines


if __name__ == "__main__":
    sys.exit(main())
