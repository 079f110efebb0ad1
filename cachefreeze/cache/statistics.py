"""Counters of a cache, what its checks have found, and both in words."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cachefreeze.files import human_bytes

# How much is checked beyond what must be.
VERIFY = ("off", "sample", "all")


@dataclass
class Report:
    """What was checked of kept rows, and what was found.

    Attributes:
        verify: How much is checked: "off", "sample" or "all".
        batches_compared: Batches that could be served and were computed and compared.
        rows_compared: Rows of them.
        rows_served: Rows that were served.
        bytes_hashed: Bytes of frozen parameters and buffers that were hashed.
        seconds: Seconds that comparing and hashing beyond what must be has taken.
        changes: Number of times that frozen bits were found to be others than before.
        found: Sentences about rows that differed, and about changes that were found late.
    """

    verify: str = "sample"
    batches_compared: int = 0
    rows_compared: int = 0
    rows_served: int = 0
    bytes_hashed: int = 0
    seconds: float = 0.0
    changes: int = 0
    found: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Says what was checked and found, in a few lines."""
        times = f"{self.changes} times" if self.changes != 1 else "once"
        moved = f"changed {times}" if self.changes else "never changed"
        checked = (
            f"verify={self.verify!r}: {self.rows_compared:,} rows in {self.batches_compared:,} "
            f"batches were computed and compared, beside {self.rows_served:,} served ones; "
            f"{human_bytes(self.bytes_hashed)} of frozen weights were hashed, which {moved}; "
            f"{self.seconds:.1f} s."
        )
        found = [f"- {sentence}" for sentence in self.found]
        return "\n".join([checked, *(found or ["No row differed."])])


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


def in_words(stats: Stats, max_bytes: int, dropped: int, messages: Sequence[str]) -> str:
    """Says what a cache has done, and what limits it.

    Args:
        stats: Counters.
        max_bytes: Largest number of bytes that are kept in memory.
        dropped: Number of rows that were dropped because others needed their room.
        messages: Sentences that say what limits the cache.
    """
    total = stats.rows_served + stats.rows_computed
    share = stats.rows_served / total if total else 0.0
    lines = [
        f"{stats.rows_served:,} of {total:,} rows served ({share:.0%}), "
        f"{stats.seconds_saved:.1f} s of frozen work saved (estimated).",
        f"{stats.rows_kept:,} rows kept, {human_bytes(stats.bytes)} of at most "
        f"{human_bytes(max_bytes)}; {dropped:,} rows dropped for want of room.",
    ]
    if stats.batches:
        known = stats.batches_known / stats.batches
        lines.append(
            f"{known:.0%} of {stats.batches:,} batches since the first row came again had only "
            "known rows."
        )
    return "\n".join([*lines, *(f"- {message}" for message in messages)])
