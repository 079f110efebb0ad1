"""State that all parts of a cache share: kept rows, hashes, counters, messages."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from cachefreeze.cache.codec import INT8_ERROR, can_be_rounded
from cachefreeze.cache.entries import Entries
from cachefreeze.cache.item_records import ItemRecords
from cachefreeze.cache.moving_weights import MovingWeights
from cachefreeze.cache.offloading import Offloading
from cachefreeze.cache.row_layout import RowLayout
from cachefreeze.cache.statistics import Report, Stats
from cachefreeze.keys import Weights
from cachefreeze.plan.overhead import Overhead

_log = logging.getLogger("cachefreeze")
# Difference that another order of additions may make, as a share of the largest number.
_CLOSE = 1e-4
# Share of the time of served calls that each of two checks may take beyond the necessary ones:
# hashing frozen parameters, and comparing batches.
_SHARE = 0.005


class Filled(BaseException):
    """Ends a call of the model that `fill` has made, as soon as its rows are kept.

    It passes through the user's function. It is no `Exception`, so that `except Exception` there
    does not catch it.
    """


@dataclass
class CacheState:
    """State that all parts of a cache share.

    Attributes:
        entries: Kept rows.
        exact: Whether only values are served whose bits equal those of computed ones.
        probation: Number of batches that are compared before any is served. If None, it depends on
            the skipped kernels.
        weights: Hashes of frozen parameters and buffers.
        stats: Counters.
        overhead: Seconds that caching has cost.
        messages: Sentences that the user was told, by their subject.
        layouts: Layouts of rows in kept values, by all that they depend on.
        filling: Module that `fill` calls at present. None if there is none.
        waits_for_fill: Whether only `fill` keeps further rows in training when more has become
            frozen.
        folder: Folder for records of data sets' items. None if they are not written.
        item_records: Records of data sets' items, by the digest of the data set.
        traces: Function that returns all cached traces.
        held: Number of bytes of batches that are not split into rows yet.
        served_seconds: Seconds of all served calls.
        hash_seconds: Seconds spent on hashes beyond the necessary ones.
        report: Results of the checks.
        most_useless: Largest number of bytes that are written to disk before a row has come again.
        idle_steps: Number of steps of optimizers that hold only frozen parameters. None after a
            step of any other optimizer.
    """

    entries: Entries
    exact: bool
    probation: int | None
    weights: Weights = field(default_factory=Weights)
    stats: Stats = field(default_factory=Stats)
    overhead: Overhead = field(default_factory=Overhead)
    messages: dict[str, str] = field(default_factory=dict)
    layouts: dict[tuple[Any, ...], RowLayout] = field(default_factory=dict)
    filling: nn.Module | None = None
    waits_for_fill: bool = False
    folder: Path | None = None
    item_records: dict[bytes, ItemRecords] = field(default_factory=dict)
    traces: Callable[[], Iterable[Any]] = tuple
    held: int = 0
    served_seconds: float = 0.0
    hash_seconds: float = 0.0
    report: Report = field(default_factory=Report)
    most_useless: int = 0
    idle_steps: int | None = 0

    def __post_init__(self) -> None:
        self.moving = MovingWeights(self.weights)
        self.offloading = Offloading(self.weights, lambda: self.traces())

    def tell(self, about: str, sentence: str) -> None:
        """Tells the user something, once for each subject: in `messages` and in the log."""
        if about not in self.messages:
            self.messages[about] = sentence
            _log.warning("%s", sentence)

    def note(self, about: str, sentence: str) -> None:
        """Keeps a sentence in `messages`. It replaces an earlier one on the same subject."""
        self.messages[about] = sentence
        _log.info("%s", sentence)

    @property
    def serves(self) -> bool:
        """Whether any batch was served yet."""
        return self.stats.rows_served > 0

    def would_serve(self, rows: Sequence[np.ndarray]) -> bool:
        """Returns whether a batch would be served, so that its values are not needed.

        Args:
            rows: Keys of the batch's rows, for each tensor that the batch consists of.
        """
        return any(cached.would_serve(rows) for cached in self.traces())

    def closeness(self, value: Tensor) -> float:
        """Returns how much a kept value may differ from a computed one if `exact=False`.

        Returns:
            Largest difference, as a share of the largest number.
        """
        rounded = self.entries.codec == "int8" and can_be_rounded(value.dtype)
        return INT8_ERROR if rounded else _CLOSE

    @property
    def seconds_to_hash(self) -> float:
        """Seconds that may be spent now on hashes beyond the necessary ones."""
        return 0.0 if self.report.verify == "off" else self._seconds_left(self.hash_seconds)

    def count_hashing(self, seconds: float) -> None:
        """Counts seconds that were spent on hashes beyond the necessary ones."""
        self.report.seconds += seconds
        self.hash_seconds += seconds

    @property
    def may_compare(self) -> bool:
        """Whether there is time for comparisons beyond the necessary ones."""
        return self._seconds_left(self.report.seconds - self.hash_seconds) > 0

    def _seconds_left(self, spent: float) -> float:
        return _SHARE * self.served_seconds - spent

    def find(self, about: str, sentence: str) -> None:
        """Tells the user of a fault that a check has found, and adds it to the report."""
        self.report.found.append(sentence)
        self.tell(about, sentence)
