"""A sweep over learning rates by Optuna, in which the frozen backbone runs once for all ten trials.

pip install optuna && python examples/sweep.py
"""

import tempfile

import optuna
import torch
import torchvision
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze

digits = load_digits()
images = torch.tensor(digits.images[:320], dtype=torch.float32)[:, None].repeat(1, 3, 4, 4) / 16
dataset = TensorDataset(images, torch.tensor(digits.target[:320]))
directory = tempfile.mkdtemp()  # one that stays serves tomorrow's sweep, too
served = []


def trial(chosen: optuna.Trial) -> float:
    """Trains a head at a rate of Optuna's choice; returns its last loss."""
    rate = chosen.suggest_float("lr", 1e-4, 1e-1, log=True)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    cachefreeze.freeze(*[part for name, part in model.named_children() if name != "fc"])
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=rate, momentum=0.9)
    with cachefreeze.ActivationCache(model, directory=directory) as cache:
        for _ in range(2):
            total = 0.0
            for x, y in DataLoader(dataset, 32, shuffle=True):
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item()
        served.append(cache.stats.rows_served)
    return total


optuna.logging.set_verbosity(optuna.logging.WARNING)
study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
study.optimize(trial, n_trials=10)
print(f"best rate {study.best_params['lr']:.2g}, loss {study.best_value:.3f}")
print("rows served in each trial, of 640:", *served)
