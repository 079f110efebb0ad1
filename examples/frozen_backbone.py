"""Two heads on one frozen backbone, which runs once for the first and not at all for the second."""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

from cachefreeze import PrefixCache, partition
from cachefreeze.hashing import weights_sha256

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--cache-dir", default="data/cache")
parser.add_argument("--no-cache", dest="cache_dir", action="store_const", const=None)
args = parser.parse_args()

digits = load_digits()
images = F.interpolate(torch.tensor(digits.images[:, None] / 16).float(), 32).repeat(1, 3, 1, 1)
dataset = TensorDataset(images, torch.tensor(digits.target))

for weight_decay in (0.0, 0.1):
    torch.manual_seed(0)  # the same backbone twice
    model = resnet18()  # weights="DEFAULT" for a pretrained one
    model.fc = nn.Linear(model.fc.in_features, 10)
    units = partition(model)
    units.freeze(-1)  # all but the head; units.freeze("layer4.0") leaves the last block, too
    optimizer = torch.optim.AdamW(model.fc.parameters(), lr=0.03, weight_decay=weight_decay)
    with PrefixCache(units, dataset, batch_size=64, directory=args.cache_dir) as cache:
        print(f"weight decay {weight_decay}")
        for epoch in range(3):
            start, correct = time.perf_counter(), 0
            cache.materialize()
            for x, y in cache.epoch(epoch):
                logits = units.suffix(x)
                F.cross_entropy(logits, y).backward()
                optimizer.step()
                optimizer.zero_grad()
                correct += int((logits.argmax(1) == y).sum())
            seconds = time.perf_counter() - start
            print(f"epoch {epoch + 1}  accuracy {correct / len(dataset):6.2%}  {seconds:.2f} s")
        print(f"{cache.rows_served} rows from the cache")
        print(f"prefix_unit_rows_computed == {cache.prefix_unit_rows_computed}")
    print("weights", weights_sha256(model.state_dict())[:16])
