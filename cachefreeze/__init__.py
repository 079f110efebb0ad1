"""A cache for the frozen work of a model, and FreezeOut training.

`python -m cachefreeze.train` and `python -m cachefreeze.probe` are the programs. The names below
are for your own training loops.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from cachefreeze.probing.probe import probe
    from cachefreeze.store.copying import copy

__all__ = [
    "ActivationCache",
    "FreezeOutLR",
    "Schedule",
    "UserError",
    "copy",
    "explain",
    "freeze",
    "param_groups",
    "probe",
    "unfreeze",
    "units_of",
]

# Imported when they are asked for: a program's help, and a script that reads a folder of rows, do
# without torch and its seconds.
_HOMES = {
    "cache": ("ActivationCache",),
    "errors": ("UserError",),
    "freezeout": ("FreezeOutLR", "Schedule", "freeze", "param_groups", "unfreeze", "units_of"),
    "lineage": ("explain",),
    "probing.probe": ("probe",),
    "store.copying": ("copy",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"cachefreeze.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
