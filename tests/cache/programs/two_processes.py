"""DistributedDataParallel with two processes, each with a cache of its own."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import cachefreeze


def work(rank: int, port: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(96, 3, 32, 32), torch.arange(96) % 10)
    sampler = DistributedSampler(data, seed=1)
    loader = DataLoader(data, 8, sampler=sampler)
    model = torchvision.models.resnet18(num_classes=10)
    cachefreeze.freeze(*[part for name, part in model.named_children() if name != "fc"])
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.1, momentum=0.9)
    cache = cachefreeze.ActivationCache(model)
    for epoch in range(6):
        sampler.set_epoch(epoch % 2)
        for x, y in loader:
            loss = F.cross_entropy(wrapped(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if rank == 0:
        print("weights", model.fc.weight.detach().double().sum().item())
        print(cache)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1] if len(sys.argv) > 1 else "29531",), nprocs=2)
