"""Fills a cache with Ray Data, on as many workers as there are; a training run then finds the rows.

pip install 'ray[data]' && python examples/fill_with_ray.py
"""

import logging
import tempfile
from typing import Any

import numpy as np
import ray
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze

ROWS, BATCH, BLOCK = 640, 32, 160
# Workers on several machines need a folder that all of them see, or the URL of an object store.
directory = tempfile.mkdtemp()
digits = load_digits()
pixels = digits.images[:ROWS].astype(np.uint8)


def inputs_of(pixels: np.ndarray) -> torch.Tensor:
    """Prepares images for the network. Rows are found by the bits that this returns."""
    return torch.as_tensor(pixels, dtype=torch.float32)[:, None].repeat(1, 3, 4, 4) / 16


def build() -> nn.Module:
    """Makes the network with its frozen part frozen. All processes make the same weights."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    cachefreeze.freeze(*[part for name, part in model.named_children() if name != "fc"])
    return model


class Filler:
    """A worker: it runs the frozen part on its blocks, and writes rows of its own."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = build()

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        # Rows are on the disk when a block is done. A worker that dies loses one block.
        with cachefreeze.ActivationCache(self.model, directory=directory) as cache:
            cache.fill(inputs_of(block["image"]).split(BATCH))
        return {"rows": np.array([len(block["image"])])}


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
logging.getLogger("ray.data").setLevel(logging.WARNING)
blocks = ray.data.from_items([{"image": one} for one in pixels], override_num_blocks=2)
filled = blocks.map_batches(Filler, batch_size=BLOCK, concurrency=2).sum("rows")
ray.shutdown()
print(f"{filled} rows filled")

torch.set_num_threads(1)
model = build()
dataset = TensorDataset(inputs_of(pixels), torch.tensor(digits.target[:ROWS]))
optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.01, momentum=0.9)
with cachefreeze.ActivationCache(model, directory=directory) as cache:
    for epoch in range(2):
        before = cache.stats.rows_served
        for x, y in DataLoader(dataset, BATCH, shuffle=True):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        served = cache.stats.rows_served - before
        print(f"epoch {epoch}: loss {loss.item():.3f}, {served} of {ROWS} rows served")
