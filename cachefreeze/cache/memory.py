"""Free memory, and what a cache has done in words."""

from collections.abc import Sequence

from cachefreeze.cache.entries import Entries
from cachefreeze.cache.shared import Stats

_UNKNOWN = 4 << 30


def free_memory() -> int:
    """Returns the bytes of memory that programs can still take, as far as the system tells.

    A limit of the container counts if it is the smaller one.
    """
    free = _field("/proc/meminfo", "MemAvailable:")
    found = free * 1024 if free is not None else _UNKNOWN
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        found = min(found, max(limit - used, 0))
    return found


def _field(path: str, name: str) -> int | None:
    try:
        with open(path) as file:
            for line in file:
                if line.startswith(name):
                    return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return None


def _number(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def in_words(stats: Stats, entries: Entries, messages: Sequence[str]) -> str:
    """Says what a cache has done, and what limits it."""
    total = stats.rows_served + stats.rows_computed
    share = stats.rows_served / total if total else 0.0
    lines = [
        f"{stats.rows_served:,} of {total:,} rows served ({share:.0%}), "
        f"{stats.seconds_saved:.1f} s of frozen work saved (estimated).",
        f"{stats.rows_kept:,} rows kept, {stats.bytes / 1e6:,.1f} of at most "
        f"{entries.max_bytes / 1e6:,.1f} MB; {entries.dropped:,} rows dropped for want of room.",
    ]
    if stats.batches:
        known = stats.batches_known / stats.batches
        lines.append(
            f"{known:.0%} of {stats.batches:,} batches since the first row came again had only "
            "known rows."
        )
    return "\n".join([*lines, *(f"- {message}" for message in messages)])
