"""Takes one step on a batch of 7 rows in 3 processes.

Argument: folder for the parameters and the loss of each process.
"""

import os
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from cachefreeze.training.launch import launch_of
from cachefreeze.training.ranks import Ranks, wrapped
from cachefreeze.training.step import take_step


def step(ranks: Ranks) -> dict[str, Tensor]:
    """Returns the parameters after one step, and the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, labels = torch.randn(7, 4), torch.randint(3, (7,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    part = torch.from_numpy(ranks.part(torch.arange(7).numpy()))
    weight = len(part) * ranks.count / 7
    net = wrapped(model, ranks)
    loss = ranks.mean(take_step(net, optimizer, x[part], labels[part], None, weight))
    return {**model.state_dict(), "loss": loss}


def work(rank: int, folder: Path) -> None:
    """Takes the step in one of the processes."""
    place = {"RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
    os.environ.update({name: str(value) for name, value in place.items()})
    ranks = Ranks(launch_of(os.environ))
    torch.save(step(ranks), folder / f"{rank}.pt")
    ranks.close()


if __name__ == "__main__":
    mp.start_processes(work, (Path(sys.argv[1]),), nprocs=3, start_method="fork")
