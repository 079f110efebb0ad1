"""What all routes of a cache have in common: entries, hashes of frozen bits, counters, messages."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from cachefreeze.cache.binding import Binding
from cachefreeze.cache.codec import INT8_ERROR, can_be_rounded
from cachefreeze.cache.entries import Entries
from cachefreeze.cache.layout import Layout
from cachefreeze.cache.moving import Moving
from cachefreeze.cache.verify import Report
from cachefreeze.keys import Weights
from cachefreeze.plan.pace import Pace

_log = logging.getLogger("cachefreeze")
# Rounding of another order of additions, as a share of the largest number.
_CLOSE = 1e-4
# Share of the time of served calls that goes into each of two checks beyond what must be: hashes of
# frozen bits, and batches that are compared.
_SHARE = 0.005


class Filled(BaseException):
    """Ends a call that was made for the sake of its rows only, once they are kept.

    The caller of `fill` gives the function that it leaves: no `except Exception` may take it.
    """


@dataclass
class Stats:
    """What a cache has done so far.

    Attributes:
        rows_served: Rows whose frozen work was left out.
        rows_computed: Rows whose frozen work ran.
        rows_kept: Rows that are kept now.
        bytes: Bytes of everything that is kept now.
        seconds_saved: Estimated seconds of frozen work that was left out, less what it cost.
        batches_known: Batches all of whose rows were known.
        batches: Batches since rows have come again for the first time.
    """

    rows_served: int = 0
    rows_computed: int = 0
    rows_kept: int = 0
    bytes: int = 0
    seconds_saved: float = 0.0
    batches_known: int = 0
    batches: int = 0


@dataclass
class Shared:
    """What all routes of a cache have in common.

    Attributes:
        entries: Kept rows.
        exact: Whether only values are served that are equal to the last bit.
        probation: Number of batches that are compared before any is served. None for a quarter of
            what came before the first row came again, at least 2 and at most 8.
        weights: Hashes of frozen parameters and buffers.
        stats: Counters.
        moving: Parameters and buffers that move although they take no gradient.
        pace: Seconds that following has cost.
        messages: Sentences that were told, by what they are about.
        layouts: Where the rows are in kept values, by what that depends on.
        filling: Module that is called for the sake of its rows only, if one is.
        folder: Folder in which it is kept what items of data sets are. None if it is not.
        bindings: What is known of the items of data sets, by the hash of what those hold.
        routes: Function that returns all routes.
        held: Bytes of batches that are not taken apart into rows yet.
        served_seconds: Seconds of all calls that were served.
        hash_seconds: Seconds in which frozen bits were hashed beyond what must be.
        report: What was checked and found.
        most_useless: Bytes that are written to the directory before a row has come again.
        idle_steps: Number of steps of optimizers that hold nothing but frozen parameters. None once
            there was a step of another.
    """

    entries: Entries
    exact: bool
    probation: int | None
    weights: Weights = field(default_factory=Weights)
    stats: Stats = field(default_factory=Stats)
    pace: Pace = field(default_factory=Pace)
    messages: dict[str, str] = field(default_factory=dict)
    layouts: dict[tuple[Any, ...], Layout] = field(default_factory=dict)
    filling: nn.Module | None = None
    folder: Path | None = None
    bindings: dict[bytes, Binding] = field(default_factory=dict)
    routes: Callable[[], Iterable[Any]] = tuple
    held: int = 0
    served_seconds: float = 0.0
    hash_seconds: float = 0.0
    report: Report = field(default_factory=Report)
    most_useless: int = 0
    idle_steps: int | None = 0

    def __post_init__(self) -> None:
        self.moving = Moving(self.weights)

    def tell(self, about: str, sentence: str) -> None:
        """Tells the user something, once.

        Args:
            about: What it is about. One sentence is told about each thing.
            sentence: Sentence.
        """
        if about not in self.messages:
            self.messages[about] = sentence
            _log.warning("%s", sentence)

    def note(self, about: str, sentence: str) -> None:
        """Keeps a sentence for who asks, in the place of an earlier one about the same thing."""
        self.messages[about] = sentence
        _log.info("%s", sentence)

    @property
    def serves(self) -> bool:
        """Whether any batch was served yet."""
        return self.stats.rows_served > 0

    def would_serve(self, rows: Sequence[np.ndarray]) -> bool:
        """Says whether a batch is served without a look at its values, as far as can be told.

        Args:
            rows: Keys of its rows, for each of the tensors that it is made of.
        """
        return any(route.would_serve(rows) for route in self.routes())

    def closeness(self, value: Tensor) -> float:
        """Returns how far a kept value may be from a computed one under exact=False.

        Args:
            value: Computed value.

        Returns:
            Largest difference, as a share of the largest number.
        """
        rounded = self.entries.codec == "int8" and can_be_rounded(value.dtype)
        return INT8_ERROR if rounded else _CLOSE

    @property
    def may_hash(self) -> bool:
        """Whether there is time to hash frozen bits beyond what must be."""
        return self.report.verify != "off" and self._has_time(self.hash_seconds)

    @property
    def may_compare(self) -> bool:
        """Whether there is time to compare a batch beyond what must be."""
        return self._has_time(self.report.seconds - self.hash_seconds)

    def _has_time(self, spent: float) -> bool:
        return spent < _SHARE * self.served_seconds

    def find(self, about: str, sentence: str) -> None:
        """Tells the user of something wrong that a check has found."""
        self.report.found.append(sentence)
        self.tell(about, sentence)
