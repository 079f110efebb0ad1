"""Times reading random rows from a directory of kept rows, and other ways to read them.

    python scripts/benchmark_read.py [--rows 4096] [--row-kib 128] [--batch 128] [--dir .]

All ways take turns, with a warm page cache. Figures are medians, as shares of the speed of
`index_select(out=)` in memory.
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

from cachefreeze.segments import Directory, Row

BASE = "a tensor in memory, index_select(out=)"


def measure(folder: Path, rows: int, row_kib: float, batch: int, repeats: int) -> list[str]:
    """Writes rows, reads batches of them in all ways, and returns the lines of a table."""
    random = np.random.default_rng(0)
    width = int(row_kib * 256)
    values = random.standard_normal((rows, width), dtype=np.float32)
    keys = random.integers(0, 2**63, (rows, 2), dtype=np.uint64)
    with_keys = Directory(folder / "cache", None)
    written = with_keys.rows(b"0" * 16, Row((width,), "float32"), {})
    for start in range(0, rows, batch):
        part = values[start : start + batch].view(np.uint8)
        written.append(keys[start : start + batch], part)
    with_keys.close()
    directory = Directory(folder / "cache", None)
    kept = directory.rows(b"0" * 16, Row((width,), "float32"), {})
    np.save(folder / "plain.npy", values)
    plain = np.load(folder / "plain.npy", mmap_mode="r")
    memory = torch.from_numpy(values)
    out = torch.empty((batch, width))
    flat = out.view(torch.uint8).numpy()

    def from_directory(chosen: np.ndarray) -> None:
        assert kept.read(kept.find(keys[chosen]), flat).all()

    def from_memory(chosen: np.ndarray) -> None:
        torch.index_select(memory, 0, torch.from_numpy(chosen), out=out)

    def from_npy(chosen: np.ndarray) -> None:
        out.numpy()[:] = plain[chosen]

    ways: dict[str, Callable[[np.ndarray], None]] = {
        BASE: from_memory,
        "the directory, rows found by their keys": from_directory,
        "one .npy map, indexed by numpy": from_npy,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        chosen = random.integers(0, rows, batch)
        for name, way in ways.items():
            began = time.perf_counter()
            way(chosen)
            seconds[name].append(time.perf_counter() - began)
        from_directory(chosen)
        assert np.array_equal(out.numpy(), values[chosen]), "the directory gave other rows"
    directory.close()
    base = statistics.median(seconds[BASE])
    lines = [f"| {batch} random rows of {row_kib:g} KiB | share |", "|---|---|"]
    lines += [f"| {name} | {base / statistics.median(t):.2f} |" for name, t in seconds.items()]
    return lines


def main() -> int:
    """Measures and prints a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096, metavar="N", help="number of rows")
    parser.add_argument("--row-kib", type=float, default=128, metavar="KIB", help="size of a row")
    parser.add_argument(
        "--batch", type=int, default=128, metavar="N", help="number of rows in a batch"
    )
    parser.add_argument("--repeats", type=int, default=200, metavar="N", help="number of batches")
    parser.add_argument("--dir", type=Path, default=Path(), help="folder for the files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        sizes = (args.rows, args.row_kib, args.batch, args.repeats)
        print("\n".join(measure(Path(folder), *sizes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
