"""Compiles the units that train, and runs those that are frozen uncompiled."""

from collections.abc import Sequence

import torch
from torch import nn

from cachefreeze.freezeout import Unit

# Number of times that the code of a module is compiled: for each of its blocks, modes and freezes.
MOST_COMPILED = 256


def compile_units(model: nn.Module, units: Sequence[Unit]) -> list[nn.Module]:
    """Compiles, in place, the largest modules within each unit that trains; returns them.

    Args:
        model: Network to compile.
        units: Units of the network.
    """
    # Blocks of one class share it. Beyond it, whichever came last would run uncompiled: others with
    # the cache than without.
    torch._dynamo.config.cache_size_limit = MOST_COMPILED
    unit_of = {id(p): number for number, unit in enumerate(units) for p in unit.parameters}
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        parameters = list(module.parameters())
        trains = any(parameter.requires_grad for parameter in parameters)
        if trains and len({unit_of[id(parameter)] for parameter in parameters}) == 1:
            module.compile()
            found.append(module)
            return
        for child in module.children():
            look(child)

    look(model)
    return found


def leave_frozen_uncompiled(compiled: list[nn.Module]) -> None:
    """Takes the modules that are frozen by now out of a list, and runs them uncompiled.

    Args:
        compiled: Modules that are compiled.
    """
    for module in list(compiled):
        if not any(parameter.requires_grad for parameter in module.parameters()):
            module._compiled_call_impl = None
            compiled.remove(module)
