"""Segmentation: the head of DeepLabV3 is trained on a frozen backbone.

python examples/segmentation.py
"""

import torch
import torchvision
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze

torch.manual_seed(0)
digits = torch.tensor(load_digits().images[:64], dtype=torch.float32) / 16
images = digits[:, None].repeat(1, 3, 8, 8)
masks = (images[:, 0] > 0.5).long()
loader = DataLoader(TensorDataset(images, masks), 8, shuffle=True)

model = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
    weights=None, weights_backbone=None, num_classes=2
)
cachefreeze.freeze(model.backbone)
optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.05, momentum=0.9)

cache = cachefreeze.ActivationCache(model)
for epoch in range(4):
    model.train()
    for x, y in loader:
        loss = F.cross_entropy(model(x)["out"], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}  loss {loss.item():.4f}")

print("weights", sum(p.detach().double().sum() for p in model.classifier.parameters()).item())
print(cache)
