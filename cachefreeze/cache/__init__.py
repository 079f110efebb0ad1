"""Keeps the results of frozen work, row by row, and serves them to any training loop.

`ActivationCache` is the public face. A watched module is a `CachedModule`. It has one `CachedTrace`
for each kind of call that was traced. The trace's `Selection` chooses the values that are kept, and
`Entries` holds their rows.

Words of this package: a *row* is one sample of a batch. Its *key* is a hash of its content. A *kept
value* is a tensor that is kept for each row and stands in for frozen work. A *trace* records one
forward pass. It gives each tensor a *number*, and "by number" means a dictionary with these numbers
as its keys.
"""

from cachefreeze.cache.activation_cache import ActivationCache

__all__ = ["ActivationCache"]
