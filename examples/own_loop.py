"""Your own training loop: a classifier is trained on a frozen backbone of torchvision.

python examples/own_loop.py
"""

import torch
import torchvision
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images[:320], dtype=torch.float32)[:, None].repeat(1, 3, 4, 4) / 16
loader = DataLoader(TensorDataset(images, torch.tensor(digits.target[:320])), 32, shuffle=True)

model = torchvision.models.resnet18(num_classes=10)  # weights="DEFAULT" downloads trained ones
cachefreeze.freeze(*[part for name, part in model.named_children() if name != "fc"])
optimizer = torch.optim.AdamW(model.fc.parameters(), lr=1e-2)

cache = cachefreeze.ActivationCache(model)
for epoch in range(4):
    model.train()
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}  loss {loss.item():.4f}")

print("weights", model.fc.weight.detach().double().sum().item())
print(cache)
