"""A cache for the frozen work of a model, and FreezeOut training.

`python -m cachefreeze.train` is the program. The names below are for your own training loops.
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
