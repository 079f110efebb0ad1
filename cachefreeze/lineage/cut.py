"""Chooses the values to keep: those between frozen and trained work, or the cheapest."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cachefreeze.lineage.flow import side_of_source
from cachefreeze.lineage.operations import FROZEN, INPUT, Operation, Trace

# Capacity of an edge that is never cut. Costs are whole steps, so that sums of them are exact.
_CAPACITY = 1 << 30


@dataclass(frozen=True)
class Cut:
    """The values that are kept, and the operations that still run in a replay.

    Attributes:
        kept: Numbers of the kept values, in order.
        runs: Numbers of the operations that run in a replay. All others are left out.
        nbytes: Bytes of the kept values of the traced batch.
        seconds_again: Seconds of the kernels that run again although they could be left out.
        seconds_saved: Seconds of the kernels that are left out.
    """

    kept: tuple[int, ...]
    runs: frozenset[int]
    nbytes: int
    seconds_again: float
    seconds_saved: float


def crossing_cut(trace: Trace) -> Cut:
    """Keeps every frozen value that trained work, live work or the output takes.

    Operations that depend on the batch alone, or on nothing, run again if their result is taken.

    Args:
        trace: Trace of a pass.
    """
    kept, runs = _settle(trace, set(), set(), _wanted(trace))
    roots = _cheaper_roots(trace, kept)
    if roots:
        kept, runs = _settle(trace, set(), roots, _wanted(trace))
    return _cut(trace, kept, runs)


def minimum_cut(
    trace: Trace,
    *,
    reading_rate: float,
    each: float = 0.0,
    each_of_inputs: float = 0.0,
    seconds: Sequence[float] | None = None,
) -> Cut:
    """Chooses the values to keep so that the replayed pass is as fast as possible.

    Each value is either read, or its operations run again. The choice is a minimum cut of the graph
    of operations and values, as in the min-cut rematerialization of
    `torch._functorch.partitioners`. Constants are always computed again.

    Args:
        trace: Trace of a pass.
        reading_rate: Bytes a second at which kept values are read.
        each: Further cost of each kept value, in seconds, for example to look up its rows.
        each_of_inputs: Further cost of each kept value that depends on the batch alone, in seconds.
        seconds: Seconds of each operation of the trace. If None, those that were measured.

    Raises:
        ValueError: The reading rate is not positive.
    """
    if not reading_rate > 0:
        raise ValueError("reading_rate must be above 0.")
    if seconds is None:
        seconds = [one.seconds for one in trace.operations]
    wanted = _wanted(trace)
    _, runs = _settle(trace, set(), set(), wanted)
    # Operations that run whichever values are kept. The values that they read are needed.
    fixed = {one for one in runs if not trace.operations[one].skippable}
    fixed |= _bound_to_run(trace, fixed)
    wanted = wanted | {number for one in fixed for number in trace.operations[one].reads}
    free = [one for one in trace.operations if one.skippable and one.number not in fixed]
    place = {operation.number: rank for rank, operation in enumerate(free)}
    maker = {number: place[one.number] for one in free for number in one.makes}
    costs = {
        number: trace.values[number].nbytes / reading_rate
        + (each if trace.values[number].kind == FROZEN else each_of_inputs)
        for number in maker
        if trace.values[number].plain and trace.values[number].kind in (FROZEN, INPUT)
    }
    again, chosen = cheapest(
        [0.0 if _is_view(trace, one) else seconds[one.number] for one in free],
        [[number for number in one.reads if number in maker] for one in free],
        maker,
        costs,
        [number for number in wanted if number in maker],
    )
    return _cut(trace, *_settle(trace, chosen, {free[rank].number for rank in again}, wanted))


def cheapest(
    seconds: Sequence[float],
    reads: Sequence[Sequence[int]],
    maker: dict[int, int],
    costs: dict[int, float],
    wanted: Iterable[int],
) -> tuple[set[int], set[int]]:
    """Decides for each needed value whether to keep it or to run its operation again.

    Args:
        seconds: Cost of each operation.
        reads: Numbers of the values that each operation reads. Each value has a maker.
        maker: Operation that makes each value, by number of the value.
        costs: Cost of keeping each value, by number. Values without a cost cannot be kept.
        wanted: Numbers of the needed values.

    Returns:
        Operations that run again, and values that are kept. Their total cost is the minimum.
    """
    wanted = list(wanted)
    if not wanted:
        return set(), set()
    # A cut edge is a cost: source -> operation is to run it, operation -> value is to keep the
    # value. A needed value is kept if its maker is on the side of the source.
    numbers = {number: len(seconds) + rank for rank, number in enumerate(maker)}
    source, sink = len(seconds) + len(numbers), len(seconds) + len(numbers) + 1
    total = sum(seconds)
    scale = (_CAPACITY // 4) / max(total, 1e-12)
    endless = _CAPACITY

    def capacity(cost: float) -> int:
        return min(max(1, round(cost * scale)), endless - 1) if cost > 0 else 0

    edges = [(source, one, capacity(cost)) for one, cost in enumerate(seconds)]
    for number, one in maker.items():
        # A value that costs more than all operations together is never kept.
        cost = costs.get(number)
        kept = endless if cost is None else min(capacity(min(cost, 2 * total)), endless - 1)
        edges.append((one, numbers[number], kept))
    for one, taken in enumerate(reads):
        edges += [(numbers[number], one, endless) for number in taken]
    edges += [(numbers[number], sink, endless) for number in wanted]
    reached = side_of_source(edges, source, sink)
    again = {one for one in range(len(seconds)) if one not in reached}
    needed = {*wanted, *(number for one in again for number in reads[one])}
    kept_values = {number for number in needed if maker[number] in reached}
    return _needed(again, kept_values, reads, maker, wanted), kept_values


def _is_view(trace: Trace, operation: Operation) -> bool:
    """Returns whether an operation only makes views, which takes neither time nor memory."""
    storages = {trace.values[number].storage for number in operation.reads}
    return not operation.writes and all(
        trace.values[number].storage in storages for number in operation.makes
    )


def _needed(
    again: set[int],
    kept: set[int],
    reads: Sequence[Sequence[int]],
    maker: dict[int, int],
    wanted: Iterable[int],
) -> set[int]:
    """Removes operations that nothing needs.

    The cut may put an operation without cost on either side.
    """
    found: set[int] = set()
    open_values = list(wanted)
    while open_values:
        number = open_values.pop()
        one = maker[number]
        if number not in kept and one in again and one not in found:
            found.add(one)
            open_values += reads[one]
    return found


def _wanted(trace: Trace) -> set[int]:
    return {number for number, read in trace.outputs if read}


def _bound_to_run(trace: Trace, runs: set[int]) -> set[int]:
    """Returns operations that must run because others on their segment or buffer run.

    Args:
        trace: Trace of a pass.
        runs: Numbers of the operations that run.
    """
    operations, values = trace.operations, trace.values
    segments = {operations[one].segment for one in runs} - {-1}
    bound = {one.number for one in operations if one.segment in segments}
    # A write that runs changes the other tensors on its buffer only if they were really made.
    shared = {
        values[old].storage
        for one in runs
        for old, _ in operations[one].writes
        if len(operations[one].writes) > 1
    }
    for operation in operations:
        made = [number for number in operation.makes if values[number].storage in shared]
        looks_on = any(values[number].storage in shared for number in operation.reads)
        if made and looks_on:
            bound.add(operation.number)
    return {one for one in bound - runs if operations[one].skippable}


def _settle(
    trace: Trace, kept: set[int], runs: set[int], wanted: set[int]
) -> tuple[set[int], set[int]]:
    """Completes a choice, until every operation that runs has its arguments.

    Args:
        trace: Trace of a pass.
        kept: Numbers of the kept values.
        runs: Numbers of the operations that run again by choice.
        wanted: Numbers of the values that the caller reads.
    """
    operations, values = trace.operations, trace.values
    kept = set(kept)
    runs = set(runs) | {one.number for one in operations if not one.skippable}
    while True:
        runs |= _bound_to_run(trace, runs)
        open_values = [*wanted, *(number for one in runs for number in operations[one].reads)]
        seen: set[int] = set()
        while open_values:
            number = open_values.pop()
            made_by = values[number].operation
            if number in seen or number in kept or made_by < 0:
                continue
            seen.add(number)
            if made_by in runs:
                continue
            if values[number].kind == FROZEN and values[number].plain:
                kept.add(number)
            else:
                runs.add(made_by)
                open_values += operations[made_by].reads
        more = _writes_on_real(trace, kept, runs)
        if not more and not _bound_to_run(trace, runs):
            used = {number for one in runs for number in operations[one].reads} | wanted
            return {n for n in kept & used if values[n].operation not in runs}, runs
        runs |= more


def _writes_on_real(trace: Trace, kept: set[int], runs: set[int]) -> set[int]:
    """Returns writes that cannot be left out, since a real tensor is on their buffer by then."""
    values = trace.values
    real = {values[number].storage: number for number in sorted(kept, reverse=True)}
    for one in sorted(runs, reverse=True):
        for number in trace.operations[one].makes:
            storage = values[number].storage
            real[storage] = min(number, real.get(storage, number))
    return {
        one.number
        for one in trace.operations
        if one.number not in runs
        for old, _ in one.writes
        if real.get(values[old].storage, len(values)) <= old
    }


def _cheaper_roots(trace: Trace, kept: set[int]) -> set[int]:
    """Returns operations that make views of a base that is smaller to keep than the views."""
    values, operations = trace.values, trace.operations
    groups: dict[int, list[int]] = {}
    for number in sorted(kept):
        groups.setdefault(values[number].storage, []).append(number)
    again: set[int] = set()
    for storage, numbers in groups.items():
        written = any(values[old].storage == storage for one in operations for old, _ in one.writes)
        root = next(value for value in values if value.storage == storage)
        total = sum(values[number].nbytes for number in numbers)
        if len(numbers) > 1 and not written and root.plain and root.nbytes <= total:
            if root.kind != FROZEN or root.operation < 0:
                continue
            again |= _path(trace, numbers, root.number)
    return again


def _path(trace: Trace, numbers: Iterable[int], root: int) -> set[int]:
    """Returns the operations that lead from a tensor to its views."""
    found: set[int] = set()
    open_values = [number for number in numbers if number != root]
    while open_values:
        operation = trace.operations[trace.values[open_values.pop()].operation]
        if operation.number in found:
            continue
        found.add(operation.number)
        storage = trace.values[root].storage
        open_values += [
            number
            for number in operation.reads
            if number != root and trace.values[number].storage == storage
        ]
    return found


def _cut(trace: Trace, kept: set[int], runs: set[int]) -> Cut:
    left_out: list[Operation] = [one for one in trace.operations if one.number not in runs]
    return Cut(
        kept=tuple(sorted(kept)),
        runs=frozenset(runs),
        nbytes=sum(trace.values[number].nbytes for number in kept),
        seconds_again=sum(trace.operations[one].seconds for one in runs
                          if trace.operations[one].skippable),
        seconds_saved=sum(operation.seconds for operation in left_out),
    )  # fmt: skip
