"""Heads that need no learning rate: logistic regression, and the nearest neighbours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Rows that are looked at together.
_CHUNK = 4096
# Most numbers of rows that are computed with in double precision.
_FEW = 50_000_000
# Temperature of the votes of neighbours, as in DINO.
_TEMPERATURE = 0.07


def logistic(
    x: Tensor, labels: Tensor, classes: int, strengths: Sequence[float], most: int = 500
) -> list[tuple[Tensor, Tensor]]:
    """Fits logistic regressions by L-BFGS, from the strongest regularisation on.

    The loss is that of scikit-learn's `LogisticRegression`: half of the squared weights, and C
    times the sum of the losses of the rows. It is computed in torch, on the device of the rows.

    Args:
        x: Rows, (N, columns).
        labels: Labels, (N,) int64.
        classes: Number of classes.
        strengths: Values of C.
        most: Largest number of iterations of each fit.

    Returns:
        Weights (classes, columns) and biases (classes,) for each C, in the order given.
    """
    from scipy.optimize import minimize  # 0.2 s

    dtype = torch.float64 if x.numel() < _FEW and x.device.type != "mps" else torch.float32
    width, rows = x.shape[1], len(x)
    found: dict[float, tuple[Tensor, Tensor]] = {}
    start = np.zeros(classes * (width + 1))
    for strength in sorted(set(strengths)):

        def loss(numbers: Any, strength: float = strength) -> tuple[float, Any]:
            both = torch.from_numpy(numbers).to(x.device, dtype).view(classes, width + 1)
            weight, bias = both[:, :-1], both[:, -1]
            total = torch.zeros((), dtype=torch.float64)
            gradient = torch.zeros_like(both)
            for some, truth in zip(x.split(_CHUNK), labels.split(_CHUNK), strict=True):
                some = some.to(dtype)
                logs = torch.addmm(bias, some, weight.T).log_softmax(1)
                total -= logs.gather(1, truth[:, None]).sum().double().cpu()
                slope = logs.exp()
                slope[torch.arange(len(truth)), truth] -= 1
                gradient[:, :-1] += slope.T @ some
                gradient[:, -1] += slope.sum(0)
            gradient /= rows
            gradient[:, :-1] += weight / (strength * rows)
            penalty = 0.5 * float((weight.double() ** 2).sum()) / (strength * rows)
            return float(total) / rows + penalty, gradient.double().cpu().numpy().ravel()

        result = minimize(
            loss, start, jac=True, method="L-BFGS-B", options={"maxiter": most, "gtol": 1e-5}
        )
        start = result.x
        both = torch.from_numpy(result.x.copy()).view(classes, width + 1).float()
        found[strength] = both[:, :-1].contiguous(), both[:, -1].contiguous()
    return [found[strength] for strength in strengths]


def neighbours(
    x: Tensor, labels: Tensor, classes: int, queries: Tensor, counts: Sequence[int]
) -> list[Tensor]:
    """Predicts labels by the votes of the nearest rows by cosine, as in DINO's evaluation.

    Args:
        x: Rows that are known, (N, columns).
        labels: Their labels, (N,) int64.
        classes: Number of classes.
        queries: Rows that are asked for, (M, columns).
        counts: Numbers of neighbours. A number above N stands for N.

    Returns:
        Labels (M,) for each number of neighbours.
    """
    known = torch.nn.functional.normalize(x, dim=1)
    most = min(max(counts), len(x))
    found: list[list[Tensor]] = [[] for _ in counts]
    for some in queries.split(_CHUNK):
        near, places = (torch.nn.functional.normalize(some, dim=1) @ known.T).topk(most, dim=1)
        votes = (near / _TEMPERATURE).softmax(1)
        for number, count in enumerate(counts):
            scores = torch.zeros(len(some), classes, device=x.device)
            scores.scatter_add_(1, labels[places[:, :count]], votes[:, :count])
            found[number].append(scores.argmax(1))
    return [torch.cat(some) for some in found]
