"""Trains a head that lies in pieces on two processes (FSDP2), on a frozen body that is whole.

Argument: an empty folder. Each process leaves what it has seen in a file there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import cachefreeze
from cachefreeze.cache import selection
from cachefreeze.plan import overhead

from .loops import EPOCHS, Classifier, loader
from .ranks import wait_for_segments

PROCESSES = 2


def train(directory: Path | None, whole: bool) -> dict[str, Any]:
    """Trains once.

    Args:
        directory: Directory of the cache, or None for no cache.
        whole: Whether the body is whole. If not, it lies in pieces, too.
    """
    torch.manual_seed(0)
    model = Classifier()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    fully_shard(model.head, mesh=mesh)
    if not whole:
        fully_shard(model.body, mesh=mesh)
    cache = None if directory is None else cachefreeze.ActivationCache(model, directory=directory)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.05, momentum=0.9)
    batches = loader()
    for epoch in range(EPOCHS):
        batches.sampler.set_epoch(epoch)
        if whole and directory is not None and epoch >= 2:
            wait_for_segments(directory, PROCESSES)
        for x, labels in batches:
            loss = F.cross_entropy(model(x), labels[:, 0, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    weights = [one.full_tensor().tolist() for one in model.head.parameters()]
    seen: dict[str, Any] = {"weights": weights}
    if cache is not None:
        cache.close()
        seen |= {"served": cache.stats.rows_served, "messages": list(cache.messages)}
    return seen


def work(rank: int, folder: Path) -> None:
    """Trains in one of the processes."""
    torch.set_num_threads(1)
    overhead._FREE_SECONDS, selection.LEAST_SHARE = float("inf"), 0.0
    dist.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=PROCESSES)
    seen = {
        "plain": train(None, True),
        "cached": train(folder / "rows", True),
        "pieces": train(folder / "no rows", False),
    }
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(work, (Path(sys.argv[1]),), nprocs=PROCESSES, start_method="fork")
