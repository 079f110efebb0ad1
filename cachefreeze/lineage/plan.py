"""Plans for each event of a trace: what a replay does, and what a capture does."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from cachefreeze.lineage.cut import Cut
from cachefreeze.lineage.operations import (
    CONSTANT,
    INPUT,
    SWITCH,
    Call,
    Enter,
    Operation,
    Step,
    Trace,
)
from cachefreeze.lineage.program import Program
from cachefreeze.lineage.structure import Ref, numbers


class Action(Enum):
    """What is done at an event.

    Operations are run or skipped. Calls of modules are followed inside, handled as a whole, or run
    without being followed.
    """

    RUN = "run"
    SKIP = "skip"
    FOLLOW = "follow"
    WHOLE = "whole"
    UNFOLLOWED = "unfollowed"


@dataclass(eq=False, slots=True)
class Planned:
    """An operation or a call of a module, and what is done with it.

    Attributes:
        action: Action at this event.
        operation: Operation. None for a call.
        call: Call of a module. None for an operation.
        checked: Whether the arguments must be equal to those in the trace.
        tracked: Numbers of the made values that arguments are compared with later.
        kept: Numbers of the made values that are kept.
        saved: Numbers of the values that are copied before they are written to.
        guards: Operations on the batch whose results decided which path the module took.
        inside: Operations in a call that is handled as a whole.
        writes: Pairs of a value before a write and the value after it.
        returned: Whether the call may return one of its arguments. It must return the same object
            then.
        simple: Number of the made value, if there is only one, it is new, and nothing is written
            to. Otherwise -1.
    """

    action: Action
    operation: Operation | None = None
    call: Call | None = None
    checked: bool = False
    tracked: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()
    saved: frozenset[int] = frozenset()
    guards: tuple[Operation, ...] = ()
    inside: tuple[Operation, ...] = ()
    writes: tuple[tuple[int, int], ...] = ()
    returned: bool = False
    simple: int = -1


_LEFT_OUT = (Action.SKIP, Action.WHOLE)


class Plan:
    """A trace and a cut, prepared for replays.

    Args:
        trace: Trace of a pass.
        cut: Values to keep, and operations that run.

    Attributes:
        trace: Trace of a pass.
        cut: Values to keep, and operations that run.
        program: Operations of the trace, which can be run again.
        replayed: Plan for each event of a replay. None at the end of a call.
        captured: Plan for each event of a capture. None at the end of a call.
        last_skipped: Position of the last event at which a replay has something to leave out.
        states: Numbers of the parameters and buffers, by `id` of the tensor.
        followed: Largest number of events at which a replay or a capture does something.
    """

    def __init__(self, trace: Trace, cut: Cut) -> None:
        self.trace = trace
        self.cut = cut
        self.program = Program(trace)
        self._kept = frozenset(cut.kept)
        skipped = {one.number for one in trace.operations} - cut.runs
        lineage = {one.number for one in self.program.needed(cut.kept, ())}
        self.replayed = self._events(skipped, skipped)
        self.captured = self._events((), lineage)
        self.last_skipped = max(
            (
                place if one.call is None else one.call.leave
                for place, one in enumerate(self.replayed)
                if one is not None and (one.action in _LEFT_OUT or one.saved)
            ),
            default=-1,
        )
        self.followed = max(_steps(self.replayed), _steps(self.captured))
        self.states: dict[int, int] = {}
        for state in trace.states:
            tensor = state.tensor()
            if tensor is not None:
                self.states[id(tensor)] = state.value

    def modules_around(self) -> set[int]:
        """Returns the modules, by `id`, in whose calls operations are left out, or none runs."""
        left_out: set[int] = set()
        runs: set[int] = set()
        for operation in self.trace.operations:
            calls = runs if operation.number in self.cut.runs else left_out
            number = operation.call
            while number >= 0 and number not in calls:
                calls.add(number)
                number = self.trace.calls[number].parent
        modules = [
            one.module()
            for one in self.trace.calls
            if one.number in left_out or one.number not in runs
        ]
        return {id(module) for module in modules if module is not None}

    def _events(self, skipped: Collection[int], compared: Collection[int]) -> list[Planned | None]:
        """Plans each event.

        Args:
            skipped: Numbers of the operations that are left out.
            compared: Numbers of the operations whose arguments must be equal to those in the trace.
        """
        trace = self.trace
        calls = {one.number: self._as_a_whole(one, skipped, compared) for one in trace.calls}
        compared, last = self._compared(compared, [p.call for p in calls.values() if p and p.call])
        taken = frozenset(last)
        late = frozenset(n for one in skipped for n in trace.operations[one].reads)
        events: list[Planned | None] = []
        for event in trace.events:
            if isinstance(event, Step):
                operation = trace.operations[event.operation]
                events.append(self._operation(operation, skipped, compared, taken, late))
            elif isinstance(event, Enter):
                planned = calls[event.call]
                if planned is None:
                    planned = self._not_whole(trace.calls[event.call], compared, last)
                elif planned.call is not None:
                    planned.tracked = taken.intersection(numbers(planned.call.results))
                events.append(planned)
            else:
                events.append(None)
        return events

    def _compared(
        self, compared: Collection[int], calls: Collection[Call]
    ) -> tuple[set[int], dict[int, int]]:
        """Adds the operations that make the compared arguments, since these must be equal, too.

        Returns:
            Compared operations, and for each value among their arguments the last event that takes
            it.
        """
        operations, values = self.trace.operations, self.trace.values
        found = set(compared)
        last: dict[int, int] = {}
        wanted: list[tuple[int, int]] = [
            (number, call.enter)
            for call in calls
            for number in (*numbers(call.args), *numbers(call.kwargs))
        ]
        wanted += [(n, operations[one].event) for one in found for n in operations[one].reads]
        while wanted:
            number, event = wanted.pop()
            seen = number in last
            last[number] = max(event, last.get(number, -1))
            made_by = values[number].operation
            if seen or made_by < 0:
                continue
            # A written tensor is compared from value to value.
            wanted += [(old, operations[made_by].event) for old, new in operations[made_by].writes
                       if new == number]  # fmt: skip
            if made_by in found or not operations[made_by].skippable:
                continue
            found.add(made_by)
            wanted += [(n, operations[made_by].event) for n in operations[made_by].reads]
        return found, last

    def _operation(
        self,
        operation: Operation,
        skipped: Collection[int],
        compared: Collection[int],
        taken: frozenset[int],
        late: frozenset[int],
    ) -> Planned:
        skip = operation.number in skipped
        tracked = taken.intersection(operation.makes)
        kept = self._kept.intersection(operation.makes)
        simple = -1
        if skip and not operation.writes:
            output = operation.output
            if isinstance(output, Ref) and output.number in operation.makes:
                simple = output.number
        return Planned(
            Action.SKIP if skip else Action.RUN,
            operation,
            checked=operation.number in compared,
            tracked=tracked,
            kept=kept,
            writes=operation.writes,
            returned=bool(operation.writes)
            or not set(numbers(operation.output)).isdisjoint(operation.reads),
            saved=late.intersection(old for old, _ in operation.writes),
            simple=simple,
        )

    def _inside(self, call: Call) -> list[Operation]:
        return [
            self.trace.operations[event.operation]
            for event in self.trace.events[call.enter : call.leave]
            if isinstance(event, Step)
        ]

    def _as_a_whole(
        self, call: Call, skipped: Collection[int], compared: Collection[int]
    ) -> Planned | None:
        """Returns the plan for a call that is handled as a whole. None if it cannot be."""
        inside = self._inside(call)
        if call.why_not_whole or not any(one.number in compared for one in inside):
            return None
        kept = self._kept.intersection(number for one in inside for number in one.makes)
        if not self._is_whole(inside):
            return None
        if not skipped and not kept <= set(numbers(call.results)):
            return None  # in a capture, which skips nothing, kept values must be in the results
        guards = tuple(one for one in inside if one.escapes)
        writes = tuple(pair for one in inside for pair in one.writes)
        given = {*numbers(call.args), *numbers(call.kwargs)}
        returned = bool(writes) or not given.isdisjoint(numbers(call.results))
        return Planned(
            Action.WHOLE,
            call=call,
            checked=True,
            kept=kept,
            guards=guards,
            inside=tuple(inside),
            writes=writes,
            returned=returned,
        )

    def _not_whole(self, call: Call, compared: Collection[int], last: dict[int, int]) -> Planned:
        inside = self._inside(call)
        made = {number for one in inside for number in one.makes}
        taken_later = any(last.get(number, -1) >= call.leave for number in made)
        quiet = all(one.number not in compared for one in inside)
        unfollowed = quiet and not taken_later and not self._kept & made
        return Planned(Action.UNFOLLOWED if unfollowed else Action.FOLLOW, call=call)

    def _is_whole(self, inside: list[Operation]) -> bool:
        """Returns whether operations can be left out together.

        Numbers that Python took from the batch are no obstacle, since they are compared before.
        """
        for one in inside:
            if one.escapes and not one.must_run:
                reads = [self.trace.values[number] for number in one.reads]
                if any(value.kind not in (INPUT, CONSTANT) for value in reads):
                    return False
            elif not one.skippable and one.must_run != SWITCH:
                return False
        return True


def _steps(events: Sequence[Planned | None]) -> int:
    """Returns the number of events without those inside of calls that are not followed."""
    at = steps = 0
    while at < len(events):
        planned = events[at]
        if planned is not None and planned.call is not None and planned.action is not Action.FOLLOW:
            at = planned.call.leave
        at += 1
        steps += 1
    return steps
