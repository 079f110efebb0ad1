"""Measures the costs of lineage: `OMP_NUM_THREADS=1 python scripts/benchmark_lineage.py`.

Every figure is the median of several runs, in turns with the runs that it is compared with.
"""

import argparse
import functools
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from cachefreeze import lineage
from cachefreeze.lineage import calls

TINY = {"num_hidden_layers": 12, "hidden_size": 32, "num_attention_heads": 2}


def medians(calls: Sequence[Callable[[], Any]], times: int) -> list[float]:
    """Times several functions in turns, and returns the median seconds of each."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(times + 1):
        for call, taken in zip(calls, seconds, strict=True):
            began = time.perf_counter()
            call()
            if turn:  # the first turn warms up
                taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in seconds]


def freeze_all_but(model: nn.Module, words: Sequence[str]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in words))
    return model.eval()


def planned(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[lineage.Plan, Any]:
    """Traces a model, and returns a plan with the kept values of the batch."""
    _, trace = lineage.trace(model, *args, **kwargs)
    plan = lineage.Plan(trace, lineage.crossing_cut(trace))
    _, kept, report = lineage.capture(plan, model, *args, **kwargs)
    assert kept is not None, report.left
    return plan, kept


def text(rows: int = 4, length: int = 8) -> dict[str, torch.Tensor]:
    mask = (torch.arange(length) < torch.tensor([length, 5, 6, 4])[:rows, None]).long()
    return {"input_ids": torch.randint(5, 99, (rows, length)), "attention_mask": mask}


def tiny_models() -> Iterator[tuple[str, nn.Module, dict[str, torch.Tensor], list[str]]]:
    transformers: Any = importlib.import_module("transformers")
    wide = {**TINY, "intermediate_size": 64}
    bert = transformers.BertConfig(**wide, vocab_size=100)
    yield "BERT", transformers.BertForSequenceClassification(bert), text(), ["classifier"]
    vit = transformers.ViTConfig(**wide, image_size=32, patch_size=8)
    images = {"pixel_values": torch.randn(4, 3, 32, 32)}
    yield "ViT", transformers.ViTForImageClassification(vit), images, ["classifier"]
    llama = transformers.LlamaConfig(**wide, num_key_value_heads=2, vocab_size=100, pad_token_id=0)
    yield "Llama", transformers.LlamaForSequenceClassification(llama), text(), ["score"]


def replayed_passes(times: int) -> None:
    print("replayed pass of head-only models with 12 layers, in ms (asked: at most 1.5)")
    for name, model, batch, trained in tiny_models():
        freeze_all_but(model, trained)
        plan, kept = planned(model, **batch)
        plain, replayed = medians(
            [
                functools.partial(model, **batch),
                functools.partial(lineage.replay, plan, kept, model, **batch),  # type: ignore[arg-type]
            ],
            times,
        )
        print(f"  {name:8} plain {plain * 1e3:6.2f}   replayed {replayed * 1e3:6.2f}")


def last_stage(times: int) -> None:
    print("training step of ResNet-50's last stage, replayed / written by hand (asked: 1.02)")
    model = torchvision.models.resnet50(num_classes=10)
    freeze_all_but(model, ["layer4", "fc"])
    x = torch.randn(16, 3, 64, 64)
    plan, kept = planned(model, x)
    (number,) = plan.cut.kept
    features = kept[number]

    def by_hand() -> None:
        h = model.layer4(features)
        model.fc(torch.flatten(model.avgpool(h), 1)).sum().backward()

    def replayed() -> None:
        output, _ = lineage.replay(plan, kept, model, x)
        output.sum().backward()

    hand, mine = medians([by_hand, replayed], times)
    print(f"  {mine / hand:.3f}   ({mine * 1e3:.1f} and {hand * 1e3:.1f} ms)")


def traced_passes(times: int) -> None:
    transformers: Any = importlib.import_module("transformers")
    print("traced pass / plain pass (asked: at most 1.5 where a pass takes 0.1 s or more)")
    resnet = freeze_all_but(torchvision.models.resnet50(), ["layer4", "fc"])
    config = transformers.BertConfig(num_hidden_layers=12, hidden_size=256, intermediate_size=1024,
                                     num_attention_heads=4)  # fmt: skip
    bert = freeze_all_but(transformers.BertForSequenceClassification(config), ["classifier"])
    densenet = freeze_all_but(torchvision.models.densenet121(), ["classifier"])
    cases: list[tuple[str, Any, Any, dict[str, Any]]] = [
        ("ResNet-50", resnet, (torch.randn(8, 3, 128, 128),), {}),
        ("BERT, 12 layers of 256", bert, (), text(4, 64)),
        ("DenseNet-121", densenet, (torch.randn(4, 3, 128, 128),), {}),
    ]
    for name, model, args, kwargs in cases:
        plain, traced = medians(
            [
                functools.partial(model, *args, **kwargs),
                functools.partial(lineage.trace, model, *args, **kwargs),
            ],
            times,
        )
        print(f"  {name:24} {traced / plain:.2f}   (plain {plain * 1e3:.0f} ms)")


PEAK = """
import torch, torchvision
from cachefreeze import lineage
torch.set_num_threads(1)
model = torchvision.models.resnet50()
for name, p in model.named_parameters():
    p.requires_grad_("layer4" in name or "fc" in name)
model.eval()
x = torch.randn(32, 3, 224, 224)
lineage.trace(model, x[:1, :, :32, :32])  # what torch and lineage set up once

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))

with open("/proc/self/clear_refs", "w") as marks:
    marks.write("5")  # the high-water mark begins anew
before = memory("VmRSS")
{call}
print(memory("VmHWM") - before)
"""


def peak_memory(times: int) -> None:
    """Compares high-water marks of processes, which only Linux tells and sets back."""
    print("peak memory of a traced pass / a plain pass, above the model (asked: at most 1.1)")
    if not Path("/proc/self/clear_refs").exists():
        print("  not measured: this is no Linux")
        return
    calls = ("out = model(x)", "out = lineage.trace(model, x)")
    peaks: list[list[int]] = [[], []]
    for _ in range(times):
        for call, found in zip(calls, peaks, strict=True):
            command = [sys.executable, "-c", PEAK.format(call=call)]
            # Freed tensors go back to the system at once, else the marks vary by a quarter.
            env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            run = subprocess.run(command, capture_output=True, check=True, text=True, env=env)
            found.append(int(run.stdout))
    plain, traced = (statistics.median(found) for found in peaks)
    spread = ", ".join(f"{mine / other:.3f}" for other, mine in zip(*peaks, strict=True))
    print(f"  {traced / plain:.3f}   (plain {plain / 1e3:.0f} MB; single runs {spread})")


class Chain(nn.Module):
    """Many small operations one after another, with sums over ways around them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.first = nn.Linear(8, 8).requires_grad_(False)
        self.last = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = way = self.first(x)
        for number in range(self.count // 2):
            h = torch.tanh(h) + way
            way = h if number % 10 == 0 else way
        return self.last(h)


def cuts(times: int) -> None:
    print("minimum cut, in ms (asked: at most 200 for 1,500 operations)")
    for count in (500, 1500, 3000):
        _, trace = lineage.trace(Chain(count), torch.randn(4, 8))
        (seconds,) = medians(
            [functools.partial(lineage.minimum_cut, trace, reading_rate=1e9)], times
        )
        print(f"  {len(trace.operations):5} operations {seconds * 1e3:6.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what lineage costs.")
    parser.add_argument("--times", type=int, default=15, help="Runs of each kind. Default: 15.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, one thread, {os.cpu_count()} cores, n = {options.times}")
    with calls.catching():  # as a cache that is open does
        replayed_passes(options.times * 2)
    last_stage(options.times)
    traced_passes(options.times)
    cuts(options.times)
    peak_memory(3)
    return 0


if __name__ == "__main__":
    sys.exit(main())
