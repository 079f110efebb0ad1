"""Estimates how much memory is free, of the machine and of a device."""

import os
from pathlib import Path

import torch


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
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{of}").read_text()) for of in _CGROUP)
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return min(free, max(limit - used, 0))


_CGROUP = ("max", "current")


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
