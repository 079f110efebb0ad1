"""Many heads on one pass of a frozen network: `cachefreeze.probe`."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cachefreeze.cache import ActivationCache
from cachefreeze.data import epoch_order, full_batches
from cachefreeze.errors import UserError
from cachefreeze.plan.views import count_views
from cachefreeze.probing.heads import Heads
from cachefreeze.probing.rows import Rows, collect, frozen

# Rows that are judged at once.
_MANY = 1024


@dataclass(frozen=True)
class Probed:
    """Heads that were trained on the rows of one frozen network.

    Attributes:
        heads: Trained heads, in the order given.
        accuracies: Share of the validation rows that each head gets right.
        losses: Mean loss of each head on the validation rows.
        best: Number of the best head: of those with the best accuracy, the one with the least loss.
    """

    heads: tuple[nn.Module, ...]
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def best(self) -> int:
        """Number of the best head."""
        return min(
            range(len(self.heads)), key=lambda one: (-self.accuracies[one], self.losses[one])
        )


def probe(
    model: nn.Module,
    train: Any,
    val: Any,
    heads: Sequence[nn.Module],
    *,
    directory: str | os.PathLike[str] | None = None,
    lr: float | Sequence[float] = 0.01,
    weight_decay: float | Sequence[float] = 0.0,
    epochs: int = 10,
    batch_size: int = 128,
    views: int | str | None = None,
    transform: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> Probed:
    """Trains many heads on a frozen model, which runs once over each image.

    Meanwhile the model is in eval mode without gradient. Afterwards it is as it was before.

    Heads of the same structure are trained together. Each ends with the weights that it would have
    alone, apart from rounding. They are trained by SGD with momentum 0.9 on a cosine schedule.

    Args:
        model: Model that returns a tensor (n, ...) for a batch of inputs.
        train: Data set of pairs of an input and its label (int) to train on.
        val: Data set of such pairs to validate on.
        heads: Modules that take what the model returns, and return logits (n, classes). They are
            trained in place.
        directory: Folder that the model's outputs (rows) are kept in. Later calls find them there.
            If None, they are kept in memory during this call.
        lr: Initial learning rate: one number for all heads, or one for each head.
        weight_decay: Weight decay: one number for all heads, or one for each head.
        epochs: Number of passes over the rows.
        batch_size: Number of rows in a step.
        views: Number of views of each training input, or "flips" for an input and its mirror image.
            Epoch e shows view e modulo their number. If None, inputs are as the data set gives
            them.
        transform: Function that makes a view of an input. See `ActivationCache.loader`.
        seed: Seed of the order of rows, and of the views.

    Returns:
        Heads with their accuracies and losses on `val`.

    Raises:
        UserError: There is no head, a list of rates has another length than `heads`, or the data
            sets or heads do not fit.
    """
    heads = list(heads)
    if not heads:
        raise UserError("probe needs heads: give a list of modules.")
    if epochs < 1 or batch_size < 1:
        raise UserError("epochs and batch_size must be 1 or more.")
    rates, decays = _each(lr, heads, "lr"), _each(weight_decay, heads, "weight_decay")
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    has_frozen = any(True for _ in model.parameters())
    with frozen(model), _cache(model, directory) if has_frozen else nullcontext() as cache:
        rows = [
            rows_of(model, cache, dataset, device, some, change, seed)
            for dataset, some, change in ((train, views, transform), (val, None, None))
        ]
    accuracies, losses = train_heads(
        heads, rates, decays, *rows, epochs=epochs, batch_size=batch_size, seed=seed, device=device
    )
    return Probed(tuple(heads), tuple(accuracies), tuple(losses))


def _cache(model: nn.Module, directory: Any) -> ActivationCache:
    return ActivationCache(model, directory=directory)


def _each(value: float | Sequence[float], heads: Sequence[nn.Module], name: str) -> list[float]:
    if isinstance(value, (int, float)):
        return [float(value)] * len(heads)
    if len(value) != len(heads):
        raise UserError(
            f"{name} has {len(value)} values for {len(heads)} heads: give one for each."
        )
    return [float(one) for one in value]


def rows_of(
    call: Any,
    cache: ActivationCache | None,
    dataset: Any,
    device: torch.device,
    views: int | str | None = None,
    transform: Callable[[Any], Any] | None = None,
    seed: int = 0,
    *,
    size: int = 32,
    workers: int = 0,
    tick: Callable[[int], object] = lambda count: None,
) -> Rows:
    """Runs a network over a data set once for each view, through its cache.

    Args:
        call: Function that makes rows of a batch.
        cache: Cache of the network. None if it has no parameters.
        dataset: Data set of inputs and targets.
        device: Device of the network.
        views: Number of views of each input, "flips", or None for the input itself.
        transform: Function that makes a view of an input.
        seed: Seed of the views.
        size: Number of inputs in a batch.
        workers: Number of processes that load inputs.
        tick: Function that is called with the number of rows of each batch.

    Raises:
        UserError: The data set is empty or gives no pairs of tensors of one size.
    """
    if not len(dataset):
        raise UserError("the data set is empty: there is nothing to train heads on.")
    # In batches of one size a row has the same bits in each, and all of them are served.
    batches = [rows.tolist() for rows in full_batches(np.arange(len(dataset)), size)]
    options: dict[str, Any] = {"batch_sampler": batches, "num_workers": workers}
    options["generator"] = torch.Generator()  # or the program's random state would be drawn from
    if cache is None:
        loader: Any = DataLoader(dataset, **options)
    else:
        loader = cache.loader(dataset, views=views, transform=transform, seed=seed, **options)
    return collect(call, loader, len(dataset), count_views(views), device, tick)


def train_heads(
    heads: Sequence[nn.Module],
    rates: Sequence[float],
    decays: Sequence[float],
    rows: Rows,
    val: Rows,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    tick: Callable[[int], object] = lambda count: None,
    classes: int | None = None,
    shares: Callable[[Tensor], Tensor] | None = None,
    judge: Callable[[Heads], tuple[list[float], list[float]]] | None = None,
) -> tuple[list[float], list[float]]:
    """Trains heads together from one stream of rows.

    Args:
        heads: Modules that take rows. They are trained in place.
        rates: Learning rate of each head.
        decays: Weight decay of each head.
        rows: Rows to train on.
        val: Rows to validate heads on.
        epochs: Number of passes over the rows.
        batch_size: Number of rows in a step.
        seed: Seed of the order of the rows.
        device: Device that heads are trained on.
        tick: Function that is called with the number of rows of each step.
        classes: Number of classes. If None, number of outputs of the first head.
        shares: Function that returns the share of each class for a batch of targets. If None,
            targets are labels, or such shares already.
        judge: Function that returns a score and a loss of each head. If None, they are the accuracy
            and the mean loss.

    Returns:
        Score and loss of each head on the validation rows.
    """
    for head in heads:
        if not any(one.requires_grad for one in head.parameters()):
            raise UserError(f"{type(head).__name__} has no parameter to train: give another head.")
        head.to(device)
    batches = -(-len(rows) // batch_size)
    group = Heads(heads, rates, decays, epochs * batches)
    count = classes or _classes(heads[0], val, device)
    if shares is None:
        _check_labels((rows.targets, val.targets), count)
        shares = partial(_as_shares, classes=count)
    for epoch in range(epochs):
        values = rows.values[epoch % len(rows.values)]
        order = torch.from_numpy(epoch_order(len(rows), seed, epoch))
        for places in order.split(batch_size):
            x, y = values[places].to(device), rows.targets[places].to(device)
            group.learn(x, shares(y))
            tick(len(places))
    found = _accuracies(group, val, count, device) if judge is None else judge(group)
    group.finish()
    return found


def _check_labels(targets: Sequence[Tensor], classes: int) -> None:
    for labels in targets:
        if labels.is_floating_point() or bool(((labels >= 0) & (labels < classes)).all()):
            continue
        raise UserError(
            f"labels must be whole numbers from 0 to {classes - 1}, as many as a head has outputs, "
            f"and are from {int(labels.min())} to {int(labels.max())}."
        )


def _classes(head: nn.Module, rows: Rows, device: torch.device) -> int:
    mode = head.training
    with torch.no_grad():
        found = head.eval()(rows.plain[:1].to(device)).shape[-1]
    head.train(mode)
    return int(found)


def _as_shares(targets: Tensor, classes: int) -> Tensor:
    """Returns targets as the share of each class, (..., classes)."""
    if targets.is_floating_point():
        return targets
    return nn.functional.one_hot(targets, classes).float()


@torch.no_grad()
def _accuracies(
    group: Heads, rows: Rows, classes: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Returns the accuracy and the mean loss of each head. A head that diverged has accuracy 0."""
    right = torch.zeros(group.count, dtype=torch.float64)
    lost, total = torch.zeros(group.count, dtype=torch.float64), 0.0
    for x, y in zip(rows.plain.split(_MANY), rows.targets.split(_MANY), strict=True):
        shares = _as_shares(y.to(device), classes)
        counted = shares.sum(-1)
        total += float(counted.sum())
        for number, output in enumerate(group.outputs(x.to(device))):
            same = output.argmax(-1) == shares.argmax(-1)
            right[number] += float((same * counted).sum())
            lost[number] -= float((shares * output.log_softmax(-1)).sum())
    losses = (lost / max(total, 1e-12)).tolist()
    accuracies = (right / max(total, 1e-12)).tolist()
    finite = torch.tensor(losses).isfinite().tolist()
    return (
        [one if good else 0.0 for one, good in zip(accuracies, finite, strict=True)],
        [one if good else float("inf") for one, good in zip(losses, finite, strict=True)],
    )
