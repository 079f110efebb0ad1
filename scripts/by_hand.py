"""A script as one writes it by hand: features of a frozen backbone in an .npy file, then the head.

    python scripts/by_hand.py FOLDER FEATURES [--epochs 10]

The first run computes the features and saves them, later ones load them. `benchmark_finetune.py`
runs it beside `own_loop_cached.py`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

SIZE, BATCH = 64, 64

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("features", type=Path)
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()
args.features.mkdir(exist_ok=True)
features_file, labels_file = args.features / "features.npy", args.features / "labels.npy"

torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10).eval()
model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
head, model.fc = model.fc, nn.Identity()

if not features_file.exists():
    change = transforms.Compose(
        [transforms.Resize(SIZE), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )
    loader = DataLoader(torchvision.datasets.ImageFolder(str(args.folder), change), BATCH)
    found, targets = [], []
    with torch.inference_mode():
        for x, y in loader:
            found.append(model(x.to(memory_format=torch.channels_last)).numpy())
            targets.append(y.numpy())
    np.save(features_file, np.concatenate(found))
    np.save(labels_file, np.concatenate(targets))

features = torch.from_numpy(np.load(features_file))
labels = torch.from_numpy(np.load(labels_file))
optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
for _ in range(args.epochs):
    for chosen in torch.randperm(len(features)).split(BATCH):
        loss = F.cross_entropy(head(features[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(f"loss {loss.item():.4f}")
