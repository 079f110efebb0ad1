"""Keeps what frozen work gives, row by row, and serves it to any training loop.

`ActivationCache` is the public face. A call of a watched module belongs to a *site* (the module),
and to a *route* (one traced way through it). The route's *selection* says what is kept, by which
keys; `entries` holds the rows.
"""

from cachefreeze.cache.activation_cache import ActivationCache

__all__ = ["ActivationCache"]
