"""Relates the kept values of an old plan to a new plan, when more of the model is frozen."""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from cachefreeze.lineage.operations import FROZEN, Trace
from cachefreeze.lineage.plan import Plan
from cachefreeze.lineage.program import Program
from cachefreeze.lineage.structure import Ref

_Any = TypeVar("_Any")


class Extension:
    """Kept values of an old plan, as values of a new plan of the same model.

    Args:
        old: Plan from before the change.
        new: Plan of the same model with more frozen parameters.

    Attributes:
        is_complete: Whether all kept values of the new plan can be computed from the old ones.
    """

    def __init__(self, old: Plan, new: Plan) -> None:
        same = same_values(old.trace, new.trace)
        self._numbers = {number: same[number] for number in old.cut.kept if number in same}
        found = computable(new.trace, self._numbers.values())
        self.is_complete = found.issuperset(new.cut.kept)

    def values(self, kept: Mapping[int, _Any]) -> dict[int, _Any]:
        """Renumbers a mapping, from the numbers of the old plan to those of the new plan.

        Args:
            kept: Mapping from the numbers of kept values in the old plan to anything.
        """
        return {
            self._numbers[number]: each for number, each in kept.items() if number in self._numbers
        }


def same_values(old: Trace, new: Trace) -> dict[int, int]:
    """Finds the values that are the same in two traces of one model.

    Args:
        old: Trace of a pass.
        new: Trace of a later pass.

    Returns:
        Numbers in the new trace by numbers in the old one, up to the first different operation.
    """
    same = dict(zip(old.inputs, new.inputs, strict=False))
    states = {id(state.tensor()): state.value for state in new.states if state.tensor() is not None}
    for state in old.states:
        if id(state.tensor()) in states:
            same[state.value] = states[id(state.tensor())]
    for one, other in zip(old.operations, new.operations, strict=False):
        alike = one.name == other.name and len(one.makes) == len(other.makes)
        if not alike or not _alike((one.args, one.kwargs), (other.args, other.kwargs), same):
            break
        same.update(zip(one.makes, other.makes, strict=True))
    return same


def _alike(one: Any, other: Any, same: Mapping[int, int]) -> bool:
    if isinstance(one, Ref):
        return isinstance(other, Ref) and same.get(one.number) == other.number
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(_alike(a, b, same) for a, b in zip(one, other))  # noqa: B905
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[k], other[k], same) for k in one)
    if isinstance(one, slice):
        return _alike((one.start, one.stop, one.step), (other.start, other.stop, other.step), same)
    return one is other or bool(one == other)


def computable(trace: Trace, given: Collection[int]) -> set[int]:
    """Returns the values that can be computed from given ones.

    The frozen work that led to the given values is not run again. Values that need it are left out.
    """
    behind = {one.number for one in Program(trace).needed(given, ()) if one.kind == FROZEN}
    values = trace.values
    found = {value.number for value in values if value.operation < 0} | set(given)
    for operation in trace.operations:
        if operation.number not in behind and found.issuperset(operation.reads):
            found.update(operation.makes)
    return found


def way_from(plan: Plan, given: Collection[int]) -> tuple[list[int], float]:
    """Finds how the kept values of a plan are computed from given ones.

    Args:
        plan: Plan whose kept values are computed.
        given: Numbers of frozen values that exist already.

    Returns:
        Numbers of the given values that are read, and seconds of the kernels that are left out. No
        numbers if some kept value cannot be computed without the work that led to the given ones.
    """
    kept, program = plan.cut.kept, plan.program
    if not computable(plan.trace, given).issuperset(kept):
        return [], 0.0
    operations = program.needed(kept, given)
    read = {number for one in operations for number in one.reads} | set(kept)
    seconds = sum(one.seconds for one in program.needed(kept, ()))
    return sorted(read.intersection(given)), seconds - sum(one.seconds for one in operations)
