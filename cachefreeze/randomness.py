"""Functions that save and restore all random state that a run may draw from."""

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


def number_from(*numbers: int) -> int:
    """Returns a number of 64 bits that is drawn from others alone."""
    words = " ".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Lets torch (on the CPU), Python and NumPy draw from given numbers alone, inside the context.

    The random state is put back afterwards.
    """
    seed = number_from(*numbers)
    # `torch.manual_seed` would move the generators of GPUs as well.
    torchs = torch.default_generator.get_state()
    python, numpys = random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.default_generator.set_state(torchs)
        random.setstate(python)
        np.random.set_state(numpys)


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


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the random state of torch, of the device, of Python and of NumPy."""
    version, internal, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [key, numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"]],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restores random state, so that the next numbers are those after it was taken.

    Args:
        state: Random state from `random_state`.
        device: Device of the same type as that it was taken on.
    """
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    key, position, has_gauss, gauss = state["numpy"]
    words = key.cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, gauss))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state["mps"].cpu())
