"""Stand-in until the package of the other branch is merged."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from cachefreeze.errors import UserError
from cachefreeze.freezeout.freezing import freeze


@dataclass(frozen=True)
class Unit:
    name: str
    parameters: tuple[nn.Parameter, ...]


def units_of(model: nn.Module, *example: Any, **kwargs: Any) -> list[Unit]:
    units: list[Unit] = []
    for name, child in model.named_children():
        parameters = tuple(child.parameters())
        if sum(p.dim() > 1 for p in parameters) and parameters:
            units.append(Unit(name, parameters))
        elif parameters and units:
            units[-1] = Unit(units[-1].name, units[-1].parameters + parameters)
    return units


def count_of(units: list[Unit], first: int | str) -> int:
    names = [unit.name for unit in units]
    if isinstance(first, str):
        if first not in names:
            raise UserError(f"there is no unit {first}")
        first = names.index(first) + 1
    return first if first >= 0 else len(units) + first


def freeze_units(model: nn.Module, first: int | str, *example: Any) -> int:
    units = units_of(model, *example)
    count = count_of(units, first)
    names = [unit.name for unit in units]
    for name in names[:count]:
        freeze(model.get_submodule(name))
    return count
