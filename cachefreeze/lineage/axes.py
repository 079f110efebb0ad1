"""Finds the rows of a batch in each value, by runs of recorded operations on other rows.

Rows are not always in the first dimension, and may be merged with another one: `(batch * length,
width)`. Sizes do not show this. So an operation runs once more on another choice of rows. If its
result shows the same choice along one axis only, this is the batch axis. If it shows the choice
along no axis, rows depend on one another.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cachefreeze.errors import UserError
from cachefreeze.lineage.operations import FROZEN, Operation, Trace, mark
from cachefreeze.lineage.program import Program, with_strides
from cachefreeze.lineage.rowwise import row_dimension
from cachefreeze.lineage.structure import tensors

Tensor = torch.Tensor

# Largest difference that another position in the batch may make, relative to the largest element.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Axis:
    """Position of the rows of a batch in a value.

    Attributes:
        dim: Dimension that contains the rows.
        inner: Number of consecutive entries of each row, if the rows are merged with a dimension
            after them, as in `(batch * length, width)`.
        outer: Number of repetitions of the batch, if the rows are merged with a dimension before
            them.
    """

    dim: int
    inner: int = 1
    outer: int = 1

    def places(self, rows: Sequence[int], count: int) -> Tensor:
        """Returns the indices of some rows along the dimension.

        Args:
            rows: Numbers of the rows.
            count: Number of rows in the batch.
        """
        inner = torch.arange(self.inner)
        one = torch.tensor(list(rows))[:, None] * self.inner + inner
        outer = torch.arange(self.outer)[:, None] * (count * self.inner)
        return (outer + one.reshape(1, -1)).reshape(-1)

    def take(self, tensor: Tensor, rows: Sequence[int], count: int) -> Tensor:
        """Returns a tensor with other rows of the same batch, and with the same strides.

        Args:
            tensor: Tensor with this batch axis.
            rows: Numbers of the rows.
            count: Number of rows in the batch.
        """
        return with_strides(self.rows(tensor, rows, count), tensor.stride())

    def rows(self, tensor: Tensor, rows: Sequence[int], count: int) -> Tensor:
        """Returns some rows of a tensor.

        Args:
            tensor: Tensor with this batch axis.
            rows: Numbers of the rows.
            count: Number of rows in the batch.
        """
        places = self.places(rows, count).to(tensor.device)
        return tensor.detach().index_select(self.dim, places)


@dataclass
class Axes:
    """Batch axes of the values of a trace.

    Attributes:
        rows: Number of rows in the batch.
        fitting: Set of possible batch axes of each value that depends on rows, by number. It has
            several if the rows are too similar to decide, and none if a row of the value depends on
            other rows.
        mixing: Numbers of the operations whose result for a row depends on other rows.
        found: Values of the batch that were asked for and computed, by number.
    """

    rows: int
    fitting: dict[int, frozenset[Axis]] = field(default_factory=dict)
    mixing: tuple[int, ...] = ()
    found: dict[int, Tensor] = field(default_factory=dict)

    def axis(self, number: int) -> Axis | None:
        """Returns the batch axis of a value, or None if there is none or it is not decided."""
        fitting = self.fitting.get(number, frozenset())
        return next(iter(fitting)) if len(fitting) == 1 else None

    def of(self, number: int) -> str:
        """Returns a description of the batch axis of a value, for people."""
        if number not in self.fitting:
            return "shared by all rows"
        axis = self.axis(number)
        if axis is None:
            return "not decided" if self.fitting[number] else "depends on other rows"
        if axis.inner * axis.outer == 1:
            return f"axis {axis.dim}"
        return f"axis {axis.dim}, {axis.inner * axis.outer} entries a row"


def batch_axes(
    trace: Trace,
    /,
    *args: Any,
    dims: Mapping[int, int | None] | None = None,
    earlier: Axes | None = None,
    known: Mapping[int, tuple[Tensor, Axis]] | None = None,
    wanted: Collection[int] | None = None,
    **kwargs: Any,
) -> Axes:
    """Finds the batch axis of every value that can be left out.

    The Python code of the model does not run, except for modules that are one operation.

    Args:
        trace: Trace of a pass.
        *args: Positional arguments of such a pass. The batch needs at least two different rows.
        dims: Dimension of the rows in each input, by position among the tensors in the arguments.
            None for an input that all rows share. By default, rows are in the first dimension of
            each input whose first size is equal to that of the first input.
        earlier: Result for another batch of the same trace. Axes that did not fit there are
            excluded.
        known: Values of this batch and their known batch axes, by number. Operations that only lead
            to these values are not run.
        wanted: Numbers of the values whose batch axes are needed. None for all.
        **kwargs: Keyword arguments of the pass.

    Raises:
        UserError: The batch has fewer than two rows.
    """
    inputs = dict(zip(trace.inputs, tensors((args, kwargs)), strict=True))
    rows, axes = _of_inputs(inputs, dims)
    if rows < 2:
        raise UserError("The example batch has fewer than two rows: give one with two or more.")
    known = known or {}
    axes.update({number: {axis} for number, (_, axis) in known.items()})
    search = _Search(trace, rows, axes)
    given = {**inputs, **{number: tensor for number, (tensor, _) in known.items()}}
    found = search.run(given, wanted)
    fitting = {number: frozenset(fits) for number, fits in search.fitting.items()}
    mixing = set(search.mixing)
    if earlier is not None and earlier.rows == rows:
        mixing |= set(earlier.mixing)
        fitting = {
            number: fits & earlier.fitting.get(number, fits) for number, fits in fitting.items()
        }
    return Axes(rows, fitting, tuple(sorted(mixing)), found)


def axes_of(
    program: Program,
    kept: Mapping[int, Tensor],
    inputs: Mapping[int, Tensor],
) -> Axes:
    """Finds the batch axes of some values, by two runs of the operations that lead to them.

    Args:
        program: Operations of the trace.
        kept: Values in a pass, by number.
        inputs: Inputs of that pass, by number. The rows are in the first dimension of each input
            whose first size is equal to that of the first input.
    """
    rows, axes = _of_inputs(inputs, None)
    found = Axes(rows)
    if rows < 2:
        return found
    fits = {number: set(_candidates(tensor.shape, rows)) for number, tensor in kept.items()}
    _narrow(fits, program, kept, inputs, axes, rows)
    open_ones = [number for number, fitting in fits.items() if len(fitting) > 1]
    if open_ones:
        # The rows are too similar, for example masks without padding: other rows are made from
        # them.
        varied = {
            number: _varied(tensor) if number in axes else tensor
            for number, tensor in inputs.items()
        }
        whole = program.run(open_ones, varied)
        _narrow(fits, program, whole, varied, axes, rows)
    found.fitting.update({number: frozenset(fitting) for number, fitting in fits.items()})
    return found


def _narrow(
    fits: dict[int, set[Axis]],
    program: Program,
    whole: Mapping[int, Tensor],
    inputs: Mapping[int, Tensor],
    axes: Mapping[int, set[Axis]],
    rows: int,
) -> None:
    """Removes the axes along which the results do not show the choice of rows."""
    for choice in _choices(rows):
        chosen = {
            number: next(iter(axes[number])).take(tensor, choice, rows)
            if number in axes
            else tensor
            for number, tensor in inputs.items()
        }
        results = program.run(list(whole), chosen)
        for number, value in whole.items():
            fits[number] = _fitting(fits[number], value, results[number], choice, rows)


def _varied(tensor: Tensor) -> Tensor:
    """Returns other rows of the same kind: rolled rows, or masks of different lengths."""
    found = with_strides(tensor.detach(), tensor.stride())
    if found.dim() < 2 or not found.numel():
        return found
    binary = not found.is_floating_point() and bool(((found == 0) | (found == 1)).all())
    length = found.shape[-1]
    for row in range(len(found)):
        if binary:
            found[row, ..., length - row % length :] = 0
        else:
            found[row] = found[row].roll(row, -1)
    return found


def _choices(rows: int) -> list[list[int]]:
    """Returns two choices of rows, from each half of the batch.

    A value that depends on an extreme row differs in one of them.
    """
    half = max(rows // 2, 1)
    low, high = list(range(half)), list(range(rows - half, rows))
    return [(low * 3)[:rows][::-1], (high * 3)[:rows][::-1]]


def rows_of(inputs: Mapping[int, Tensor]) -> tuple[int, frozenset[int]]:
    """Returns the number of rows of a batch, and the numbers of the inputs that contain rows.

    Args:
        inputs: Inputs of a pass, by number.
    """
    rows, axes = _of_inputs(inputs, None)
    return rows, frozenset(axes)


def leave_mixing(trace: Trace, axes: Axes) -> None:
    """Marks operations as live if their result for a row depends on other rows.

    Args:
        trace: Trace of a pass.
        axes: Result of `batch_axes` for this trace.
    """
    reached = _reach_frozen(trace)
    for number in axes.mixing:
        if number in reached:
            trace.operations[number].mixes = True
    mark(trace, trace.asked)


def _reach_frozen(trace: Trace) -> set[int]:
    """Returns the operations that frozen work depends on.

    Others only decide the path of Python code.
    """
    found: set[int] = set()
    for operation in reversed(trace.operations):
        if operation.kind == FROZEN or operation.number in found:
            found.add(operation.number)
            found.update(trace.values[number].operation for number in operation.reads)
    return found


def _of_inputs(
    inputs: Mapping[int, Tensor], dims: Mapping[int, int | None] | None
) -> tuple[int, dict[int, set[Axis]]]:
    if dims is None:
        first = next((tensor.shape[0] for tensor in inputs.values() if tensor.dim()), 0)
        dims = {
            place: 0 if tensor.dim() and tensor.shape[0] == first else None
            for place, tensor in enumerate(inputs.values())
        }
    axes: dict[int, set[Axis]] = {}
    rows = 0
    for place, (number, tensor) in enumerate(inputs.items()):
        dim = dims.get(place)
        if dim is not None:
            axes[number] = {Axis(dim)}
            rows = tensor.shape[dim]
    return rows, axes


class _Search:
    def __init__(self, trace: Trace, rows: int, fitting: dict[int, set[Axis]]) -> None:
        self.fitting = fitting
        self.mixing: list[int] = []
        self._trace, self._rows = trace, rows
        self._program = Program(trace)
        self._choices = _choices(rows)

    def run(self, given: Mapping[int, Tensor], wanted: Collection[int] | None) -> dict[int, Tensor]:
        """Runs the operations that lead to the wanted values, and returns these values."""
        trace, keep = self._trace, frozenset(wanted or ())
        chosen = trace.operations if wanted is None else self._program.needed(wanted, given)
        chosen = [one for one in chosen if one.skippable]
        last = {number: one.number for one in chosen for number in one.reads}
        found: dict[int, Tensor] = dict(given)
        if wanted is not None and self._all_are_known(chosen, given):
            return {number: given[number] for number in keep if number in given}
        for operation in chosen:
            if not all(n in found or trace.values[n].operation < 0 for n in operation.reads):
                continue  # its arguments come from live work
            before = {number: found[number] for number in operation.reads if number in found}
            follows = any(number in self.fitting for number in operation.reads)
            if follows and operation.writes:
                before = {number: with_strides(t, t.stride()) for number, t in before.items()}
            self._program.run_one(operation, found, given)
            if follows and not self._knows(operation):
                self._decide(operation, before, found)
            for number in operation.reads:
                if last[number] == operation.number and number not in keep:
                    found.pop(number, None)
        return {number: found[number] for number in keep if number in found}

    def _all_are_known(self, chosen: Sequence[Operation], given: Collection[int]) -> bool:
        """Returns whether no operation needs a trial, so that none has to run."""
        there = set(given)
        for operation in chosen:
            if not all(n in there or self._trace.values[n].operation < 0 for n in operation.reads):
                continue
            there.update(operation.makes, (new for _, new in operation.writes))
            follows = any(number in self.fitting for number in operation.reads)
            if follows and not self._knows(operation):
                return False
        return True

    def _knows(self, operation: Operation) -> bool:
        """Notes the batch axis of the results, if there is a rule for it.

        Returns whether there is.
        """
        if not operation.makes and not operation.writes:  # it returns an argument
            return True
        dims = {n: _plain_dim(self.fitting[n]) for n in operation.reads if n in self.fitting}
        dim = row_dimension(operation, self._trace.values, dims)
        if dim is None:
            return False
        self.fitting.update({number: {Axis(dim)} for number in operation.makes})
        return True

    def _decide(
        self, operation: Operation, before: dict[int, Tensor], after: Mapping[int, Tensor]
    ) -> None:
        """Finds the batch axes of the results of an operation by trials."""
        made = [n for n in operation.makes if n in after and self._trace.values[n].plain]
        if any(number in self.fitting and not self.fitting[number] for number in operation.reads):
            self.fitting.update({number: set() for number in made})
            return
        fits = {number: set(_candidates(after[number].shape, self._rows)) for number in made}
        for rows in self._choices:
            chosen = {
                number: self._taken(number, tensor, rows) for number, tensor in before.items()
            }
            self._program.run_one(operation, chosen, {})
            for number in made:
                result, whole = chosen.get(number), after[number]
                fits[number] = (
                    set()
                    if result is None
                    else _fitting(fits[number], whole, result, rows, self._rows)
                )
        self.fitting.update(fits)
        if made and not any(fits.values()):
            self.mixing.append(operation.number)

    def _taken(self, number: int, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        """Returns an argument for another choice of rows. All axes that fit give the same."""
        fitting = self.fitting.get(number)
        if not fitting:
            return with_strides(tensor, tensor.stride())
        axis = min(fitting, key=lambda one: (one.inner * one.outer, one.dim, one.inner))
        return axis.take(tensor, rows, self._rows)


def _plain_dim(fits: set[Axis]) -> int | None:
    """Returns the dimension of the rows. None if it is not decided or merged with another one."""
    axis = next(iter(fits)) if len(fits) == 1 else None
    return axis.dim if axis is not None and axis.inner * axis.outer == 1 else None


def _candidates(shape: Sequence[int], rows: int) -> Iterator[Axis]:
    for dim, size in enumerate(shape):
        if size and size % rows == 0:
            times = size // rows
            yield Axis(dim, inner=times)
            if times > 1:
                yield Axis(dim, outer=times)
            for inner in range(2, times):
                if times % inner == 0:
                    yield Axis(dim, inner=inner, outer=times // inner)


def _fitting(
    fits: set[Axis], whole: Tensor, result: Tensor, choice: Sequence[int], rows: int
) -> set[Axis]:
    """Returns the axes along which a result shows the choice of rows.

    Args:
        fits: Axes to try.
        whole: Value for the batch itself.
        result: Value for the chosen rows.
        choice: Numbers of the chosen rows.
        rows: Number of rows in the batch.
    """
    if whole.shape != result.shape:
        return set()
    return {
        axis
        for axis in fits
        # One row excludes most wrong axes, and takes a small part of the time of all rows.
        if _near(axis.rows(whole, choice[:1], rows), axis.rows(result, [0], rows), whole)
        and _near(taken := axis.take(whole, choice, rows), result, taken)
    }


def _near(one: Tensor, other: Tensor, whole: Tensor) -> bool:
    """Returns whether two tensors are equal, up to a tolerance.

    The tolerance is relative to the largest element of `whole`.
    """
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    far = (torch.nan_to_num(one) - torch.nan_to_num(other)).abs()
    scale = float(torch.nan_to_num(whole.detach()).abs().max())
    return bool((far <= _TOLERANCE.get(one.dtype, 1e-4) * scale).all())
