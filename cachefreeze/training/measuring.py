"""Measures the seconds of a forward pass, unit by unit."""

import copy
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cachefreeze.freezeout import Unit
from cachefreeze.training.device import autocast, synchronize

# Steps that are timed, after some that are not like the others, and forward passes.
WARM_UP, TIMED, PASSES = 2, 5, 2


def forward_seconds(
    model: nn.Module, units: Sequence[Unit], x: Tensor, dtype: torch.dtype | None
) -> tuple[list[float], list[int]]:
    """Measures the forward pass through each unit, in eval mode, on a copy of the model.

    The time of a unit begins when a module with its parameters is called. It ends when a module
    with parameters of another unit is called.

    Args:
        model: Model to measure.
        units: Units of the model.
        x: Batch of network input.
        dtype: Type for autocast, or None.

    Returns:
        Seconds of each unit, and bytes of its input.
    """
    unit_of = {id(p): number for number, unit in enumerate(units) for p in unit.parameters}
    owners = {
        path: next((unit_of[id(p)] for p in module.parameters(recurse=False)), None)
        for path, module in model.named_modules()
    }
    copied = copy.deepcopy(model).eval()
    marks: list[tuple[int, Any]] = []
    sizes = [0] * len(units)

    def entered(number: int, args: tuple[Any, ...]) -> None:
        if not marks or marks[-1][0] != number:
            marks.append((number, _now(x.device)))
            if args and isinstance(args[0], Tensor):
                sizes[number] = args[0].nbytes

    for path, module in copied.named_modules():
        number = owners.get(path)
        if number is not None:
            module.register_forward_pre_hook(lambda _, args, number=number: entered(number, args))
    found = [float("inf")] * len(units)
    with torch.no_grad(), autocast(x.device, dtype):
        for _ in range(PASSES):
            marks.clear()
            copied(x)
            marks.append((-1, _now(x.device)))
            synchronize(x.device)
            seconds = [0.0] * len(units)
            for (number, began), (_, ended) in pairwise(marks):
                seconds[number] += _between(began, ended)
            found = [min(pair) for pair in zip(found, seconds, strict=True)]
    return found, sizes


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(began: Any, ended: Any) -> float:
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1e3
