"""Runs a loop in several processes: plainly, with caches in memory, and with one directory.

Arguments: name of the loop, number of processes, empty folder. Each process leaves what it has seen
in a file there.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import cachefreeze

from . import loops


def digest(model: torch.nn.Module) -> str:
    """Returns a hash of everything that the model holds."""
    content = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        content.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return content.hexdigest()


def wait_for_segments(directory: Path, processes: int) -> None:
    """Waits for the rows of each process, so that a slow disk does not decide a test."""
    end = time.monotonic() + 3
    while time.monotonic() < end:
        sets = [one for one in directory.iterdir() if one.is_dir() and len(one.name) == 32]
        if sets and all(len(list(one.glob("[0-9a-f]*"))) >= processes for one in sets):
            return
        time.sleep(0.01)


def damage(directory: Path) -> None:
    """Removes one segment of each set, and cuts the files of another one."""
    for one in directory.iterdir():
        segments = [found for found in one.glob("[0-9a-f]*") if found.is_dir()]
        if segments:
            shutil.rmtree(segments.pop())
        for file in segments[0].rglob("c.*") if segments else ():
            if file.is_file():
                os.truncate(file, file.stat().st_size // 2)


def train(name: str, where: str, directory: Path) -> dict[str, Any]:
    """Trains once.

    Args:
        name: Name of the loop.
        where: "plain" for no cache, "memory", "directory", or "damaged" for the same directory,
            whose files are lost or broken before the loop and while it runs.
        directory: Directory of the cache.
    """
    make, loop = loops.LOOPS[name]
    torch.manual_seed(0)
    model, cache, shared = make(), None, None
    if where != "plain":
        shared = None if where == "memory" else directory
        cache = cachefreeze.ActivationCache(model, directory=shared)
    served: list[int] = []

    def before(epoch: int) -> None:
        if cache is not None:
            served.append(cache.stats.rows_served)
        if where == "directory" and epoch >= 2:
            wait_for_segments(directory, dist.get_world_size())
        if where == "damaged" and epoch in (0, 2):
            if dist.get_rank() == 0:
                damage(directory)
            dist.barrier()

    loop(model, before)
    ran, loops.collectives = loops.collectives, 0
    found: dict[str, Any] = {"weights": digest(model), "collectives": ran}
    if cache is not None:
        served.append(cache.stats.rows_served)
        found["served"] = [after - start for start, after in itertools.pairwise(served)]
        found |= {"messages": list(cache.messages), "computed": cache.stats.rows_computed}
        cache.close()
    return found


def work(rank: int, name: str, processes: int, folder: Path) -> None:
    """Trains in one of the processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=processes)
    runs = ("plain", "memory", "directory", "damaged")
    found = {where: train(name, where, folder / "rows") for where in runs}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    loop, count, to = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    mp.start_processes(work, (loop, count, to), nprocs=count, start_method="fork")
