"""Versions, switches and hardware that the bits of a result may depend on."""

import functools
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device) -> tuple[Any, ...]:
    """Returns torch's versions and switches as they are now.

    They are compared at every call, which takes 5 microseconds.
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


def numerics(device: torch.device) -> dict[str, object]:
    """Returns all switches and versions that may change the last bits of a result."""
    common: dict[str, object] = {"torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        return common | {
            "name": torch.cuda.get_device_name(device),
            "cudnn": torch.backends.cudnn.version(),
            "enabled": torch.backends.cudnn.enabled,
            "deterministic": torch.backends.cudnn.deterministic,
            "benchmark": torch.backends.cudnn.benchmark,
            "algorithms": torch.are_deterministic_algorithms_enabled(),
            "matmul": _matmul_precision(),
            "tf32": _convolution_tf32(),
            "reduced": _reduced_precision(),
        }
    return common | {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "matmul": _matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "threads": torch.get_num_threads(),
    }


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the newer `fp32_precision`
        return str(torch.backends.cuda.matmul.fp32_precision)


def _reduced_precision() -> list[str]:
    """Returns the switches that allow rounding to 16 bits in sums of 16-bit products."""
    matmul = torch.backends.cuda.matmul
    return [
        str(matmul.allow_bf16_reduced_precision_reduction),
        str(matmul.allow_fp16_reduced_precision_reduction),
    ]


def _convolution_tf32() -> bool | str:
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return str(torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]


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

    Libraries choose their kernels by the processor. torchvision has operators of its own, of which
    a key holds no more than the name.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor()), version("torchvision")
