"""Times reading random rows that were kept before, beside other ways to read them.

    python scripts/benchmark_read.py [--rows 4096] [--row-kib 128] [--batch 128] [--dir .]

Warm: medians over batches, every way with rows of its own, as shares of `index_select(out=)` in
memory. Cold: all rows once in random order, with nothing of the files in the page cache, as a share
of reading the files from front to back. LMDB stands in the table if it is installed.
"""

import argparse
import functools
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import zarr

from cachefreeze.cache.entries import Entries
from cachefreeze.store import Directory

# What takes the numbers of rows, and returns what reads them: only this second step is timed.
Way = Callable[[np.ndarray], Callable[[], object]]
BASE = "a tensor in memory, `index_select(out=)`"
NAME = b"0" * 16
# zarr reads whole chunks: one batch takes seconds.
SLOW_REPEATS = 5


class Kept:
    """Rows in a directory, read as the cache reads them: found by their keys, then copied.

    Args:
        folder: Directory that holds them.
        values: The same rows.
        keys: Their keys.
        max_bytes: Largest number of bytes of them in memory.
    """

    def __init__(self, folder: Path, values: np.ndarray, keys: np.ndarray, max_bytes: int) -> None:
        self.entries = Entries(max_bytes, Directory(folder, None))
        device = torch.device("cpu")
        table = self.entries.open(NAME, (values.shape[1],), torch.float32, device, {})
        assert table is not None
        self.table, self.values, self.keys = table, values, keys

    def write(self, batch: int) -> None:
        """Writes all rows, and closes the directory."""
        for start in range(0, len(self.values), batch):
            part = slice(start, start + batch)
            self.entries.write(NAME, self.keys[part], torch.from_numpy(self.values[part]))
        self.entries.close()

    def find(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns keys of rows, and their places."""
        keys = self.keys[chosen]
        return keys, self.table.find(keys)

    def read(self, keys: np.ndarray, places: np.ndarray) -> torch.Tensor:
        """Returns rows."""
        self.entries.now += 1
        rows = self.entries.read(NAME, keys, places)
        assert rows is not None, "a row is gone"
        return rows

    def rows(self, chosen: np.ndarray) -> torch.Tensor:
        """Returns rows, found by their keys."""
        return self.read(*self.find(chosen))


def forget(folder: Path) -> int:
    """Drops all files below a folder from the page cache. Returns their bytes."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            total += os.fstat(file).st_size
            os.close(file)
    return total


def from_front_to_back(folder: Path) -> float:
    """Returns the seconds of reading all chunks, a megabyte at a time."""
    buffer = memoryview(bytearray(2**20))
    began = time.perf_counter()
    for path in sorted(folder.rglob("values/c.*")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def _by_number(function: Callable[[np.ndarray], object]) -> Way:
    return lambda chosen: functools.partial(function, chosen)


def others(folder: Path, values: np.ndarray, out: torch.Tensor) -> Iterator[tuple[str, Way]]:
    """Yields other ways to read rows."""
    np.save(folder / "plain.npy", values)
    plain = np.load(folder / "plain.npy", mmap_mode="r")

    def from_npy(chosen: np.ndarray) -> None:
        out.numpy()[:] = plain[chosen]

    yield "one .npy map, indexed by numpy", _by_number(from_npy)
    array = zarr.create_array(
        folder / "plain.zarr",
        shape=values.shape,
        chunks=(max(2**23 // values[0].nbytes, 1), values.shape[1]),
        dtype="float32",
        compressors=None,
    )
    array[:] = values

    def from_zarr(chosen: np.ndarray) -> None:
        out.numpy()[:] = array.oindex[chosen]

    yield "zarr `oindex`, 8 MiB chunks", _by_number(from_zarr)
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        pass
    else:
        made = datasets.Dataset.from_dict({"row": values})
        made.save_to_disk(folder / "arrow", num_proc=None)
        arrow = datasets.load_from_disk(folder / "arrow").with_format("torch")

        def from_arrow(chosen: np.ndarray) -> None:
            torch.stack(tuple(arrow[chosen]["row"]), out=out)

        yield "Hugging Face datasets (Arrow)", _by_number(from_arrow)
    try:
        lmdb = importlib.import_module("lmdb")
    except ImportError:
        return
    environment = lmdb.open(str(folder / "lmdb"), map_size=4 * values.nbytes + 2**24)
    with environment.begin(write=True) as transaction:
        for number, row in enumerate(values):
            transaction.put(b"%d" % number, row.tobytes())

    def from_lmdb(chosen: np.ndarray) -> None:
        with environment.begin(buffers=True) as transaction:
            for place, number in enumerate(chosen.tolist()):
                found = transaction.get(b"%d" % number)
                out.numpy()[place] = np.frombuffer(found, dtype=np.float32)

    yield "LMDB", _by_number(from_lmdb)


def warm(folder: Path, values: np.ndarray, keys: np.ndarray, batch: int, repeats: int) -> list[str]:
    """Returns a table of all ways, once everything was read before."""
    random = np.random.default_rng(1)
    out = torch.empty((batch, values.shape[1]))
    memory = torch.from_numpy(values)

    def from_memory(chosen: np.ndarray) -> None:
        torch.index_select(memory, 0, torch.from_numpy(chosen), out=out)

    in_memory = Kept(folder / "cache", values, keys, 2 * values.nbytes + 2**28)
    on_disk = Kept(folder / "cache", values, keys, 0)

    def read(kept: Kept) -> Way:
        return lambda chosen: functools.partial(kept.read, *kept.find(chosen))

    ways: dict[str, Way] = {
        BASE: _by_number(from_memory),
        "cachefreeze, rows that have room in memory": read(in_memory),
        "the same, found by their keys": _by_number(in_memory.rows),
        "cachefreeze, rows that have none, from the files": read(on_disk),
        "the same, found by their keys, from the files": _by_number(on_disk.rows),
    }
    ways |= dict(others(folder, values, out))
    for kept in (in_memory, on_disk):
        for some in np.array_split(random.permutation(len(values)), max(len(values) // batch, 1)):
            assert np.array_equal(kept.rows(some).numpy(), values[some]), "other rows"
    assert len(in_memory.table) == len(values), "not all rows have come into memory"
    assert len(on_disk.table) == 0
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            if "zarr" in name and repeat >= SLOW_REPEATS:
                continue
            # Not the rows of the way before, which lie in the processor's cache.
            chosen = random.integers(0, len(values), batch)
            function = way(chosen)
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    in_memory.entries.close()
    on_disk.entries.close()
    base = statistics.median(seconds[BASE])
    head = f"{batch} random rows of {values[0].nbytes / 1024:g} KiB, warm"
    lines = [f"| {head} | share |", "|---|---|"]
    lines += [f"| {name} | {base / statistics.median(t):.3g} |" for name, t in seconds.items()]
    return [*lines, f"A batch from memory takes {base * 1e6:.0f} us."]


def cold(folder: Path, values: np.ndarray, keys: np.ndarray, batch: int, rounds: int) -> list[str]:
    """Returns a table of whole epochs that begin with nothing in the page cache."""
    random = np.random.default_rng(2)
    ways = {"rows that have room in memory": 2 * values.nbytes + 2**28, "rows that have none": 0}
    shares: dict[str, list[float]] = {name: [] for name in ways}
    rates = []
    for _ in range(rounds):
        for name, max_bytes in ways.items():
            nbytes = forget(folder / "cache")
            straight = from_front_to_back(folder / "cache")
            forget(folder / "cache")
            began = time.perf_counter()
            kept = Kept(folder / "cache", values, keys, max_bytes)
            order = random.permutation(len(values))
            for some in np.array_split(order, max(len(values) // batch, 1)):
                kept.rows(some)
            seconds = time.perf_counter() - began
            kept.entries.close()
            shares[name].append(straight / seconds)
            rates.append(nbytes / straight / 1e6)
    lines = ["| an epoch in random order, cold | share of front to back |", "|---|---|"]
    for name, share in shares.items():
        spread = f"{min(share):.2f} to {max(share):.2f}"
        lines.append(f"| cachefreeze, {name} | {statistics.median(share):.2f} ({spread}) |")
    found = f"{statistics.median(rates):.0f} MB/s ({min(rates):.0f} to {max(rates):.0f})"
    return [*lines, f"From front to back: {found}."]


def main() -> int:
    """Measures and prints tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096, metavar="N", help="number of rows")
    parser.add_argument("--row-kib", type=float, default=128, metavar="KIB", help="size of a row")
    parser.add_argument(
        "--batch", type=int, default=128, metavar="N", help="number of rows in a batch"
    )
    parser.add_argument(
        "--repeats", type=int, default=200, metavar="N", help="number of warm batches"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="number of cold epochs")
    parser.add_argument("--dir", type=Path, default=Path(), help="folder for the files")
    args = parser.parse_args()
    random = np.random.default_rng(0)
    values = random.standard_normal((args.rows, int(args.row_kib * 256)), dtype=np.float32)
    keys = random.integers(0, 2**63, (args.rows, 2), dtype=np.uint64)
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        Kept(folder / "cache", values, keys, 0).write(args.batch)
        print("\n".join(cold(folder, values, keys, args.batch, args.rounds)), end="\n\n")
        print("\n".join(warm(folder, values, keys, args.batch, args.repeats)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
