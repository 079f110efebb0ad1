"""FreezeOut in a full training loop: validation, bf16, gradient accumulation and checkpoints.

python examples/freezeout.py

Stop it at any time, and continue with --resume.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from cachefreeze import ActivationCache, FreezeOutLR, param_groups
from cachefreeze.keys.hashing import weights_sha256

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--cache-dir", default="data/cache")
parser.add_argument("--no-cache", dest="cache_dir", action="store_const", const=None)
parser.add_argument("--checkpoint", type=Path, default="data/freezeout.pt")
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

epochs, batch_size, accumulate = 10, 32, 2
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)

digits = load_digits()
images = F.interpolate(torch.tensor(digits.images[:, None] / 16).float(), 32).repeat(1, 3, 1, 1)
dataset = TensorDataset(images, torch.tensor(digits.target))
train, val = random_split(dataset, [1408, 389])  # 44 full batches
train_loader = DataLoader(train, batch_size, shuffle=True)
val_loader = DataLoader(val, batch_size)
blocks = [
    nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
    for i, o in ((3, 32), (32, 64), (64, 64))
]
model = nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(0.2), nn.Linear(1024, 10)).to(device)

groups = param_groups(model, images[:2].to(device), decay_all=False)
optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4)
steps = epochs * (len(train_loader) // accumulate)
scheduler = FreezeOutLR(optimizer, model, total_steps=steps, t0=0.5)
parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
done = 0
if args.resume:
    state = torch.load(args.checkpoint, map_location=device)
    for name, part in parts.items():
        part.load_state_dict(state[name])  # the scheduler's freezes the units that were frozen
    done = state["epochs"]
cache = ActivationCache(model, directory=args.cache_dir) if args.cache_dir else None
filled = 0  # so many units' rows are kept


def logits(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(device.type, torch.bfloat16):
        return model(x.to(device))


for epoch in range(done, epochs):
    start, correct = time.perf_counter(), 0
    torch.manual_seed(epoch)  # of the order and the dropout, so that a resumed run draws the same
    model.train()
    if cache and scheduler.frontier > filled and epoch + 1 < epochs:
        # Without it, rows are kept as they pass, and serve from the epoch after the next on.
        cache.fill(train_loader, lambda batch: logits(batch[0]))
        filled = scheduler.frontier
    for batch, (x, y) in enumerate(train_loader, 1):
        loss = F.cross_entropy(logits(x), y.to(device)) / accumulate
        loss.backward()
        if batch % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    model.eval()
    with torch.no_grad():
        for x, y in val_loader:
            correct += int((logits(x).argmax(1) == y.to(device)).sum())

    state = {name: part.state_dict() for name, part in parts.items()}
    new = args.checkpoint.with_suffix(".new")
    torch.save({**state, "epochs": epoch + 1}, new)
    new.replace(args.checkpoint)
    served = cache.stats.rows_served if cache else 0
    print(
        f"epoch {epoch + 1:2}  accuracy {correct / len(val):6.2%}  "
        f"frozen {scheduler.frontier}/{len(scheduler.names)}  {served:5} rows from the cache  "
        f"{time.perf_counter() - start:.2f} s",
        flush=True,
    )
if cache:
    cache.close()
print("weights", weights_sha256(model.state_dict())[:16])
