"""Distillation with random crops: the teacher runs for three views of each image.

python examples/views.py
"""

import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

import cachefreeze

torch.manual_seed(0)
digits = torch.tensor(load_digits().images[:256], dtype=torch.float32) / 16
dataset = TensorDataset(digits[:, None].repeat(1, 3, 4, 4))
teacher = torchvision.models.resnet34(num_classes=10).eval().requires_grad_(False)
student = nn.Sequential(
    nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
)  # fmt: skip
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
change = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

with cachefreeze.ActivationCache(teacher) as cache:
    loader = cache.loader(dataset, 32, shuffle=True, views=3, transform=change)
    for epoch in range(9):
        before = cache.stats.rows_served
        for (x,) in loader:
            with torch.no_grad():
                said = teacher(x).softmax(1)
            loss = F.cross_entropy(student(x), said)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        served = cache.stats.rows_served - before
        print(f"epoch {epoch}  loss {loss.item():.4f}  {served} of 256 rows served")
