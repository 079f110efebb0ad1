"""The units of a model: the smallest things that freeze, in the order of the forward pass."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import nn

from cachefreeze import lineage
from cachefreeze.errors import UserError
from cachefreeze.freezeout.freezing import freeze
from cachefreeze.lineage.undone import undone

Parameters = tuple[nn.Parameter, ...]
# What a part does that is no unit by itself.
_JOINS_BEFORE, _JOINS_NEXT = -1, 1


@dataclass(frozen=True)
class Unit:
    """Parameters that freeze together: those of a block, a stem, or a head.

    Attributes:
        name: Path of the largest module whose parameters are all in the unit, or of the first
            module.
        parameters: Parameters of the unit.
    """

    name: str
    parameters: Parameters


@dataclass(frozen=True)
class _Part:
    """Parameters of one module, before parts are joined to units.

    Attributes:
        name: Path of the module.
        parameters: Parameters of the module.
        joins: Part that it freezes with: -1 for the one before, 1 for the next one, 0 for none.
    """

    name: str
    parameters: Parameters
    joins: int = 0


def units_of(model: nn.Module, /, *example: Any, **kwargs: Any) -> list[Unit]:
    """Finds the units of a model.

    Blocks that are repeated are units, and so are the modules beside them. A norm belongs to what
    comes before it, or to what follows if it is the first in a container. A parameter beside
    modules, such as a class token, belongs to what comes after it.

    A parameter that several modules hold belongs to the last of them. One that is used again after
    later units freezes with the unit that follows its last use: the weight that an embedding shares
    with the head trains as long as the head.

    Args:
        model: Model whose units are found.
        *example: Positional arguments of a forward pass. With them, units come in the order in
            which the pass meets their parameters. It runs once, in eval mode and without gradients;
            modes, buffers and random state are put back. Modules that it does not meet freeze with
            the last unit. Without an example, units come in the order in which the model lists
            them, which is wrong for a model that registers its modules in another order.
        **kwargs: Keyword arguments of that pass.

    Returns:
        Units in order. Each parameter of the model is in one of them.

    Raises:
        UserError: The model has no parameters.
    """
    parts = list(_parts(model, Counter(map(type, model.modules())), is_root=True))
    if not parts:
        raise UserError(f"{type(model).__name__} has no parameters: there is nothing to freeze.")
    met = _met(model, example, kwargs) if example or kwargs else {}
    return _joined(model, _in_order(parts, met))


def count_of(units: Sequence[Unit], first: int | str) -> int:
    """Returns the number of the first units that a number or a name stands for.

    Args:
        units: Units of a model.
        first: Number of units. If it is negative, that many units at the end are left out. Or a
            name: that of the last of these units, or of a module or group that ends with it.

    Raises:
        UserError: There are no such units.
    """
    if isinstance(first, str):
        within = (f"{first}.", f"{first}_")
        found = [n for n, one in enumerate(units) if f"{one.name}.".startswith(within)]
        if not found:
            names = ", ".join(one.name for one in units)
            raise UserError(f"the network has no unit {first!r}: it has {names}")
        return found[-1] + 1
    if not -len(units) <= first <= len(units):
        raise UserError(
            f"cannot freeze {first} units of a network that has {len(units)}: give a smaller number"
        )
    return first + len(units) if first < 0 else first


def freeze_units(model: nn.Module, first: int | str, /, *example: Any, **kwargs: Any) -> list[Unit]:
    """Freezes the first units of a model for good, before it trains.

    Args:
        model: Model whose units are frozen.
        first: Number of units, or name of the last of them. If the number is negative, that many
            units at the end are left out.
        *example: Positional arguments of a forward pass, which shows the order of the units.
        **kwargs: Keyword arguments of that pass.

    Returns:
        Units that have been frozen.

    Raises:
        UserError: There are no such units.
    """
    units = units_of(model, *example, **kwargs)
    frozen = units[: count_of(units, first)]
    freeze_parameters(model, [one for unit in frozen for one in unit.parameters])
    return frozen


def freeze_parameters(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Freezes parameters for good, and the modules that have no others but frozen ones.

    In a plain `Sequential`, modules without parameters freeze too if something behind them is
    frozen: noise of a dropout would reach frozen modules. Elsewhere their order is not known.

    Args:
        model: Model that holds the parameters.
        parameters: Parameters to freeze.
    """
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    frozen = {id(one) for one in parameters}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        held = list(module.parameters())
        if not any(id(one) in frozen for one in held):
            continue
        if any(one.requires_grad for one in held):
            waiting += module.children()
            if isinstance(module, nn.Sequential) and _is_container(module):
                freeze(*_amid_frozen(list(module)))
        else:
            freeze(module)


def _amid_frozen(children: Sequence[nn.Module]) -> list[nn.Module]:
    """Finds modules without parameters that run before something frozen, and not behind it."""
    behind: list[nn.Module] = []
    for child in reversed(children):
        first = next(child.parameters(), None)
        if first is not None and not first.requires_grad:
            break
        behind.append(child)
    before = children[: len(children) - len(behind)]
    return [
        one for one in before if not _has_parameters(one) and all(one is not it for it in behind)
    ]


def _parts(
    module: nn.Module, kinds: Mapping[type, int], path: str = "", is_root: bool = False
) -> Iterator[_Part]:
    """Yields the smallest parts of a module that freeze.

    Args:
        module: Module whose parts are found.
        kinds: Number of modules of each class in the model.
        path: Path of the module in the model.
        is_root: Whether it is the model, or all that a wrapper around it holds.
    """
    if not is_root and not _is_container(module) and not _holds_blocks(module, kinds):
        if parameters := tuple(module.parameters()):
            yield _Part(path, parameters, _JOINS_BEFORE if _is_norm(module) else 0)
        return
    children = [(name, one) for name, one in module.named_children() if _has_parameters(one)]
    if own := tuple(module.parameters(recurse=False)):
        yield _Part(path, own, _JOINS_NEXT if children else 0)
    for number, (name, child) in enumerate(children):
        inner = _parts(
            child,
            kinds,
            f"{path}.{name}" if path else name,
            is_root=is_root and not own and len(children) == 1,
        )
        if number == 0 and _is_norm(child) and len(children) > 1:
            yield from (replace(part, joins=_JOINS_NEXT) for part in inner)
        else:
            yield from inner


def _is_container(module: nn.Module) -> bool:
    """Says whether a module does nothing but hold others, in order."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return type(module).forward is nn.Module.forward
    return type(module) is nn.Sequential


def _is_norm(module: nn.Module) -> bool:
    is_plain = not any(map(_has_parameters, module.children()))
    return is_plain and "norm" in type(module).__name__.lower()


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _holds_blocks(module: nn.Module, kinds: Mapping[type, int]) -> bool:
    """Says whether a module has a container of several blocks of one class somewhere in it.

    In a module of a class that the model has once, such as an encoder, layers with their norm are
    blocks. In one that it has several times, they are what a block consists of.
    """
    least = 1 if kinds[type(module)] == 1 else 2
    for part in module.modules():
        if isinstance(part, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            blocks = [type(child) for child in part.children() if _is_block(child, least)]
            if len(blocks) > len(set(blocks)):
                return True
    return False


def _is_block(module: nn.Module, least: int) -> bool:
    weights = (one for part in module.modules() for one in part.parameters(recurse=False))
    has_parts = next(module.children(), None) is not None
    return has_parts and sum(one.dim() > 1 for one in weights) >= least


def _met(model: nn.Module, example: Any, kwargs: Mapping[str, Any]) -> dict[int, int]:
    """Runs a forward pass; returns the number of the last operation that takes each parameter."""
    with undone([model]), _in_eval_mode(model), torch.no_grad():
        _, trace = lineage.trace(model, *example, **kwargs)
    numbers = {state.value: id(state.tensor()) for state in trace.states}
    met: dict[int, int] = {}
    for operation in trace.operations:
        for value in operation.reads:
            if value in numbers:
                met[numbers[value]] = operation.number
        # A parameter that is written to in place has another number from then on.
        numbers |= {new: numbers[old] for old, new in operation.writes if old in numbers}
    return met


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts all of a model in eval mode, and its modes back."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, training in modes:
            part.training = training


def _in_order(parts: Sequence[_Part], met: Mapping[int, int]) -> list[_Part]:
    """Sorts parts by when they are met, with each parameter in one of them only.

    Args:
        parts: Parts as the model lists them.
        met: Number of the last operation that takes each parameter, by `id`.
    """

    def place(part: _Part) -> int | float:
        return min((met[id(one)] for one in part.parameters if id(one) in met), default=inf)

    if met:
        parts = sorted(parts, key=place)
    places = [place(part) for part in parts] if met else []
    home: dict[int, int] = {}
    for number, part in enumerate(parts):
        for one in map(id, part.parameters):
            behind = bisect_left(places, met.get(one, -1))  # what is met first after its last use
            is_used_again = behind > number + 1
            home[one] = min(behind, len(parts) - 1) if is_used_again else number
    found: list[dict[int, nn.Parameter]] = [{} for _ in parts]
    for part in parts:
        for parameter in part.parameters:
            found[home[id(parameter)]][id(parameter)] = parameter
    return [
        replace(
            part,
            parameters=tuple(inside.values()),
            joins=_JOINS_BEFORE if met and place(part) == inf else part.joins,
        )
        for part, inside in zip(parts, found, strict=True)
        if inside
    ]


def _joined(model: nn.Module, parts: Sequence[_Part]) -> list[Unit]:
    """Makes units of parts."""
    units: list[Unit] = []
    waiting: Parameters = ()
    for part in parts:
        if part.joins == _JOINS_BEFORE and units and not waiting:
            units[-1] = replace(units[-1], parameters=units[-1].parameters + part.parameters)
        elif part.joins:
            waiting += part.parameters
        else:
            units.append(Unit(part.name, waiting + part.parameters))
            waiting = ()
    if waiting:
        before = units.pop() if units else Unit("", ())
        units.append(replace(before, parameters=before.parameters + waiting))
    return [replace(unit, name=_name(model, unit)) for unit in units]


def _name(model: nn.Module, unit: Unit) -> str:
    inside = {id(one) for one in unit.parameters}
    steps = unit.name.split(".")
    for count in range(1, len(steps)):
        path = ".".join(steps[:count])
        if inside.issuperset(map(id, model.get_submodule(path).parameters())):
            return path
    return unit.name or type(model).__name__
