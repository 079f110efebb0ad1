"""A head on a frozen body, run after run: `python again.py DIRECTORY|none [SEED]`.

It does not close its cache: the end of a program does."""

import sys

import doubled  # beside this file, or edited in between
import torch
from torch import nn

import cachefreeze

torch.set_num_threads(1)
torch.manual_seed(0)


body = nn.Sequential(
    nn.Conv2d(3, 8, 3),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(72, 16),
    doubled.Doubled(),
    nn.Tanh(),
)
model = nn.Sequential(body, nn.Linear(16, 4))
model[0].requires_grad_(False)
images = torch.randn(80, 3, 8, 8)
if len(sys.argv) > 2:
    images[7] = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(int(sys.argv[2])))
optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
folder = sys.argv[1]
cache = cachefreeze.ActivationCache(model, directory=folder) if folder != "none" else None
for epoch in range(2):
    order = torch.randperm(80, generator=torch.Generator().manual_seed(epoch))
    for rows in order.split(8):
        loss = model(images[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if cache is not None:
        print("served", cache.stats.rows_served)
print("weights", sum(one.detach().double().sum() for one in model.parameters()).item())
