"""What the bits of a result may depend on beside what it is computed from."""

import functools
import platform
import sys
from importlib.metadata import version
from pathlib import Path
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
        torch.backends.mha.get_fastpath_enabled(),
        flushes_denormals(),
    )


# The smallest number that is not denormal.
_SMALLEST = sys.float_info.min


def flushes_denormals() -> bool:
    """Says whether this thread makes zeros of the smallest numbers: `torch.set_flush_denormal`.

    It is a switch of the processor, which torch does not tell. Python's numbers obey it, too.
    """
    return _SMALLEST / 2 == 0.0


@functools.cache
def machine() -> tuple[str, str]:
    """Returns the name of the processor, by which libraries choose how they compute.

    torchvision's version stands beside it: some of its operators are kept as they are named.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor()), version("torchvision")
