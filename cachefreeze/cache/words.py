"""What a cache has done, in words."""

from collections.abc import Sequence

from cachefreeze.cache.entries import Entries
from cachefreeze.cache.shared import Stats
from cachefreeze.store.files import human_bytes


def in_words(stats: Stats, entries: Entries, messages: Sequence[str]) -> str:
    """Says what a cache has done, and what limits it."""
    total = stats.rows_served + stats.rows_computed
    share = stats.rows_served / total if total else 0.0
    lines = [
        f"{stats.rows_served:,} of {total:,} rows served ({share:.0%}), "
        f"{stats.seconds_saved:.1f} s of frozen work saved (estimated).",
        f"{stats.rows_kept:,} rows kept, {human_bytes(stats.bytes)} of at most "
        f"{human_bytes(entries.max_bytes)}; {entries.dropped:,} rows dropped for want of room.",
    ]
    if stats.batches:
        known = stats.batches_known / stats.batches
        lines.append(
            f"{known:.0%} of {stats.batches:,} batches since the first row came again had only "
            "known rows."
        )
    return "\n".join([*lines, *(f"- {message}" for message in messages)])
