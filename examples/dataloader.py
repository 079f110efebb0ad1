"""A loop that keeps its DataLoader; the first units are frozen by hand, without a schedule."""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cachefreeze import IndexedDataset, PrefixCache, partition
from cachefreeze.hashing import weights_sha256


def main(cache_dir: str | None) -> None:
    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images[:, None] / 16).float(), 32).repeat(1, 3, 1, 1)
    dataset = IndexedDataset(TensorDataset(images, torch.tensor(digits.target)))  # cachefreeze
    torch.manual_seed(0)
    loader = DataLoader(dataset, batch_size=64, shuffle=True, num_workers=2)
    blocks = [
        nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
        for i, o in ((3, 16), (16, 32), (32, 64))
    ]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(1024, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    units = partition(model)  # cachefreeze
    with PrefixCache(units, dataset, batch_size=64, directory=cache_dir) as cache:  # cachefreeze
        for epoch in range(6):
            start, correct = time.perf_counter(), 0
            if epoch == 2:
                units.freeze(2)  # cachefreeze
                cache.materialize()  # cachefreeze
            model.train()
            for rows, x, y in loader:  # cachefreeze
                logits = units.suffix(cache.batch(rows, x))  # cachefreeze
                F.cross_entropy(logits, y).backward()
                optimizer.step()
                optimizer.zero_grad()
                correct += int((logits.argmax(1) == y).sum())
            print(
                f"epoch {epoch + 1}  accuracy {correct / len(dataset):6.2%}  "
                f"{cache.rows_served:5} rows from the cache  {time.perf_counter() - start:.2f} s"
            )
    print("weights", weights_sha256(model.state_dict())[:16])


if __name__ == "__main__":  # the loader's workers import this file where they are not forked
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache-dir", default="data/cache")
    parser.add_argument("--no-cache", dest="cache_dir", action="store_const", const=None)
    main(parser.parse_args().cache_dir)
