"""One step of training, and the optimizer and schedule for it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachefreeze.freezeout import FreezeOutLR, freeze_units, param_groups
from cachefreeze.training.device import autocast
from cachefreeze.training.settings import Settings


def prepare(
    settings: Settings, model: nn.Module, example: Tensor, total_steps: int
) -> tuple[torch.optim.Optimizer, FreezeOutLR]:
    """Freezes the units that are frozen from the start; returns the optimizer and its schedule.

    Args:
        settings: Settings of the run.
        model: Network, on the device of the run.
        example: Batch of any images, which shows the order of the units.
        total_steps: Number of steps of the run.
    """
    if settings.freeze_first is not None:
        freeze_units(model, settings.freeze_first, example)
    optimizer = torch.optim.SGD(
        param_groups(model, example),
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
        # One pass over the parameters instead of four, in half the time. (It rounds in other
        # places: last bits are not those of a step that is not fused.)
        fused=example.device.type in ("cpu", "cuda"),
    )
    scheduler = FreezeOutLR(
        optimizer,
        model,
        total_steps,
        t0=settings.t0 if settings.freeze else 1.0,
        shape=settings.schedule,
        scale_lr=settings.scale_lr,
    )
    return optimizer, scheduler


def logits_of(model: nn.Module, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns the network's output in float32.

    Args:
        model: Network to run.
        x: Batch of network input.
        dtype: Type for autocast, or None.
    """
    with autocast(x.device, dtype):
        return model(x).float()


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    dtype: torch.dtype | None,
    weight: float = 1.0,
) -> Tensor:
    """Takes one optimizer step on a batch; returns its mean loss.

    Args:
        model: Network to train.
        optimizer: Optimizer of its parameters.
        x: Batch of network input.
        labels: Labels of the batch, (n,).
        dtype: Type for autocast, or None.
        weight: Factor of the loss. It is not 1 if the batch is one of several parts of unequal
            size.
    """
    loss = F.cross_entropy(logits_of(model, x, dtype), labels)
    if weight != 1.0:
        loss = loss * weight
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
