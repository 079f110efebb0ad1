"""FreezeOut training that skips the forward pass of frozen prefixes.

`python -m cachefreeze.train` is the program; the names below are for training loops of one's own.
"""

from cachefreeze.cache import ActivationCache
from cachefreeze.datasets import IndexedDataset
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
from cachefreeze.models import Units, partition
from cachefreeze.prefix_cache import Materialization, PrefixCache
from cachefreeze.rows import Rows, batches_of, epoch_order

__all__ = [
    "ActivationCache",
    "FreezeOutLR",
    "IndexedDataset",
    "Materialization",
    "PrefixCache",
    "Rows",
    "Schedule",
    "Units",
    "UserError",
    "batches_of",
    "epoch_order",
    "explain",
    "freeze",
    "param_groups",
    "partition",
    "unfreeze",
    "units_of",
]
