"""Distillation: a student is trained on the outputs of a large frozen teacher, which are cached.

python examples/distillation.py
"""

import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import cachefreeze

torch.manual_seed(0)
digits = torch.tensor(load_digits().images[:256], dtype=torch.float32) / 16
loader = DataLoader(digits[:, None].repeat(1, 3, 4, 4), 32, shuffle=True)

teacher = torchvision.models.resnet34(num_classes=10).eval()
student = nn.Sequential(
    nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
)  # fmt: skip
teacher.requires_grad_(False)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

cache = cachefreeze.ActivationCache(teacher)
for epoch in range(4):
    for x in loader:
        with torch.no_grad():
            said = teacher(x).softmax(1)
        loss = F.cross_entropy(student(x), said)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}  loss {loss.item():.4f}")

print("weights", sum(p.detach().double().sum() for p in student.parameters()).item())
print(cache)
