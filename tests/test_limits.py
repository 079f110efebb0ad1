"""Memory, open files and maps stay bounded, however large a store and however long a run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cachefreeze import PrefixCache, partition
from cachefreeze.models import build

from .conftest import Pixels

linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")


# A process of its own: limits are for good. RLIMIT_DATA bounds what is allocated; page cache and
# mapped files are not in it.
IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from torch import nn
from cachefreeze import PrefixCache, Units, batches_of, epoch_order

BOUND, SIZE = 32 * 2**20, 64

class Rows:
    identity = "computed on the way"

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def batches(self, order):
        for rows in order:
            x = torch.from_numpy(rows).float()[:, None, None, None]
            yield x.expand(-1, 1, SIZE, SIZE)

def memory(name):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(name)).split()[1]) * 1024

def train(count):
    folder = Path(sys.argv[1]) / str(count)
    cache = PrefixCache(units, {"train": Rows(count)}, batch_size=32, directory=folder)
    assert cache.materialize(1) is not None
    peak = 0
    for epoch in range(2):
        for x in cache.batches("train", batches_of(epoch_order(count, 0, epoch), 32)):
            units.run(x, 1)
            peak = max(peak, memory("RssAnon"))
    assert cache.rows_served == 2 * count
    assert list(cache.store.damage()) == []
    return cache.store.bytes, peak

torch.set_num_threads(1)
units = Units({"stem": nn.Conv2d(1, 2, 3, padding=1), "head": nn.Flatten()})
units.freeze(1)
train(64)  # whatever is allocated once
before = memory("RssAnon")
resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + BOUND, resource.RLIM_INFINITY))
size, peak = train(4096)
assert size >= 4 * BOUND, size
assert peak - before <= BOUND, (peak - before)
"""


@linux
def test_a_store_four_times_the_size_of_the_memory_limit_is_filled_and_trained_from(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@linux
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_hundred_materialisations_leave_no_files_and_maps_open(
    tmp_path: Path, codec: str
) -> None:
    units = partition(build("wrn", 3, depth=10, width=1).to(memory_format=torch.channels_last))
    units.freeze(4)
    inputs = {"train": Pixels(12, 1), "val": Pixels(5, 2)}
    cache = PrefixCache(units, inputs, batch_size=4, directory=tmp_path / "cache")

    def open_now() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(
            Path("/proc/self/maps").read_text().split("\n")
        )

    seen = []
    for number in range(100):
        if cache.boundary == 4:
            cache.leave()
        assert cache.materialize(cache.boundary + 1, codec) is not None
        for _ in cache.batches("train", [np.arange(4), np.arange(4, 12, 2)]):
            pass
        if number % 3 == 0:
            cache.release()  # as after a checkpoint
        seen.append(open_now())
    files, maps = zip(*seen, strict=True)
    assert max(files[20:]) <= max(files[:20])
    assert max(maps[20:]) <= max(maps[:20]) + 20
    cache.close()
    assert len(os.listdir("/proc/self/fd")) < files[-1]
