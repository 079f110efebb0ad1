"""Training that never computes frozen work twice.

`python -m cachefreeze.train` is the program; the names below are for training loops of one's own.
"""

from cachefreeze.cache import ActivationCache
from cachefreeze.errors import UserError
from cachefreeze.freezeout import (
    FreezeOutLR,
    Schedule,
    freeze,
    param_groups,
    unfreeze,
    units_of,
)
from cachefreeze.lineage import explain

__all__ = [
    "ActivationCache",
    "FreezeOutLR",
    "Schedule",
    "UserError",
    "explain",
    "freeze",
    "param_groups",
    "unfreeze",
    "units_of",
]
