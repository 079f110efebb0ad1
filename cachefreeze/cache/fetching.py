"""Loads items for a loader, in workers or in the main process, and reports how they were loaded."""

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from cachefreeze.keys import Fingerprint

# A file that was changed less than so many ns ago may be changed again without a new time stamp.
# Stamps have a resolution of 10 ms on most file systems, and of 2 s on those that count in seconds.
_GRAIN, _COARSE_GRAIN = 100_000_000, 2_500_000_000
_SECOND = 1_000_000_000
# Ends of names of files that hold no data: code is identified by versions and names.
_NO_DATA = (".py", ".pyc", ".so", ".pth", ".dist-info", "METADATA")
_BESIDE_FILES = ("socket.connect", "subprocess.Popen", "sqlite3.connect", "os.exec", "os.system")
_WRITES = os.O_WRONLY | os.O_RDWR

# Times, size and inode of a file. None if it does not exist.
Stamp = tuple[int, int, int, int] | None
Files = tuple[tuple[str, Stamp], ...]


@dataclass
class FetchRequest:
    """Request of a loader for one batch.

    Attributes:
        indices: Numbers of the items, as the sampler returned them.
        load: Whether the items are loaded.
        watch: Whether to find out if loading draws random numbers.
        note: Whether to record the files that the items are read from.
        digest: Digest of the data set when the request was made. Empty if it is not needed.
        sample: Numbers of items that are loaded to be compared, if the batch is not loaded.
    """

    indices: Any
    load: bool = True
    watch: bool = True
    note: bool = False
    digest: bytes = b""
    sample: tuple[int, ...] = ()


@dataclass
class FetchReport:
    """Report on how the items of a batch were loaded.

    Attributes:
        ask: Request for the batch.
        draws: Reason why the items may differ each time, to follow "its items". Empty if there is
            none.
        seconds: Seconds that one item took.
        files: Files that each item was read from. None for an item whose files are not known.
    """

    ask: FetchRequest
    draws: str = ""
    seconds: float = 0.0
    files: list[Files | None] = field(default_factory=list)


class Items:
    """Data set for the workers of a loader. It returns items together with a report.

    Args:
        dataset: Data set of the user.
        fingerprint: Fingerprint of the data set. If None, it is made when it is needed first.
    """

    def __init__(self, dataset: Any, fingerprint: Fingerprint | None) -> None:
        self.dataset = dataset
        self.fingerprint = fingerprint

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the fingerprint: a spawned worker makes its own."""
        return {"dataset": self.dataset, "fingerprint": None}

    def __len__(self) -> int:
        """Returns the number of items."""
        return len(self.dataset)

    def __getitems__(self, ask: FetchRequest) -> tuple[list[Any], FetchReport]:
        """Loads the items of a request."""
        about = FetchReport(ask)
        if not ask.load and not ask.sample:
            return [], about
        wanted = ask.indices if ask.load else list(ask.sample)
        if not ask.watch:
            return self._plainly(wanted), about
        if self.fingerprint is None:
            self.fingerprint = Fingerprint(self.dataset)
        before, was_same = _random_states(), self.fingerprint.is_same()
        began = time.perf_counter()
        items = self._noting(wanted, about) if ask.note else self._plainly(wanted)
        about.seconds = (time.perf_counter() - began) / max(len(wanted), 1)
        if _random_states() != before:
            about.draws = "draw random numbers"
        elif was_same and not self.fingerprint.is_same() and not self.fingerprint.settle():
            about.draws = "draw from a generator of their own"
        return items, about

    def _plainly(self, wanted: Any) -> list[Any]:
        several = getattr(self.dataset, "__getitems__", None)
        if several:
            return list(several(wanted))
        return [self.dataset[index] for index in wanted]

    def _noting(self, wanted: Any, about: FetchReport) -> list[Any]:
        if getattr(innermost(self.dataset), "__getitems__", None):
            with_files = _Opened()
            items = with_files.run(lambda: self._plainly(wanted))
            # It is not known which item has read which file.
            files = () if with_files.files() == () else None
            about.files = [files] * len(items)
            return items
        items = []
        for index in wanted:
            opened = _Opened()
            items.append(opened.run(lambda index=index: self.dataset[index]))  # type: ignore[misc]
            about.files.append(opened.files())
        return items


def innermost(dataset: Any) -> Any:
    """Returns the data set below all `Subset`s."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


class Collate:
    """Makes a batch of items, and passes on the report.

    Args:
        collate: Function that makes a batch from a list of items.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, fetched: tuple[list[Any], FetchReport]) -> dict[str, Any]:
        """Returns the batch, or None if no item was loaded, together with the report."""
        items, about = fetched
        return {"batch": self._collate(items) if items else None, "about": about}


def _random_states() -> tuple[Any, ...]:
    numbers: Any = np.random.get_state(legacy=False)
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        numbers["state"]["pos"],
        numbers["state"]["key"].tobytes(),
        numbers["has_gauss"],
    )


class _Local(threading.local):
    opened: "_Opened | None" = None


_local = _Local()
_hooked = False


class _Opened:
    """Records the files that Python opens during a call, but not those that C extensions open."""

    def __init__(self) -> None:
        self._found: dict[str, Stamp] = {}
        self._beside = False

    def run(self, call: Callable[[], Any]) -> Any:
        """Calls a function, and records the files that it opens."""
        global _hooked
        if not _hooked:
            _hooked = True
            sys.addaudithook(_on_event)
        before, _local.opened = _local.opened, self
        try:
            return call()
        finally:
            _local.opened = before

    def files(self) -> Files | None:
        """Returns the files that were read. None if some are not known or have just changed."""
        now = time.time_ns()
        if self._beside or any(_is_new(stamp, now) for stamp in self._found.values()):
            return None
        return tuple(self._found.items())

    def note(self, event: str, args: tuple[Any, ...]) -> None:
        """Records an audit event of Python."""
        if event in _BESIDE_FILES:
            self._beside = True
            return
        path = args[0] if args else None
        if event == "open" and len(args) > 2 and isinstance(args[2], int) and args[2] & _WRITES:
            self._beside = True
        if path is None or isinstance(path, int):
            self._beside |= path is not None
            return
        name = os.path.abspath(os.fsdecode(path))
        if not name.endswith(_NO_DATA) and name not in self._found:
            self._found[name] = stamp_of(name)


def _on_event(event: str, args: tuple[Any, ...]) -> None:
    opened = _local.opened
    if opened is None:
        return
    if event in ("open", "os.listdir", "os.scandir") or event in _BESIDE_FILES:
        _local.opened = None  # recording may raise events of its own
        try:
            opened.note(event, args)
        finally:
            _local.opened = opened


def stamp_of(path: str) -> Stamp:
    """Returns times, size and inode of a file, by which a changed file is noticed."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _is_new(stamp: Stamp, now: int) -> bool:
    if stamp is None:
        return False
    grain = _GRAIN if stamp[1] % _SECOND else _COARSE_GRAIN
    return now - stamp[1] < grain
