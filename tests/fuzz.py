"""Draws small models, loops, changes and moments, and compares the weights with the plain loop's.

`python -m tests.fuzz 2000` runs so many rounds, `python -m tests.fuzz --seed 17` one of them.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import cachefreeze
from cachefreeze import ActivationCache
from cachefreeze.cache import selection
from tests.faults.changes import LATE, OTHERS, WRITERS, Observed, loss_of

Tensor = torch.Tensor


class _Words(nn.Module):
    """Rows of numbers as tokens, with the length beside the batch."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 16)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)[:, :8, :1].expand(-1, -1, 8)
        x = torch.tanh(self.first(x if self.batch_first else x.transpose(0, 1)))
        x = self.last(x * torch.arange(16))
        return (x if self.batch_first else x.transpose(0, 1)).flatten(1)


def _bodies() -> dict[str, Callable[[], nn.Module]]:
    return {
        "convolutions": lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3),
            nn.ReLU(), nn.Flatten(), nn.Linear(144, 32), nn.Tanh(),
        ),
        "linear": lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(192, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 32),
            nn.Tanh(),
        ),
        "large": lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(192, 1024), nn.LayerNorm(1024), nn.GELU(),
            nn.Linear(1024, 32), nn.Tanh(),
        ),
        "observed": lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), Observed(), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.Tanh()
        ),
        "dropout": lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(192, 64), nn.Dropout(0.2), nn.Linear(64, 32), nn.Tanh()
        ),
        "second axis": lambda: nn.Sequential(_Words(False), nn.Linear(128, 32), nn.Tanh()),
        "odd": lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(192, 65), nn.SiLU(), nn.Linear(65, 1), nn.Mish(),
            nn.Linear(1, 33), nn.Sigmoid(), nn.Linear(33, 32), nn.Tanh(),
        ),
        "words": lambda: nn.Sequential(_Words(True), nn.Linear(128, 32), nn.Tanh()),
        "attention": lambda: nn.Sequential(
            nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 64, batch_first=True), nn.Flatten(),
            nn.Linear(192, 32), nn.Tanh(),
        ),
    }  # fmt: skip


BODIES = _bodies()


class Model(nn.Module):
    """A frozen body, perhaps called twice, and a trained head, perhaps with a norm."""

    def __init__(self, body: str, twice: bool, norm: bool) -> None:
        super().__init__()
        self.body = BODIES[body]().requires_grad_(False).eval()
        self.head = nn.Sequential(*([nn.BatchNorm1d(32)] if norm else []), nn.Linear(32, 4))
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(h + self.body(x.flip(-1)) if self.twice else h)


class Round:
    """One loop, drawn from a seed.

    Args:
        seed: Seed.
    """

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.seed = seed
        self.body = draw.choice(list(BODIES))
        self.twice, self.norm = draw.random() < 0.15, draw.random() < 0.3
        self.rows, self.batch = draw.choice([24, 30, 38]), draw.choice([6, 8])
        self.epochs = draw.choice([5, 6])
        self.optimizer = draw.choice(["SGD", "AdamW", "fused"])
        self.validates = draw.random() < 0.4
        self.calls = draw.choice(["model", "model", "parts"])
        self.accumulates = draw.random() < 0.2
        self.duplicates = draw.random() < 0.2
        self.noise = draw.choice([0.0, 0.0, 0.0, 0.02, 1.0])
        self.autocast = draw.random() < 0.1
        self.freezes_late = draw.random() < 0.15
        self.directory = draw.random() < 0.2
        kinds = [WRITERS] * 4 + [OTHERS] * 3 + [LATE]
        self.changes: list[tuple[int, int, str]] = []
        for _ in range(draw.choice([1, 1, 2])):
            name = draw.choice(list(draw.choice(kinds)))
            self.changes.append((draw.randrange(1, self.epochs), draw.randrange(4), name))
        self.swaps = draw.random() < 0.25  # weights of another model around validation

    def run(self, cached: bool, directory: str | None = None) -> tuple[dict[str, Any], str]:
        torch.manual_seed(self.seed)
        model = Model(self.body, self.twice, self.norm)
        if self.freezes_late:
            model.body.requires_grad_(True)
        x = torch.randn(self.rows, 3, 8, 8)
        x[: self.rows // 4] = x[-(self.rows // 4) :] if self.duplicates else x[: self.rows // 4]
        made: dict[str, Any] = {"lr": 0.05}
        if self.optimizer == "fused":
            made["fused"] = True
        kind = torch.optim.AdamW if self.optimizer == "AdamW" else torch.optim.SGD
        optimizer = kind(model.head.parameters(), **made)
        cache = None
        if cached:
            cache = ActivationCache(model, directory=directory)
        losses: list[float] = []
        other = [one.clone() * 0.9 for one in model.body.parameters()]
        for epoch in range(self.epochs):
            if self.freezes_late and epoch == 1:
                cachefreeze.freeze(model.body)
            order = torch.randperm(self.rows)
            for number, places in enumerate(order.split(self.batch)):
                for when, step, name in self.changes:
                    if (when, step) == (epoch, number):
                        {**WRITERS, **OTHERS, **LATE}[name](model)
                batch = x[places]
                if self.noise and torch.rand(()) < self.noise:
                    batch = batch + torch.randn_like(batch)
                with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                    out = model.head(model.body(batch)) if self.calls == "parts" else model(batch)
                loss = loss_of(out.float())
                loss.backward()
                if not self.accumulates or number % 2:
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
            if self.validates:
                losses.append(self._validate(model, x, other))
        if cache is not None:
            cache.close()
        state = {name: one.detach().clone() for name, one in model.state_dict().items()}
        state["losses"] = torch.tensor(losses, dtype=torch.float64)
        state["random"] = torch.get_rng_state()
        self.served = cache.stats.rows_served if cache is not None else 0
        told = [*cache.report().found] if cache is not None else []
        return state, " ".join(told)

    def _validate(self, model: Model, x: Tensor, other: list[Tensor]) -> float:
        modes = [part.training for part in model.modules()]
        kept = [one.detach().clone() for one in model.body.parameters()]
        if self.swaps:
            for one, two in zip(model.body.parameters(), other, strict=True):
                one.data.copy_(two)
        model.eval()
        with torch.no_grad():
            result = sum(model(part).double().sum().item() for part in x.split(self.batch))
        if self.swaps:
            for one, two in zip(model.body.parameters(), kept, strict=True):
                one.data.copy_(two)
        for part, mode in zip(model.modules(), modes, strict=True):
            part.training = mode
        return float(result)

    def check(self) -> str:
        """Returns "equal", "told", or how the weights differ without a word."""
        plain, _ = self.run(cached=False)
        with tempfile.TemporaryDirectory() as folder:
            # A second run finds the rows of the first one.
            runs = [self.run(True, folder), self.run(True, folder)] if self.directory else [
                self.run(True)
            ]  # fmt: skip
        verdict = "equal"
        for state, told in runs:
            wrong = [
                name
                for name, one in plain.items()
                if not torch.equal(one.nan_to_num(), state[name].nan_to_num())
            ]
            if wrong and not told:
                return f"WRONG {wrong[:3]}"
            verdict = "told" if wrong else verdict
        return verdict

    def __str__(self) -> str:
        """Describes the round."""
        return " ".join(f"{name}={value}" for name, value in vars(self).items())


def main() -> int:
    """Runs rounds, and says how many ended in other weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rounds", type=int, nargs="?", default=2000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first round")
    parser.add_argument("--seed", type=int, help="run one round, and say what it is")
    args = parser.parse_args()
    torch.set_num_threads(1)
    selection.LEAST_SHARE = 0.0  # shares are of measured times, and seeds should say the same twice
    found: Counter[str] = Counter()
    seeds = range(args.first, args.first + args.rounds) if args.seed is None else [args.seed]
    began, served = time.perf_counter(), 0
    for seed in seeds:
        one = Round(seed)
        verdict = one.check()
        served += one.served > 0
        found[verdict.split()[0]] += 1
        if args.seed is not None or verdict.startswith("WRONG"):
            print(f"{seed}: {verdict}: {one}", flush=True)
    seconds = time.perf_counter() - began
    print(
        f"{len(seeds)} rounds in {seconds:.0f} s: {found['equal']} with equal weights, "
        f"{found['told']} with other ones and told, {found['WRONG']} wrong without a word; "
        f"rows were served in {served}."
    )
    return int(found["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
