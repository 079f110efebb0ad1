"""What loads items for a loader, in its workers or in the main process, and notes how."""

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

# A file that was changed less than so many ns ago may be changed again within the grain of its
# times: 10 ms on most file systems, 2 s on those that count in seconds.
_GRAIN, _COARSE_GRAIN = 100_000_000, 2_500_000_000
_SECOND = 1_000_000_000
# Files that are code, which is known by versions and names, or no files at all.
_NO_DATA = (".py", ".pyc", ".so", ".pth", ".dist-info", "METADATA")
_BESIDE_FILES = ("socket.connect", "subprocess.Popen", "sqlite3.connect", "os.exec", "os.system")
_WRITES = os.O_WRONLY | os.O_RDWR

# Times, size and number of a file. None if there is none.
Stamp = tuple[int, int, int, int] | None
Files = tuple[tuple[str, Stamp], ...]


@dataclass
class FetchRequest:
    """A batch that a loader asks for.

    Attributes:
        indices: Numbers of its items, as the sampler gave them.
        load: Whether its items are loaded.
        watch: Whether it is watched what loading them changes.
        note: Whether it is noted which files they are read from.
        digest: Hash of what the data set held.
        sample: Numbers of items of it that are loaded to be compared, if the batch is not.
    """

    indices: Any
    load: bool = True
    watch: bool = True
    note: bool = False
    digest: bytes = b""
    sample: tuple[int, ...] = ()


@dataclass
class FetchReport:
    """How the items of a batch were loaded.

    Attributes:
        ask: What was asked for.
        draws: What has drawn random numbers, for people. Empty if nothing has.
        seconds: Seconds that an item took.
        files: For each item, the files that were read, or None if that cannot be known.
    """

    ask: FetchRequest
    draws: str = ""
    seconds: float = 0.0
    files: list[Files | None] = field(default_factory=list)


class Items:
    """A data set as a loader's workers see it: they give items, and how those were loaded.

    Args:
        dataset: Data set of the user's.
        fingerprint: What it holds. None in a worker, until it has made its own.
    """

    def __init__(self, dataset: Any, fingerprint: Fingerprint | None) -> None:
        self.dataset = dataset
        self.fingerprint = fingerprint

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the fingerprint behind: a worker that is spawned makes its own."""
        return {"dataset": self.dataset, "fingerprint": None}

    def __len__(self) -> int:
        """Returns the number of items."""
        return len(self.dataset)

    def __getitems__(self, ask: FetchRequest) -> tuple[list[Any], FetchReport]:
        """Loads what is asked for."""
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
            # Which item has read which file is not known.
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
    """Returns the data set that a subset, or one of a subset, takes its items from."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


class Collate:
    """Makes a batch of items, and hands on how they were loaded.

    Args:
        collate: Function that makes a batch of a list of items.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, fetched: tuple[list[Any], FetchReport]) -> dict[str, Any]:
        """Returns a batch, or None if no item was loaded, and how they were loaded."""
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


# The files that python opens. What C extensions open by themselves is not seen.


class _Local(threading.local):
    opened: "_Opened | None" = None


_local = _Local()
_hooked = False


class _Opened:
    """Notes the files that python opens in a call."""

    def __init__(self) -> None:
        self._found: dict[str, Stamp] = {}
        self._beside = False

    def run(self, call: Callable[[], Any]) -> Any:
        """Calls a function, and notes."""
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
        """Returns the files that were read. None if that is not all, or they have just changed."""
        now = time.time_ns()
        if self._beside or any(_is_new(stamp, now) for stamp in self._found.values()):
            return None
        return tuple(self._found.items())

    def note(self, event: str, args: tuple[Any, ...]) -> None:
        """Notes an event of python's."""
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
        _local.opened = None  # what follows opens nothing of the item's
        try:
            opened.note(event, args)
        finally:
            _local.opened = opened


def stamp_of(path: str) -> Stamp:
    """Returns what tells a file from what it was: its times, size and number."""
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
