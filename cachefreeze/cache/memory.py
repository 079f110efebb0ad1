"""Free memory of the machine and of a GPU."""

import os
import resource
from pathlib import Path

import torch


def free_memory() -> int:
    """Estimates the number of free bytes of memory.

    This is memory that is available without swapping, within the limit of the container if there is
    one. Processes that torchrun has started on this machine get equal parts of it.
    """
    return _free_memory() // _processes()


def _processes() -> int:
    """Returns the number of processes that torchrun has started on this machine."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(int(count), 1) if count.isdecimal() else 1


def _free_memory() -> int:
    try:
        with open("/proc/meminfo") as file:
            kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in file}
        free = kilobytes["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):  # not Linux: half of all memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if has_address_limit():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        left = resource.getrlimit(resource.RLIMIT_AS)[0] - pages * os.sysconf("SC_PAGE_SIZE")
        free = min(free, max(left, 0))
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{of}").read_text()) for of in _CGROUP)
    except (OSError, ValueError):  # there is no container, or it has no limit
        return free
    return min(free, max(limit - used, 0))


_CGROUP = ("max", "current")


def has_address_limit() -> bool:
    """Returns whether the addresses that this process may use are limited (`ulimit -v`)."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def free_device_memory(device: torch.device) -> int:
    """Estimates the number of free bytes of memory of a device.

    The largest amount that this process has used so far counts as used, because the next training
    step will need it again.
    """
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device)
        return (
            torch.cuda.mem_get_info(device)[0] + reserved - torch.cuda.max_memory_allocated(device)
        )
    return free_memory()
