"""Keeps the results of frozen work, row by row, and serves them to any training loop.

`ActivationCache` is the public face. A watched module is a `CachedModule`. It has one `CachedTrace`
for each kind of call that was traced. The trace's `Selection` says which values are kept, and
`Entries` holds their rows.
"""

from cachefreeze.cache.activation_cache import ActivationCache

__all__ = ["ActivationCache"]
