"""Results on the validation rows, batch by batch."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cachefreeze.data import InputRows, full_batches, labels_of
from cachefreeze.training.interrupts import Interrupts
from cachefreeze.training.ranks import Ranks
from cachefreeze.training.terminal import SHOW_AFTER, progress_bar


def results_of_batches(
    logits_of: Callable[[Tensor], Tensor],
    inputs: InputRows,
    labels: Tensor,
    batch_size: int,
    ranks: Ranks,
    interrupts: Interrupts,
) -> Tensor:
    """Computes some of the batches in each process.

    They have the size that one process would give them, so the sum over all processes has the same
    bits, whatever their number is.

    Args:
        logits_of: Function that returns the network's output.
        inputs: Network input of the validation rows.
        labels: Their labels, on the device of the network.
        batch_size: Number of rows in a batch.
        ranks: Processes of the run.
        interrupts: Requests to stop, after which no further batch is computed.

    Returns:
        Sum of the losses, and number of rows that were classified correctly, of each batch:
        float64 of shape (batches, 2). Zeros for batches of other processes.
    """
    rows = len(labels)
    whole = full_batches(np.arange(rows), batch_size)
    numbers = list(range(len(whole)))[ranks.launch.rank :: ranks.count]
    order = [whole[number] for number in numbers]
    found: list[Tensor] = []
    with progress_bar("validating", len(order), "batch", delay=SHOW_AFTER) as bar:
        batches = zip(numbers, inputs.batches(order), labels_of(labels, order), strict=True)
        for number, x, wanted in batches:
            if interrupts:
                break
            # What the last batch was filled up with counts once.
            left = rows - number * len(x)
            logits, wanted = logits_of(x)[:left], wanted[:left]
            loss = F.cross_entropy(logits, wanted, reduction="sum")
            found.append(torch.stack([loss, (logits.argmax(1) == wanted).sum()]))
            bar.update()
    results = torch.zeros(len(whole), 2, dtype=torch.float64)
    if found:
        results[numbers[: len(found)]] = torch.stack(found).cpu().double()
    return results
