"""Explains what a cache would save of a model's forward pass, and which work limits it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cachefreeze.errors import UserError
from cachefreeze.lineage.axes import Axes, batch_axes, leave_mixing
from cachefreeze.lineage.cut import Cut, crossing_cut, minimum_cut
from cachefreeze.lineage.modules import compiled_functions
from cachefreeze.lineage.operations import (
    LIVE,
    MIXES,
    MOVES,
    SHAPELESS,
    TRAINED,
    Operation,
    Trace,
    mark,
)
from cachefreeze.lineage.tracer import trace

# Bytes a second at which memory or a fast disk returns kept values.
READING_RATE = 1e9
_MANY_LINES = 12


@dataclass(frozen=True)
class Explanation:
    """Expected effect of a cache on a model. `print` shows all of it.

    Attributes:
        saved: Share of the time of the forward pass that is left out, from 0 to 1.
        row_bytes: Bytes that are kept for each row.
        kept: Descriptions of the kept values.
        limits: Sentences about the work that limits the cache.
        text: All of it as text.
    """

    saved: float
    row_bytes: int
    kept: tuple[str, ...]
    limits: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        """Returns the text."""
        return self.text

    def over(self, epochs: int, rows: int, views: int = 1) -> str:
        """Says what is left out over a whole run, and how much room the kept rows take.

        Args:
            epochs: Number of epochs.
            rows: Number of rows of the data set.
            views: Number of views of each row, each of which is computed once.
        """
        share, size = left_out(epochs, views), _bytes(rows * views * self.row_bytes)
        return (
            f"With {epochs} epochs and {_views(views)} of each row, 1 - {min(views, epochs)}/"
            f"{epochs} = {share:.0%} of this work is left out at most, and {rows:,} rows take "
            f"{size}."
        )


def left_out(epochs: int, views: int = 1) -> float:
    """Returns the largest share of frozen work that a cache can leave out, from 0 to 1.

    Each view of a row has to be computed once.

    Args:
        epochs: Number of epochs.
        views: Number of views of each row.
    """
    return 1 - min(views, epochs) / epochs


def _views(views: int) -> str:
    return "1 view" if views == 1 else f"{views} views"


def explain(model: Callable[..., Any], /, *example: Any, **kwargs: Any) -> Explanation:
    """Explains what a cache would save of a model's forward pass, and which work limits it.

    Runs one ordinary forward pass: random numbers are drawn, and batch norms in training mode
    update their statistics.

    Args:
        model: Module, or a function or method that calls modules.
        *example: Positional arguments of the call, with a batch of at least two rows.
        **kwargs: Keyword arguments of the call.

    Returns:
        Explanation. `print` shows it as a table.

    Raises:
        UserError: The callable uses no module, does not accept the example, has no frozen or no
            trained parameter, or calls a compiled function.
    """
    if isinstance(model, torch.nn.Module) and (functions := compiled_functions(model)):
        raise UserError(
            f"{type(model).__name__} calls a function under torch.compile "
            f"({', '.join(functions)}), which a trace would run uncompiled: compile a module "
            "instead."
        )
    try:
        output, traced = trace(model, *example, last_bits=True, **kwargs)
    except UserError:
        raise
    except Exception as error:
        told = str(error).strip().splitlines()
        raise UserError(
            f"The model does not accept the example batch: {told[0] if told else error!r}"
        ) from error
    del output
    name = getattr(model, "__name__", type(model).__name__)
    parameters = [
        state for state in traced.states if isinstance(state.tensor(), torch.nn.Parameter)
    ]
    if not any(state.trained for state in parameters):
        raise UserError(
            f"No parameter of {name} is trained: set requires_grad = True on those to train."
        )
    if all(state.trained for state in parameters):
        raise UserError(
            f"No parameter of {name} is frozen: set requires_grad = False on those that should not "
            "change."
        )
    axes = None
    try:
        axes = batch_axes(traced, *example, **kwargs)
        leave_mixing(traced, axes)
    except UserError:
        axes = None
    return _explanation(name, traced, axes)


def _explanation(name: str, traced: Trace, axes: Axes | None) -> Explanation:
    cut = crossing_cut(traced)
    cheapest = minimum_cut(traced, reading_rate=READING_RATE)
    rows = axes.rows if axes is not None else 1
    saved = _share(cut, traced)
    kept = tuple(traced.describe(number) for number in cut.kept)
    limits = tuple(limits_of(traced, saved))
    lines = [
        f"{name}: a cache would leave out {saved:.0%} of the forward pass "
        f"and keep {_bytes(cut.nbytes / rows)} a row.",
        "",
    ]
    if cut.kept:
        lines += _table(["kept value", "type", "a row", "rows in"], _kept(traced, cut, axes, rows))
        lines.append("")
    if 0 < cheapest.nbytes < cut.nbytes:
        lines += [
            f"It could keep only {_bytes(cheapest.nbytes / rows)} a row and run "
            f"{cheapest.seconds_again / max(traced.kernel_seconds, 1e-12):.1%} of the pass again.",
            "",
        ]
    lines += _table(["module", "share of time", "left out"], _modules(traced, cut))
    lines += ["", *(f"- {limit}" for limit in limits)]
    return Explanation(saved, round(cut.nbytes / rows), kept, limits, "\n".join(lines).rstrip())


def _share(cut: Cut, traced: Trace) -> float:
    return cut.seconds_saved / max(traced.kernel_seconds, 1e-12)


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} bytes"


def _kept(traced: Trace, cut: Cut, axes: Axes | None, rows: int) -> list[list[str]]:
    found = []
    for number in cut.kept:
        value = traced.values[number]
        place = axes.of(number) if axes is not None else "unknown: one row is too few"
        kind = str(value.dtype).removeprefix("torch.")
        found.append([traced.describe(number), kind, _bytes(value.nbytes / rows), place])
    if len(found) > _MANY_LINES:
        rest = len(found) - _MANY_LINES + 1
        found = [*found[: _MANY_LINES - 1], [f"and {rest} more", "", "", ""]]
    return found


def _modules(traced: Trace, cut: Cut) -> list[list[str]]:
    """Returns a table row for each of the outermost modules."""
    times: dict[str, float] = defaultdict(float)
    saved: dict[str, float] = defaultdict(float)
    for operation in traced.operations:
        place = _outer(traced, operation)
        times[place] += operation.seconds
        if operation.number not in cut.runs:
            saved[place] += operation.seconds
    total = max(sum(times.values()), 1e-12)
    lines = [
        [place, f"{seconds / total:.0%}", f"{saved[place] / max(seconds, 1e-12):.0%}"]
        for place, seconds in times.items()
    ]
    if len(lines) > _MANY_LINES:
        order = sorted(times.values(), reverse=True)[_MANY_LINES - 1]
        lines = [
            one for one, seconds in zip(lines, times.values(), strict=True) if seconds >= order
        ]
        lines.append(["others", "", ""])
    return lines


def _outer(traced: Trace, operation: Operation) -> str:
    """Returns the name of the module, at the first or second level, in which an operation ran."""
    number, names = operation.call, []
    if operation.opaque:
        names.append(operation.opaque)
    while number >= 0:
        names.append(traced.calls[number].name)
        number = traced.calls[number].parent
    parts = next((name for name in names if name), "").split(".")
    numbered = len(parts) > 2 and parts[1].isidentifier() and parts[2].isdigit()
    return ".".join(parts[: 3 if numbered else 2]) or "the model itself"


def limits_of(traced: Trace, saved: float) -> list[str]:
    """Returns sentences about live work: the reason, the modules, and what a change would bring.

    Args:
        traced: Trace of a pass.
        saved: Share of the pass that is left out, from 0 to 1.
    """
    reasons: dict[str, list[str]] = {}
    for operation in traced.operations:
        own = operation.must_run if operation.taints else ""
        if operation.kind == LIVE and not own and operation.reason in _MIXED:
            own = operation.reason if _first(traced, operation) else ""
        if own and operation.kind != TRAINED:
            where = traced.calls[operation.call].name if operation.call >= 0 else ""
            reasons.setdefault(_general(own), []).append(where or "the model")
    sentences = []
    for reason, places in reasons.items():
        some = ", ".join(f"`{place}`" for place in list(dict.fromkeys(places))[:3])
        more = len(set(places)) - 3
        some += f" and {more} more places" if more > 0 else ""
        sentences.append(
            f"Work that {reason} runs in every pass, and so does all work after it that uses its "
            f"results: {some}."
        )
    could = saved + more_in_eval_mode(traced)
    if could > saved + 0.01:
        sentences.append(
            "Dropout and batch norms in training mode limit the cache. With the frozen modules in "
            f"eval mode it would leave out {could:.0%} of the forward pass: cachefreeze.freeze "
            "puts them in eval mode and keeps them there."
        )
    return sentences


_MIXED = (MIXES, MOVES, SHAPELESS)


def _first(traced: Trace, operation: Operation) -> bool:
    return not any(traced.values[number].kind == LIVE for number in operation.reads)


def _general(reason: str) -> str:
    return "updates its running statistics" if reason.startswith("writes to `") else reason


def more_in_eval_mode(traced: Trace) -> float:
    """Estimates how much more could be left out if all frozen modules were in eval mode.

    Args:
        traced: Trace of a pass. It is unchanged afterwards.

    Returns:
        Share of the pass, from 0 to 1. 0 if frozen modules draw and update nothing.
    """
    before = crossing_cut(traced).seconds_saved
    changed: list[tuple[Operation, str, bool]] = []
    for operation in traced.operations:
        if operation.taints and operation.must_run.startswith(("draws", "writes to `")):
            changed.append((operation, operation.must_run, operation.taints))
            operation.must_run, operation.taints = "", False
    if not changed:
        return 0.0
    mark(traced, traced.asked)
    cut = crossing_cut(traced)
    # In eval mode, the draws and updates take no time. Only the work that depends on them counts.
    own = sum(one.seconds for one, _, _ in changed if one.number not in cut.runs)
    more = (cut.seconds_saved - own - before) / max(traced.kernel_seconds, 1e-12)
    for operation, must_run, taints in changed:
        operation.must_run, operation.taints = must_run, taints
    mark(traced, traced.asked)
    return more


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
