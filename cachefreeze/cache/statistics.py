"""Counters of a cache, results of its checks, and a summary of both in words."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cachefreeze.store.files import human_bytes

# Values of the argument `verify`.
VERIFY = ("off", "sample", "all")


@dataclass
class Report:
    """Results of the checks of kept rows and frozen parameters.

    Attributes:
        verify: Amount of checks: "off", "sample" or "all".
        batches_compared: Number of batches that could be served, and were computed and compared.
        rows_compared: Number of rows in these batches.
        rows_served: Number of rows that were served.
        bytes_hashed: Number of bytes of frozen parameters and buffers that were hashed.
        seconds: Seconds that were spent on comparisons, and on hashes beyond the necessary ones.
        changes: Number of times that frozen bits were found to have changed.
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
        """Returns what was checked and found, in a few lines."""
        times = f"{self.changes} times" if self.changes != 1 else "once"
        moved = f"changed {times}" if self.changes else "never changed"
        checked = (
            f"verify={self.verify!r}: {self.rows_compared:,} rows in {self.batches_compared:,} "
            f"batches were computed and compared, and {self.rows_served:,} rows were served. "
            f"{human_bytes(self.bytes_hashed)} of frozen weights were hashed, which {moved}. "
            f"The checks took {self.seconds:.1f} s."
        )
        found = [f"- {sentence}" for sentence in self.found]
        return "\n".join([checked, *(found or ["No row differed."])])


@dataclass
class Stats:
    """Counters of what a cache has done so far.

    Attributes:
        rows_served: Number of rows whose frozen work was skipped.
        rows_computed: Number of rows whose frozen work ran.
        rows_kept: Number of rows that are kept now.
        bytes: Number of bytes of memory of everything that is kept now.
        seconds_saved: Estimated seconds of frozen work that was skipped, less the time that serving
            took.
        batches_known: Number of batches that had only known rows.
        batches: Number of batches since a row has come again for the first time.
    """

    rows_served: int = 0
    rows_computed: int = 0
    rows_kept: int = 0
    bytes: int = 0
    seconds_saved: float = 0.0
    batches_known: int = 0
    batches: int = 0


def in_words(stats: Stats, max_bytes: int, dropped: int, messages: Sequence[str]) -> str:
    """Returns what a cache has done and what limits it, in a few lines.

    Args:
        stats: Counters.
        max_bytes: Largest number of bytes that are kept in memory.
        dropped: Number of rows that were dropped to make room for others.
        messages: Sentences about what limits the cache.
    """
    total = stats.rows_served + stats.rows_computed
    share = stats.rows_served / total if total else 0.0
    lines = [
        f"{stats.rows_served:,} of {total:,} rows served ({share:.0%}), "
        f"{stats.seconds_saved:.1f} s of frozen work saved (estimated).",
        f"{stats.rows_kept:,} rows kept, {human_bytes(stats.bytes)} of at most "
        f"{human_bytes(max_bytes)}; {dropped:,} rows dropped to make room.",
    ]
    if stats.batches:
        known = stats.batches_known / stats.batches
        lines.append(
            f"{known:.0%} of the {stats.batches:,} batches since a row first came again had only "
            "known rows."
        )
    return "\n".join([*lines, *(f"- {message}" for message in messages)])
