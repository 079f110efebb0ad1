"""A cache for the frozen work of a model, and FreezeOut training.

`python -m cachefreeze.train` and `python -m cachefreeze.probe` are the programs. The names below are
for your own training loops.
"""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from cachefreeze.probing import probe

__all__ = [
    "ActivationCache",
    "FreezeOutLR",
    "Schedule",
    "UserError",
    "explain",
    "freeze",
    "param_groups",
    "probe",
    "unfreeze",
    "units_of",
]


def __getattr__(name: str) -> Any:
    """Returns `probe`, which is imported when it is asked for: others do without what it needs."""
    if name == "probe":
        from cachefreeze.probing import probe

        return probe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
