"""Measures the costs and savings of a cache: `OMP_NUM_THREADS=1 python scripts/benchmark_cache.py`.

Each case is a loop of several epochs. It runs without the cache, with it, and at the limit: the
same steps on kept values in ready tensors. The three take turns, and every figure is the median of
several turns. Ratios compare the seconds of whole epochs.
"""

import argparse
import importlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import cachefreeze
from cachefreeze import lineage
from cachefreeze.cache.guards import Guards
from cachefreeze.cache.selection import Selection, cheapest_cut

Batch = tuple[dict[str, Any], torch.Tensor]
Step = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass
class Case:
    """A training loop to be measured.

    Attributes:
        name: Name for the table.
        build: Function that makes the model, with its frozen part frozen.
        rows: Inputs of all rows by the names of the model's arguments, and labels.
        batch: Number of rows in a batch.
        augment: Whether every batch gets noise, so that no row comes again.
    """

    name: str
    build: Callable[[], nn.Module]
    rows: Batch
    batch: int
    augment: bool = False

    def batches(self, epoch: int) -> Iterator[Batch]:
        inputs, labels = self.rows
        generator = torch.Generator().manual_seed(epoch)
        for places in torch.randperm(len(labels), generator=generator).split(self.batch):
            chosen = {name: tensor[places] for name, tensor in inputs.items()}
            if self.augment:
                chosen = {name: tensor + torch.randn(()) for name, tensor in chosen.items()}
            yield chosen, labels[places]


def head_only(model: nn.Module, *trained: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    return model.eval()


def logits(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def bert(layers: int = 12, trained: str = "classifier") -> nn.Module:
    transformers: Any = importlib.import_module("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=256, intermediate_size=1024, num_attention_heads=4,
        vocab_size=2000,
    )  # fmt: skip
    torch.manual_seed(0)
    return head_only(transformers.BertForSequenceClassification(config), trained)


def vit() -> nn.Module:
    timm: Any = importlib.import_module("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=10, img_size=64)
    return head_only(model, "head", "blocks.11", "norm")


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return head_only(torchvision.models.resnet50(num_classes=10), "layer4.2", "fc")


def nothing_frozen_to_speak_of() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1.requires_grad_(False)
    return model.eval()


def cases(rows: int) -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    ids = torch.randint(5, 1999, (rows, 32), generator=generator)
    lengths = torch.randint(8, 33, (rows, 1), generator=generator)
    mask = (torch.arange(32) < lengths).long()
    texts = {"input_ids": ids * mask, "attention_mask": mask}
    images = torch.randn(rows, 3, 64, 64, generator=generator)
    return [
        Case("BERT-like (12 x 256), head only", bert, (texts, labels), 16),
        Case("ViT-S (64 pixels), last block", vit, ({"x": images}, labels), 16),
        Case("ResNet-50 (64 pixels), last block", resnet, ({"x": images}, labels), 16),
        Case("nothing to gain: the stem alone is frozen", nothing_frozen_to_speak_of,
             ({"x": images}, labels), 16),
        Case("nothing to gain: every row is another one", resnet, ({"x": images}, labels), 16,
             augment=True),
    ]  # fmt: skip


class Loop:
    """One run of a case, an epoch at a time."""

    def __init__(self, case: Case, cached: bool) -> None:
        self.case = case
        self.model = case.build()
        trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)
        self.cache = cachefreeze.ActivationCache(self.model) if cached else None

    def epoch(self, number: int) -> float:
        seconds = 0.0
        torch.manual_seed(number)
        for inputs, labels in self.case.batches(number):
            began = time.perf_counter()
            self.step(inputs, labels)
            seconds += time.perf_counter() - began
        return seconds

    def step(self, inputs: dict[str, Any], labels: torch.Tensor) -> None:
        loss = F.cross_entropy(logits(self.model(**inputs)), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Limit(Loop):
    """The same steps with kept values in ready tensors: nothing is hashed, found or read."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, cached=False)
        inputs, _ = next(case.batches(0))
        _, trace = lineage.trace(self.model, **inputs)
        self.plan = lineage.Plan(trace, cheapest_cut(trace))
        _, kept, _ = lineage.capture(self.plan, self.model, **inputs)
        assert kept is not None
        self.kept = kept

    def step(self, inputs: dict[str, Any], labels: torch.Tensor) -> None:
        output, report = lineage.replay(self.plan, self.kept, self.model, **inputs)
        assert not report.left, report.left
        F.cross_entropy(logits(output), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(case: Case, turns: int, epochs: int) -> None:
    first, later, limits, whole = [], [], [], []
    for _ in range(turns):
        plain, cached = Loop(case, cached=False), Loop(case, cached=True)
        plain.epoch(99)  # warms up torch, and both pay it
        assert cached.cache is not None
        plain_seconds = [plain.epoch(number) for number in range(epochs)]
        cached_seconds = [cached.epoch(number) for number in range(epochs)]
        first.append(cached_seconds[0] / plain_seconds[0])
        whole.append(sum(cached_seconds) / sum(plain_seconds))
        served = cached.cache.stats.rows_served
        if served:
            limit = Limit(case)
            limit.epoch(0)
            limit_seconds = statistics.median(limit.epoch(number) for number in range(3))
            # An epoch's first batches are compared and not served: the last epochs are counted.
            last = statistics.median(cached_seconds[2:])
            limits.append(limit_seconds / last)
            later.append(last / statistics.median(plain_seconds[2:]))
        words = str(cached.cache).splitlines()
        cached.cache.close()
    line = f"{case.name}\n  first epoch {told(first)} of plain; all {epochs} epochs {told(whole)}"
    if later:
        line += f"; later epochs {told(later)}; limit / later epochs {told(limits)}"
    print(line)
    for word in words:
        print(f"    {word}")


def peak(case: Case, cached: bool) -> float:
    """Returns the largest memory of this process up to the end of the first epoch.

    Kept rows are left out.
    """
    loop = Loop(case, cached)
    loop.epoch(0)
    kept = loop.cache.stats.bytes if loop.cache is not None else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - kept


def measure_memory(case: Case, turns: int, rows: int) -> None:
    """Compares the peaks of first epochs, each in a process of its own."""
    ratios, more = [], []
    for _ in range(turns):
        peaks = []
        for how in ("plain", "cached"):
            command = [
                sys.executable, __file__, "--only", case.name, "--rows", str(rows), "--peak", how
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks.append(float(done.stdout.split()[-1]))
        ratios.append(peaks[1] / peaks[0])
        more.append((peaks[1] - peaks[0]) / 2**20)
    print(
        f"{case.name}\n  peak memory of the first epoch, kept rows apart: {told(ratios)} of plain; "
        f"{statistics.median(more):.0f} MiB more"
    )


def measure_checks(case: Case, turns: int, epochs: int) -> None:
    """Measures the share of a cached run that checks take, by the clock of the process.

    A computed batch that is compared counts as a whole.
    """
    shares: dict[str, list[float]] = {}
    for _ in range(turns):
        spent = dict.fromkeys(("guards", "looks", "compared batches and hashes"), 0.0)

        def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                began = time.process_time()
                try:
                    return function(*args)
                finally:
                    spent[name] += time.process_time() - began  # noqa: B023

            return run

        with (
            patch.object(Guards, "fit", timed("guards", Guards.fit)),
            patch.object(Selection, "look", timed("looks", Selection.look)),
        ):
            cached = Loop(case, cached=True)
            assert cached.cache is not None
            began = time.process_time()
            for number in range(epochs):
                cached.epoch(number)
            report = cached.cache.report()
            whole = time.process_time() - began
        cached.cache.close()
        spent["compared batches and hashes"] = report.seconds
        for name, seconds in (*spent.items(), ("all checks", sum(spent.values()))):
            shares.setdefault(name, []).append(seconds / whole)
    parts = "; ".join(f"{name} {told(one)}" for name, one in shares.items())
    print(f"{case.name}\n  of a run of {epochs} epochs: {parts}")


def told(ratios: list[float]) -> str:
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    return f"{statistics.median(ratios):.3f} ({spread})"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what a cache costs and saves.")
    parser.add_argument("--turns", type=int, default=5, help="Runs of each kind. Default: 5.")
    parser.add_argument("--epochs", type=int, default=4, help="Epochs of a run. Default: 4.")
    parser.add_argument("--rows", type=int, default=640, help="Rows of the data. Default: 640.")
    parser.add_argument("--only", default="", help="Part of the name of the cases to run.")
    parser.add_argument("--memory", action="store_true", help="Compare memory in place of time.")
    parser.add_argument("--checks", action="store_true", help="Measure what checks take.")
    parser.add_argument("--peak", choices=["plain", "cached"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [case for case in cases(options.rows) if options.only in case.name]
    if options.peak:
        print(peak(chosen[0], options.peak == "cached"))
        return 0
    print(f"torch {torch.__version__}, one thread, n = {options.turns}")
    for case in chosen:
        if options.checks:
            measure_checks(case, options.turns, options.epochs)
        elif options.memory:
            measure_memory(case, options.turns, options.rows)
        else:
            measure(case, options.turns, options.epochs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
