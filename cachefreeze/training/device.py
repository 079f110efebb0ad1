"""The device that a run computes on, and the precision of its arithmetic."""

import contextlib
import ctypes
import os
import sys
from contextlib import AbstractContextManager

import torch

from cachefreeze.errors import UserError


def resolve_device(name: str) -> torch.device:
    """Returns a device by name.

    Args:
        name: `cpu`, `cuda`, `mps` or `auto`: the fastest device of this machine.

    Raises:
        UserError: The named device is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[name]:
        raise UserError(f"--device {name} is not available here: use --device cpu or auto")
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> torch.dtype | None:
    """Returns the type for autocast, or None for plain float32.

    Args:
        name: `fp32`, `bf16` or `auto`. `auto` is bfloat16 where the hardware multiplies it: GPUs
            from Ampere on, processors with AMX or AVX512-BF16 (2 to 3 times the speed of float32).
            Elsewhere bfloat16 is emulated, and slower, so `auto` is float32.
        device: Device that the run computes on.
    """
    if name == "auto":
        name = "bf16" if has_bf16(device) else "fp32"
    return torch.bfloat16 if name == "bf16" else None


def has_bf16(device: torch.device) -> bool:
    """Says whether the device has instructions that multiply bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Private, but there are no other names from torch 2.6 on; without them: no.
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return False


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Returns a context of autocast to `dtype`, or without autocast if it is None.

    It does not depend on the autocast that it is entered in.
    """
    if dtype is not None:
        return torch.autocast(device.type, dtype)
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def set_numerics(
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    *,
    tf32: bool = False,
    deterministic: bool = False,
) -> None:
    """Sets how a CUDA device may round, for this process.

    A CPU always computes float32 with all its bits, and gives the same bits each time.

    Args:
        device: Device that the run computes on.
        autocast_dtype: Type for autocast, or None.
        tf32: Whether float32 is multiplied with 10 bits of mantissa instead of 23 (TensorFloat-32).
        deterministic: Whether only algorithms are used that give the same bits every time. They are
            chosen by the shapes alone. If False, cuDNN times several and takes the fastest.

    Raises:
        UserError: TF32 is asked for on another device, or together with bfloat16.
    """
    if device.type != "cuda":
        if tf32:
            raise UserError("--tf32 is for CUDA devices: leave it out, or choose --device cuda")
        return
    if tf32 and autocast_dtype is not None:
        raise UserError("--tf32 has no effect on bf16: leave it out, or give --precision fp32")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        # cuBLAS reads it when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # What has no such algorithm runs all the same, and torch says so.
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Or all memory that is taken would be filled first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all its work. A CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def keep_freed_memory() -> None:
    """Tells glibc to keep memory that is freed, for this process.

    A training step on a CPU frees and takes back the same hundreds of MB. By default much of it
    goes back to the system at once and is faulted in anew: 4 to 15 % of the step. (`mallopt`,
    M_MMAP_THRESHOLD and M_TRIM_THRESHOLD; other C libraries are left as they are.)
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 2**30)
            mallopt(-1, 2**31 - 1)
