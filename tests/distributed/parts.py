"""Takes some steps on a batch of 7 rows in 3 processes.

Arguments: folder for the parameters and the loss of each process, and a port.
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


class Network(nn.Module):
    """Layers that are not in the order in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.last, self.first = nn.Linear(99, 99), nn.Linear(99, 3), nn.Linear(4, 99)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


def train(ranks: Ranks, steps: int, resumed: bool = False) -> dict[str, Tensor]:
    """Returns the parameters after some steps, and the last loss.

    Args:
        ranks: Processes that train together.
        steps: Number of steps.
        resumed: Whether the network is wrapped anew before the last step.
    """
    torch.manual_seed(0)
    model = Network()
    x, labels = torch.randn(7, 4), torch.randint(3, (7,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    part = torch.from_numpy(ranks.part(torch.arange(7).numpy()))
    weight = len(part) * ranks.count / 7
    net = wrapped(model, ranks)
    for step in range(steps):
        if resumed and step == steps - 1:
            del net
            net = wrapped(model, ranks)
        loss = ranks.mean(take_step(net, optimizer, x[part], labels[part], None, weight))
    return {**model.state_dict(), "loss": loss}


def work(rank: int, folder: Path) -> None:
    """Takes the steps in one of the processes."""
    place = {"RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
    os.environ.update({name: str(value) for name, value in place.items()})
    ranks = Ranks(launch_of(os.environ))
    found = {"step": train(ranks, 1), "whole": train(ranks, 4), "resumed": train(ranks, 4, True)}
    torch.save(found, folder / f"{rank}.pt")
    ranks.close()


if __name__ == "__main__":
    mp.start_processes(work, (Path(sys.argv[1]),), nprocs=3, start_method="fork")
