"""A loop of one's own with the cache, to be held against `by_hand.py`, and without it.

python scripts/own_loop_cached.py FOLDER DIRECTORY [--epochs 10] [--blocks 0] [--plain]
"""

import argparse
import time
from pathlib import Path

import torch
import torchvision
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

SIZE, BATCH = 64, 64

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("directory", type=Path)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--blocks", type=int, default=0, help="last blocks that are trained, too")
parser.add_argument("--plain", action="store_true", help="without the cache")
args = parser.parse_args()

torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10).eval()
model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
model.requires_grad_(False)
trained = [
    model.fc,
    *[block for layer in (model.layer3, model.layer4) for block in layer][4 - args.blocks :],
]
for part in trained:
    part.requires_grad_(True)
change = transforms.Compose(
    [transforms.Resize(SIZE), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
)
dataset = torchvision.datasets.ImageFolder(str(args.folder), change)
if args.plain:
    loader = DataLoader(dataset, BATCH, shuffle=True)
else:
    import cachefreeze

    cache = cachefreeze.ActivationCache(model, directory=args.directory)
    loader = cache.loader(dataset, BATCH, shuffle=True)
parameters = [one for one in model.parameters() if one.requires_grad]
optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
for _ in range(args.epochs):
    began = time.process_time()
    for x, y in loader:
        loss = F.cross_entropy(model(x.to(memory_format=torch.channels_last)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {time.process_time() - began:.3f} s of the processor")
print(f"loss {loss.item():.4f}")
if not args.plain:
    print(cache)
