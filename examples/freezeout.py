"""FreezeOut with what a real run has: validation, bf16, gradient accumulation and checkpoints.

Stop it when you like, and go on with --resume.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset, random_split

from cachefreeze import FreezeOutLR, PrefixCache, param_groups, partition
from cachefreeze.hashing import weights_sha256

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
train, val = random_split(dataset, [0.8, 0.2])
blocks = [
    nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
    for i, o in ((3, 16), (16, 32), (32, 64))
]
model = nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(0.2), nn.Linear(1024, 10)).to(device)

units = partition(model)
optimizer = torch.optim.SGD(
    param_groups(units, decay_all=False), lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4
)
steps = len(train) // batch_size // accumulate
scheduler = FreezeOutLR(optimizer, units, total_steps=epochs * steps, t0=0.5)
cache = PrefixCache(
    units,
    {"train": train, "val": val},
    batch_size=batch_size,
    autocast_dtype=torch.bfloat16,
    directory=args.cache_dir,
)
done = 0
if args.resume:
    state = torch.load(args.checkpoint, map_location=device)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])  # freezes the units that were frozen
    cache.load_state_dict(state["cache"])  # so this comes after it
    done = state["epochs"]

for epoch in range(done, epochs):
    start, correct = time.perf_counter(), 0
    if epoch + 1 < epochs:  # filling a store costs what an epoch saves
        cache.materialize()
    torch.manual_seed(epoch)  # of the dropout, so that a resumed run draws the same
    model.train()
    for batch, (x, y) in enumerate(cache.epoch(epoch, drop_last=True), 1):
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(units.suffix(x), y.to(device)) / accumulate
        loss.backward()
        if batch % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for x, y in cache.epoch(split="val", shuffle=False):
            correct += int((units.suffix(x).argmax(1) == y.to(device)).sum())

    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "cache": cache}
    state = {name: part.state_dict() for name, part in parts.items()}
    new = args.checkpoint.with_suffix(".new")
    torch.save({**state, "epochs": epoch + 1}, new)
    new.replace(args.checkpoint)
    cache.release()  # stores that only the checkpoint before named
    print(
        f"epoch {epoch + 1:2}  accuracy {correct / len(val):6.2%}  "
        f"frozen {units.frontier}/{len(units)}  {cache.rows_served:5} rows from the cache  "
        f"{time.perf_counter() - start:.2f} s",
        flush=True,
    )
cache.close()
print("weights", weights_sha256(model.state_dict())[:16])
