"""Copies values that modules return from a plain pass, even if the pass differs from the trace."""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from cachefreeze.lineage import calls
from cachefreeze.lineage.operations import Call, Trace
from cachefreeze.lineage.program import copy_of
from cachefreeze.lineage.structure import Ref


class ModuleOutput(NamedTuple):
    """A value that a call of a module returns.

    Attributes:
        number: Number of the value.
        module: Weak reference to the module.
        turn: Number of earlier calls of this module in the pass.
    """

    number: int
    module: "weakref.ref[nn.Module]"
    turn: int


def module_outputs(trace: Trace, wanted: Sequence[int]) -> list[ModuleOutput] | None:
    """Finds the calls of modules that return some values. None if no call returns one of them.

    Args:
        trace: Trace of a pass.
        wanted: Numbers of the values.
    """
    turns: Counter[int] = Counter()
    found: dict[int, ModuleOutput] = {}
    for call in trace.calls:
        module = call.module()
        turn = turns[id(module)]
        turns[id(module)] += 1
        number = _returned(call)
        if module is not None and number in wanted:
            # If several calls return the value, the innermost one is found last.
            found[number] = ModuleOutput(number, call.module, turn)
    return [found[number] for number in wanted] if len(found) == len(set(wanted)) else None


def _returned(call: Call) -> int:
    return call.output.number if isinstance(call.output, Ref) else -1


def capture_outputs(
    places: Sequence[ModuleOutput], model: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> tuple[Any, dict[int, torch.Tensor]]:
    """Runs a plain pass and copies outputs of modules.

    Args:
        places: Calls whose outputs are copied.
        model: Module or callable to run.
        *args: Positional arguments of the call.
        **kwargs: Keyword arguments of the call.

    Returns:
        Output of the model, and copies of the values that were made, by number.
    """
    watching = _Watching(places)
    with calls.catching(), calls.follower_of_thread(watching):
        output = model(*args, **kwargs)
    return output, watching.found


class _Watching:
    def __init__(self, places: Sequence[ModuleOutput]) -> None:
        self.found: dict[int, torch.Tensor] = {}
        self._places = {(id(one.module()), one.turn): one.number for one in places}
        self._turns: Counter[int] = Counter()

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call of a module, and copies its output if it is wanted."""
        place = id(module), self._turns[id(module)]
        self._turns[id(module)] += 1
        output = calls.real_call(module, *args, **kwargs)
        number = self._places.get(place)
        if number is not None and isinstance(output, torch.Tensor):
            self.found[number] = copy_of(output.detach())
        return output
