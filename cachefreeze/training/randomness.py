"""Functions that save and restore all random state that a run may draw from."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


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
