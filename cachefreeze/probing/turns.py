"""Lets one process at a time compute the rows of a probing. Others wait, and find its rows."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from cachefreeze.store.files import lock_folder, unlock_file
from cachefreeze.training.terminal import say

# Seconds between two looks at the process that computes.
_PAUSE = 0.5
# Seconds after which a process that has made no row is not waited for any more.
_PATIENCE = 60.0


@contextmanager
def turn(cache_dir: Path, work: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """Waits as long as another process computes the same rows.

    Otherwise, if the trials of a sweep begin together, each of them computes all rows. Waiting ends
    when that process is done, was killed, or makes no more rows. Once a process was done, no other
    waits: all find its rows.

    Args:
        cache_dir: Folder of the cache.
        work: Settings that the rows depend on, as plain values.

    Yields:
        Function that is called after each batch, so that others see that rows are being made.
    """
    folder = cache_dir / "turns" / xxhash.xxh3_64_hexdigest(repr(sorted(work.items())).encode())
    done, held = folder / "done", None
    # A folder that can only be read has no turns: each process computes what it misses.
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        held = _wait(folder, done)

    def goes_on() -> None:
        with suppress(OSError):
            os.utime(folder)

    goes_on()
    try:
        yield goes_on
        with suppress(OSError):
            done.touch()
    finally:
        if held is not None:
            unlock_file(held)


def _wait(folder: Path, done: Path) -> int | None:
    """Returns a descriptor that holds the lock, or None if there is no need for it."""
    told = False
    while not done.exists():
        held = lock_folder(folder)
        if held is not None or time.time() - folder.stat().st_mtime > _PATIENCE:
            return held
        if not told:
            say("waiting   for another probing, which computes the same rows")
            told = True
        time.sleep(_PAUSE)
    return None
