"""Versions, switches and hardware that the bits of a result may depend on."""

import functools
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cachefreeze.device import numerics


def environment(device: torch.device) -> tuple[Any, ...]:
    """Returns torch's versions and switches as they are now.

    They are compared at every call, which takes 5 microseconds.

    Args:
        device: Device that computes.
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


# Smallest positive number that is not denormal.
_SMALLEST = sys.float_info.min


def flushes_denormals() -> bool:
    """Returns whether this thread turns denormal numbers into zeros.

    It is the switch that `torch.set_flush_denormal` sets. torch has no function that returns it.
    Python's own numbers obey it too, so a division shows it.
    """
    return _SMALLEST / 2 == 0.0


@functools.cache
def machine() -> tuple[str, str]:
    """Returns the processor's name and torchvision's version.

    Libraries choose their kernels by the processor. torchvision has operators of its own, which are
    kept by name alone.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor()), version("torchvision")
