"""Restores random state and buffers after passes that do not train."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undone(models: Iterable[nn.Module]) -> Iterator[None]:
    """Restores all random state and the buffers of models after the passes in the body.

    Args:
        models: Models that run in the body.
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
