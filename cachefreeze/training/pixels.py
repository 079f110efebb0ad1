"""The choice of the memory that holds decoded pixels."""

from math import prod

import torch

from cachefreeze.cache.memory import free_device_memory, free_memory
from cachefreeze.data import ArrayImages, DataSet

# Shares of free memory that the decoded pixels of a data set may take.
DEVICE_SHARE, MEMORY_SHARE = 0.2, 0.25


def place_of_pixels(data: DataSet, device: torch.device, *, cached: bool) -> torch.device | None:
    """Returns the device whose memory holds decoded pixels, or None if they are decoded again.

    Args:
        data: Data set.
        device: Device that the run computes on.
        cached: Whether the run keeps the outputs of frozen units.
    """
    in_memory = isinstance(data.train, ArrayImages)
    if not cached and not in_memory:
        return None
    size = (len(data.train) + len(data.val)) * prod(data.image_shape)
    if device.type == "cuda" and size <= DEVICE_SHARE * free_device_memory(device):
        return device
    if not in_memory and size <= MEMORY_SHARE * free_memory():
        return torch.device("cpu")
    return None
