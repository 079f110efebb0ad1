"""FreezeOut (Brock et al., 2017): each unit's rate falls to zero, first units first, and stays."""

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
