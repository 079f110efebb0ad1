"""What the last run had of a store: for people, and never needed to read a row."""

import contextlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from cachefreeze.files import partial_beside
from cachefreeze.store.folder import is_committed
from cachefreeze.store.format import StoreError, read_file

USAGE = "usage.json"
# A file of ours has about 70 bytes.
USAGE_BYTES = 1000


@dataclass(frozen=True)
class Usage:
    """What a run had of a store.

    Args:
        hits: rows of training and validation that came from it.
        misses: rows that the run had to compute to fill it.
        time: when this was noted, in seconds since 1970.
    """

    hits: int
    misses: int
    time: float


def note_usage(folder: Path, usage: Usage) -> None:
    """Write it down beside a store's own files, if the store is complete; whoever does holds its
    lock. Where nothing can be written, nothing is. (It is not waited for until it is on the disk:
    after a power cut it may be gone.)"""
    with contextlib.suppress(OSError):
        if is_committed(folder):
            with partial_beside(folder / USAGE) as temporary:
                with temporary.open("x") as file:
                    json.dump(asdict(usage), file)
                temporary.replace(folder / USAGE)


def read_usage(folder: Path) -> Usage | None:
    """What was noted last; None if nothing was, or what is there is none of ours."""
    try:
        usage = Usage(**json.loads(read_file(folder / USAGE, USAGE_BYTES)))
    except (StoreError, TypeError, ValueError, RecursionError):
        return None
    counts = all(type(count) is int and 0 <= count < 2**63 for count in (usage.hits, usage.misses))
    if not counts or type(usage.time) is not float or not math.isfinite(usage.time):
        return None
    return usage
