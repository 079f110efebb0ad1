"""Hashes frozen bits a last time, so that no late change of them stays unknown."""

from collections.abc import Iterable
from time import perf_counter

from cachefreeze.cache.cache_state import CacheState
from cachefreeze.cache.cached_trace import CachedTrace


def hash_all(traces: Iterable[CachedTrace], shared: CacheState) -> None:
    """Hashes all frozen bits from which rows were served, and tells the user of late changes.

    Args:
        traces: Traces whose rows may have been served.
        shared: State that all parts of the cache share.
    """
    if shared.report.verify == "off":
        return
    began = perf_counter()
    used = [one for one in traces if one.was_used]
    # Traces share parameters, and all of them are marked before any is hashed: each is hashed once.
    for one in used:
        one.selection.frozen.doubt_all()
    for one in used:
        one.look_at_weights()
    shared.count_hashing(perf_counter() - began)
