"""The device that a run computes on, and the precision of its arithmetic."""

import contextlib
import ctypes
import os
import resource
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from cachefreeze.errors import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")


def resolve_device(name: str) -> torch.device:
    """Returns a device by name.

    Args:
        name: One of `DEVICES`. `auto` is the fastest device of this machine.

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
        name: One of `PRECISIONS`. `auto` is bfloat16 where the hardware multiplies it: GPUs from
            Ampere on, processors with AMX or AVX512-BF16 (2 to 3 times the speed of float32).
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


def numerics(device: torch.device) -> dict[str, object]:
    """Returns what decides the last bits of a result, besides the operations and their inputs."""
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
    except RuntimeError:  # it was set by torch's newer name for it
        return str(torch.backends.cuda.matmul.fp32_precision)


def _reduced_precision() -> list[str]:
    """Returns the switches that let sums of 16-bit products be rounded to 16 bits."""
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


def free_memory() -> int:
    """Estimates the bytes of memory that are free.

    They can be had without swapping, and within the limit of a container.
    """
    try:
        with open("/proc/meminfo") as file:
            kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in file}
        free = kilobytes["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):  # not Linux: half of what there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if has_address_limit():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        left = resource.getrlimit(resource.RLIMIT_AS)[0] - pages * os.sysconf("SC_PAGE_SIZE")
        free = min(free, max(left, 0))
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{of}").read_text()) for of in _CGROUP)
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return min(free, max(limit - used, 0))


_CGROUP = ("max", "current")


def has_address_limit() -> bool:
    """Returns whether the addresses that this process may use are limited (`ulimit -v`)."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def free_device_memory(device: torch.device) -> int:
    """Estimates the bytes that are free on the device.

    The most that this process has used so far counts as used: the next training step will want it
    again.
    """
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device)
        return (
            torch.cuda.mem_get_info(device)[0] + reserved - torch.cuda.max_memory_allocated(device)
        )
    return free_memory()


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
