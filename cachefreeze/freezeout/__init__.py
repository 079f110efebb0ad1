"""FreezeOut (Brock et al., 2017): units freeze one by one, as their rates fall to zero."""

from cachefreeze.freezeout.freezing import freeze, unfreeze
from cachefreeze.freezeout.schedule import SHAPES, Schedule
from cachefreeze.freezeout.scheduler import FreezeOutLR, param_groups
from cachefreeze.freezeout.units import Unit, count_of, freeze_units, units_of

__all__ = [
    "SHAPES",
    "FreezeOutLR",
    "Schedule",
    "Unit",
    "count_of",
    "freeze",
    "freeze_units",
    "param_groups",
    "unfreeze",
    "units_of",
]
