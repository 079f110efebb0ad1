"""FreezeOut (stand-in until the package of the other branch is merged)."""

from cachefreeze.freezeout.freezing import freeze, unfreeze
from cachefreeze.freezeout.schedule import Schedule
from cachefreeze.freezeout.scheduler import FreezeOutLR, param_groups
from cachefreeze.freezeout.units import Unit, count_of, freeze_units, units_of

__all__ = [
    "FreezeOutLR", "Schedule", "Unit", "count_of", "freeze", "freeze_units", "param_groups", "unfreeze",
    "units_of",
]  # fmt: skip
