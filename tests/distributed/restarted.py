"""A script for torchrun that goes on with its last checkpoint. One process may kill itself once.

Arguments: folder, and "plain", "cached" or "killed".
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import cachefreeze
from tests.distributed.loops import EPOCHS, Classifier, loader


def main(folder: Path, how: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.05, momentum=0.9)
    saved, first = folder / f"{how}.pt", 0
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    wrapped = DistributedDataParallel(model)
    if how != "plain":
        cache = cachefreeze.ActivationCache(model, directory=folder / "rows")
    batches = loader()
    for epoch in range(first, EPOCHS):
        batches.sampler.set_epoch(epoch)
        for step, (x, labels) in enumerate(batches):
            loss = F.cross_entropy(wrapped(x), labels[:, 0, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if how == "killed" and not first and dist.get_rank() and (epoch, step) == (2, 5):
                os.kill(os.getpid(), signal.SIGKILL)
        if dist.get_rank() == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "epoch": epoch + 1}, folder / "new.pt")
            (folder / "new.pt").replace(saved)
        dist.barrier()
    if how != "plain":
        print(f"rank {dist.get_rank()} began at {first}: {cache.stats.rows_served} rows served")
        cache.close()
    dist.destroy_process_group()


def fork(rank: int, folder: Path, how: str, port: str) -> None:
    """Runs one process without torchrun, which takes seconds to start."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    main(folder, how)


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(Path(sys.argv[1]), sys.argv[2])
    else:
        arguments = (Path(sys.argv[1]), *sys.argv[2:])
        mp.start_processes(fork, arguments, nprocs=2, start_method="fork")
