"""Puts random state and buffers back after a pass that is no training."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undone(models: Iterable[nn.Module]) -> Iterator[None]:
    """Puts the buffers of models and all random state back, after passes that are no training.

    Args:
        models: Models that run inside the context.
    """
    buffers = [(one, one.clone()) for model in models for one in model.buffers()]
    python, numbers = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
