"""The units of a model: the smallest things that freeze, in the order of the forward pass."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cachefreeze import lineage
from cachefreeze.errors import UserError
from cachefreeze.freezeout.freezing import freeze

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Unit:
    """Parameters that freeze together: those of a block, a stem, or a head.

    Attributes:
        name: Path of the first module that they are of.
        parameters: Parameters.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class _Part:
    """Parameters of one module, before they are joined to units.

    Attributes:
        name: Path of the module.
        parameters: Parameters.
        joins: Place of the part that they freeze with, from here: -1 for the one before, which is a
            norm's, 1 for the one behind, which is that of parameters beside modules.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    joins: int = 0


def units_of(model: nn.Module, /, *example: Any, **kwargs: Any) -> list[Unit]:
    """Finds the units of a model.

    Blocks that are repeated are units, and so are the modules beside them. A norm belongs to what
    comes before it, and a parameter beside modules, such as a class token, to what comes after it.
    A parameter that several units share belongs to the last of them, and is trained as long as it.

    Args:
        model: Model.
        *example: Positional arguments of a forward pass. With them, units come in the order in
            which a pass meets their parameters. It runs in eval mode, without gradients, and
            random state is put back. Without any, units come in the order in which the model lists
            them.
        **kwargs: Keyword arguments of that pass.

    Raises:
        UserError: The model has no parameters.
    """
    parts = list(_parts(model, ""))
    holders = Counter(id(one) for part in parts for one in set(part.parameters))
    shared = {number for number, count in holders.items() if count > 1}
    last = {id(one): number for number, part in enumerate(parts) for one in part.parameters}
    parts = [
        replace(part, parameters=tuple(one for one in part.parameters if last[id(one)] == number))
        for number, part in enumerate(parts)
    ]
    parts = [part for part in parts if part.parameters]
    if not parts:
        raise UserError(f"{type(model).__name__} has no parameters: there is nothing to freeze.")
    if example or kwargs:
        parts = _in_order(parts, _met(model, example, kwargs, shared))
    units: list[Unit] = []
    waiting: tuple[nn.Parameter, ...] = ()
    for part in parts:
        if part.joins == 1:
            waiting += part.parameters
        elif part.joins == -1 and units:
            units[-1] = replace(units[-1], parameters=units[-1].parameters + part.parameters)
        else:
            name = part.name or type(model).__name__
            units.append(Unit(name, waiting + part.parameters))
            waiting = ()
    if waiting:
        before = units.pop() if units else Unit(type(model).__name__, ())
        units.append(replace(before, parameters=before.parameters + waiting))
    return units


def count_of(units: Sequence[Unit], first: int | str) -> int:
    """Returns how many units are meant.

    Args:
        units: Units of a model.
        first: Number of them, or of all but so many if it is negative; or the name of the last of
            them, or of a module or group whose last unit it is.

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
        raise UserError(f"cannot freeze {first} units of a network that has {len(units)}")
    return first + len(units) if first < 0 else first


def freeze_units(model: nn.Module, first: int | str, /, *example: Any, **kwargs: Any) -> list[Unit]:
    """Freezes the first units of a model for good, before it trains.

    Args:
        model: Model.
        first: Number or name, see `count_of`.
        *example: Positional arguments of a forward pass, see `units_of`.
        **kwargs: Keyword arguments of that pass.

    Returns:
        Units that are frozen.

    Raises:
        UserError: There are no such units.
    """
    units = units_of(model, *example, **kwargs)
    frozen = units[: count_of(units, first)]
    freeze_parameters(model, [one for unit in frozen for one in unit.parameters])
    return frozen


def freeze_parameters(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Freezes parameters for good, and the modules that have no others but frozen ones.

    Args:
        model: Model that the parameters are of.
        parameters: Parameters.
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
        else:
            freeze(module)


def _parts(module: nn.Module, path: str) -> Iterator[_Part]:
    """Walks down to the smallest things that freeze."""
    is_root = not path
    if not is_root and type(module) not in _CONTAINERS and not _holds_blocks(module):
        parameters = tuple(module.parameters())
        if parameters:
            is_norm = "norm" in type(module).__name__.lower() and not [*module.children()]
            yield _Part(path, parameters, -1 if is_norm else 0)
        return
    children = list(module.named_children())
    own = tuple(module.parameters(recurse=False))
    if own:
        has_others = len(own) < len([*module.parameters()])
        yield _Part(path, own, 1 if has_others else 0)
    for name, child in children:
        yield from _parts(child, f"{path}.{name}" if path else name)


def _holds_blocks(module: nn.Module) -> bool:
    """Says whether a module has a container of several blocks of one class somewhere in it."""
    for part in module.modules():
        if not isinstance(part, _CONTAINERS):
            continue
        kinds = [type(child) for child in part.children() if _is_block(child)]
        if len(kinds) > len(set(kinds)):
            return True
    return False


def _is_block(module: nn.Module) -> bool:
    """Says whether a module has several layers with weights, and not one with its norm."""
    weights = (own for part in module.modules() for own in part.parameters(recurse=False))
    return sum(one.dim() > 1 for one in weights) > 1


def _met(
    model: nn.Module, example: Any, kwargs: Mapping[str, Any], shared: Collection[int]
) -> dict[int, int]:
    """Returns the number of the first operation that takes each parameter, in a forward pass.

    Of shared parameters, which are by `id`, it is the last one.
    """
    modes = [(part, part.training) for part in model.modules()]
    places = (one for one in (*example, *kwargs.values()) if isinstance(one, torch.Tensor))
    devices = {one.device for one in places if one.device.type == "cuda"}
    try:
        for part, _ in modes:
            part.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            _, trace = lineage.trace(model, *example, **kwargs)
    finally:
        for part, training in modes:
            part.training = training
    found: dict[int, int] = {}
    numbers = {state.value: id(state.tensor()) for state in trace.states}
    for operation in trace.operations:
        for number in {numbers[one] for one in operation.reads if one in numbers}:
            if number in shared or number not in found:
                found[number] = operation.number
    return found


def _in_order(parts: Sequence[_Part], met: Mapping[int, int]) -> list[_Part]:
    """Sorts parts by when they are met. What is never met stays behind what is listed before it."""
    places: list[int] = []
    for part in parts:
        found = [met[id(one)] for one in part.parameters if id(one) in met]
        places.append(min(found) if found else (places[-1] if places else -1))
    return [part for _, part in sorted(zip(places, parts, strict=True), key=lambda one: one[0])]
