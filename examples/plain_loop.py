"""A plain PyTorch loop with FreezeOut and the cache; what changed in it is marked."""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from cachefreeze import FreezeOutLR, PrefixCache, param_groups, partition
from cachefreeze.hashing import weights_sha256

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--cache-dir", default="data/cache")
parser.add_argument("--no-cache", dest="cache_dir", action="store_const", const=None)
args = parser.parse_args()

digits = load_digits()
images = F.interpolate(torch.tensor(digits.images[:, None] / 16).float(), 32).repeat(1, 3, 1, 1)
dataset = TensorDataset(images, torch.tensor(digits.target))
epochs, batch_size = 8, 64
steps = epochs * -(-len(dataset) // batch_size)

torch.manual_seed(0)
blocks = [
    nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
    for i, o in ((3, 16), (16, 32), (32, 64))
]
model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(1024, 10))
units = partition(model)  # cachefreeze
optimizer = torch.optim.SGD(param_groups(units), lr=0.02, momentum=0.9)  # cachefreeze
scheduler = FreezeOutLR(optimizer, units, steps, t0=0.5)  # cachefreeze
cache = PrefixCache(units, dataset, batch_size=batch_size, directory=args.cache_dir)  # cachefreeze

for epoch in range(epochs):
    start, correct = time.perf_counter(), 0
    cache.materialize()  # cachefreeze
    model.train()
    for x, y in cache.epoch(epoch):  # cachefreeze
        logits = units.suffix(x)  # cachefreeze
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        correct += int((logits.argmax(1) == y).sum())
    print(
        f"epoch {epoch + 1}  accuracy {correct / len(dataset):6.2%}  "
        f"frozen {units.frontier}/{len(units)}  {cache.rows_served:5} rows from the cache  "
        f"{time.perf_counter() - start:.2f} s"
    )
print("weights", weights_sha256(model.state_dict())[:16])
