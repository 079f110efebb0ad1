"""What the bits of a result may depend on beside what it is computed from."""

from typing import Any

import torch

from cachefreeze.device import numerics


def environment(device: torch.device) -> tuple[Any, ...]:
    """Returns versions and switches of now. They are compared at every call: 5 microseconds.

    Args:
        device: Device of the computation.
    """
    return (
        *numerics(device).values(),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )
