"""What a run tells, in words."""

import shlex
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from cachefreeze.account import SAVED, amount, reached, spent, timed, ways
from cachefreeze.files import (
    human_bytes,
)
from cachefreeze.planner import Drop, Move, Plan, Run, efficiency

# How the lines begin that are wanted even of a quiet run: all of `closing_words` but its hints.
RESULT = ("accuracy", "time", "plan", "cache", "store", "run", "weights", " " * 10)


def epoch_line(metrics: Mapping[str, Any], epochs: int, units: Sequence[str]) -> str:
    """One epoch in one line."""
    boundary = metrics["boundary"]
    if metrics["source"] == "cache":
        source = f"rows from the cache after {units[boundary - 1]}"
    elif metrics["store_bytes"]:
        source = "rows from the cache of decoded pixels"
    else:
        source = "rows from pixels"
    return (
        f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}  "
        f"loss {metrics['train_loss']:.4f}  val {metrics['val_accuracy']:7.2%}  "
        f"frozen {metrics['frozen_units']}/{len(units)}  "
        f"{metrics['images_per_second']:7,.0f} img/s  {source}"
    )


def materialize_line(event: Mapping[str, Any]) -> str:
    """One materialisation in one line."""
    verb = "found in the cache" if event["reused"] else "written to the cache"
    what = "decoded pixels" if event["boundary"] == 0 else f"activations after {event['unit']}"
    kind = "" if event["codec"] == "raw" else f" ({event['codec']})"
    lossy = ", at a loss of precision" if event["lossy"] else ""
    if event["held"]:
        lossy += f", {event['held']:,} rows of it before it was interrupted"
    if event["tier"] != "disk":
        lossy += f", rows in memory (tier {event['tier']})"
    predicted = event["predicted_seconds"]
    return (
        f"  step {event['step']}: {what} {verb}: {event['rows']:,} rows, "
        f"{human_bytes(event['bytes'])}{kind}{lossy}, {event['seconds']:.1f} s"
        + (f" ({predicted:.1f} s predicted)" if predicted else "")
    )


def plan_words(
    plan: Plan, run: Run, units: Sequence[str], measured: str, why_nothing: str
) -> list[str]:
    """A plan in three lines; `measured` says how its costs were."""
    totals = (
        f"{duration(plan.seconds)} predicted; {duration(plan.freezing_only)} with freezing only, "
        f"{duration(plan.no_freezing)} without, {duration(plan.limit)} at the limit"
    )
    if not plan.moves:
        nothing = f"          nothing is kept: {why_nothing}"
        return [f"plan      {totals}", nothing, f"          measured {measured}"]
    most = max(move.bytes for move in plan.moves)
    share = efficiency_words(plan.freezing_only, plan.seconds, plan.limit)
    return [
        f"plan      {totals}{share and f', {share}'}",
        f"          keeps {_moves_words(plan.moves, run, units)}; at most {human_bytes(most)} each",
        f"          measured {measured}",
    ]


def revision_words(step: int, coming: Sequence[Move], run: Run, units: Sequence[str]) -> str:
    """A plan that was made anew at a step, and is another one than was told."""
    kept = f"keeps {_moves_words(coming, run, units)}" if coming else "keeps nothing more"
    return f"  step {step}: planned anew: {kept}"


def room_words(roomy: Plan, max_bytes: float) -> str:
    """What more disk would bring."""
    return (
        f"          with {human_bytes(roomy.peak_bytes)} of disk instead of "
        f"{human_bytes(max_bytes)} (--cache-max-gb) it would take {duration(roomy.seconds)}"
    )


def plan_table(plan: Plan, run: Run, units: Sequence[str], why_nothing: str) -> list[str]:
    """When units freeze, then what is kept, then the totals."""
    rows = [["unit", "freezes at step", "epoch", "share of the run"]]
    for name, step in zip(units, run.freeze_steps, strict=True):
        ends = step >= run.total_steps
        rows.append(
            [name, "trains to the end", "", ""]
            if ends
            else [name, f"{step:,}", _epoch(step, run), f"{step / run.total_steps:.1%}"]
        )
    lines = [*format_table(rows, right=(1, 2, 3)), ""]
    rows = [["at step", "epoch", "boundary", "codec", "size", "filling", "saves"]]
    for event in plan.events:
        when = [f"{event.step:,}", _epoch(event.step, run)]
        if isinstance(event, Drop):
            rows.append([*when, "back to pixels", "", "", "", ""])
            continue
        assert isinstance(event, Move)
        boundary = event.keep.boundary
        place = f"{boundary} {_place(boundary, units)}"
        found = " (found)" if event.found else ""
        size, cost, saving = human_bytes(event.bytes), duration(event.cost), duration(event.saving)
        rows.append([*when, place, event.keep.codec, size, cost + found, saving])
    if plan.events:
        lines += format_table(rows, right=(0, 1, 4, 5, 6))
    else:
        lines.append(f"nothing is kept: {why_nothing}")
    totals = [["predicted", "time", "of freezing only"]]
    for name, seconds in (
        ("no freezing", plan.no_freezing),
        ("freezing only", plan.freezing_only),
        ("with the cache, as planned", plan.seconds),
        ("limit: the frozen prefix for nothing", plan.limit),
    ):
        totals.append([name, duration(seconds), f"{seconds / plan.freezing_only:.1%}"])
    lines += ["", *format_table(totals, right=(1, 2))]
    if share := efficiency_words(plan.freezing_only, plan.seconds, plan.limit):
        explained = ": the share of the limit's saving" if share.startswith("efficiency") else ""
        lines += ["", share + explained]
    return lines


def _moves_words(moves: Sequence[Move], run: Run, units: Sequence[str]) -> str:
    return ", ".join(
        f"{_place(move.keep.boundary, units)} (epoch {_epoch(move.step, run)})" for move in moves
    )


def _epoch(step: int, run: Run) -> str:
    """The epoch that a step belongs to, counted from 1."""
    return f"{step // run.steps_per_epoch + 1:,}"


def _place(boundary: int, units: Sequence[str]) -> str:
    return f"after {units[boundary - 1]}" if boundary else "pixels"


def format_table(
    rows: Sequence[Sequence[str]], *, right: Container[int] = (), divider: str = "  "
) -> list[str]:
    """Columns as wide as their widest cell, some flush right; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        divider.join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The same in Markdown."""
    widths = ["-" * max(map(len, column)) for column in zip(*rows, strict=True)]
    return [f"| {line} |" for line in format_table([rows[0], widths, *rows[1:]], divider=" | ")]


def efficiency_words(freezing_only: float, cached: float, limit: float) -> str:
    """The share of what a cache can save; if it is less than nothing, the seconds that are lost."""
    if cached > freezing_only:
        return f"the cache costs {duration(cached - freezing_only)} more than it saves"
    share = efficiency(freezing_only, cached, limit)
    return "" if share is None else f"efficiency {share:.2f}"


def time_words(summary: Mapping[str, Any]) -> list[str]:
    """The time of a run: its parts, and what it would have been otherwise."""
    files = {"summary": summary}
    parts = [f"{name} {duration(amount(files, at))}" for name, at in spent(summary).items()]
    others = [
        f"{way.name} {duration(amount(files, way.best))} ({way.known})"
        for way in ways(summary)[1:]
        if way.known
    ]
    lines = [f"time      {duration(summary['wall_seconds'])}: {', '.join(parts)}"]
    return [*lines, f"          {', '.join(others)}"] if others else lines


def comparison_words(summary: Mapping[str, Any]) -> list[str]:
    """Predicted beside actual, of the run and of every materialisation."""
    plan, own = summary["plan"], ways(summary)[0]
    assert own.predicted is not None
    predicted, actual = amount({"summary": summary}, own.predicted), summary["wall_seconds"]
    when = f"after step {plan['from_step']}" if summary["resumed_at"] else "at the start"
    line = (
        f"plan      {duration(predicted)} predicted {when}, {duration(actual)} taken "
        f"({actual / predicted - 1:+.0%})"
    )
    if not summary["resumed_at"]:  # else it would be that of the rest
        times = (plan["predicted"][name] for name in ("freezing_only", "seconds", "limit"))
        if share := efficiency_words(*times):
            line += f"; {share} (predicted)"
    own_share = reached(summary)
    if own_share is not None and own_share >= 0:  # else the cache's line says what it cost
        line += f"; efficiency {own_share:.2f} (estimated)"
    rows = [["", "filling: predicted", "actual", "saving: predicted", "actual"]]
    rows += [
        [
            f"step {each['step']}: {each['unit']}"
            # Its rows are counted by the process that filled it.
            + (" (until it was cut off)" if each["step"] < plan["from_step"] else ""),
            *(
                duration(each[key])
                for key in (
                    "predicted_seconds",
                    "seconds",
                    "predicted_saving_seconds",
                    "saving_seconds",
                )
            ),
        ]
        for each in summary["cache"]["boundaries"]
    ]
    table = format_table(rows, right=(1, 2, 3, 4)) if len(rows) > 1 else []
    return [line, *(f"          {row}" for row in table)]


def opening_words(
    settings: Mapping[str, Any],
    units: Sequence[str],
    parameters: int,
    data_set: str,
    where: str,
    weights: tuple[str, Sequence[str]] | None = None,
    first: int = 0,
) -> list[str]:
    """What is about to be done.

    Args:
        settings: what is in args.json.
        units: their names.
        parameters: of the network.
        data_set, where: in words.
        weights: what it starts from in words, and the names of what is new.
        first: units that are frozen from the start.
    """
    if settings["freeze"]:
        rates = "scaled" if settings["scale_lr"] else "unscaled"
        whom = " for the others" if first else ""
        plan = f"FreezeOut{whom}, {settings['schedule']}, t0 = {settings['t0']:g}, {rates} rates"
    else:
        plan = f"nothing {'else ' if first else ''}freezes, one cosine for all units"
    if first:
        start = f"{first} of {len(units)} units, to {units[first - 1]}"
        plan = f"frozen from the start: {start}; {plan}"
    if settings["cache"]:
        cache = f"activations of frozen units are kept in {settings['cache_dir']}"
        if settings["cache_codec"] == "int8":
            cache += " as int8: at a loss of precision, so the weights will not be the same"
        elif settings["cache_dtype"] == "bf16":
            cache += " as bf16: if they are fp32, at a loss of precision"
    elif settings["augment"]:
        cache = "off: augmented pixels are new in every epoch, so there is nothing to keep"
    else:
        cache = "off: frozen units are computed in every step"
    epochs = "1 epoch" if settings["epochs"] == 1 else f"{settings['epochs']} epochs"
    return [
        f"network   {settings['network']}: {len(units)} units, {parameters / 1e6:.2f} M parameters",
        *([] if weights is None else [weights_line(*weights)]),
        f"data      {data_set}",
        f"training  {epochs} in batches of {settings['batch_size']} on {where}",
        f"schedule  {plan}",
        f"cache     {cache}",
    ]


def weights_line(words: str, new: Sequence[str]) -> str:
    """What a network starts from."""
    fresh = f"; new for these classes: {', '.join(new)}" if new else ""
    return f"weights   {words}{fresh}"


def closing_words(
    summary: Mapping[str, Any], settings: Mapping[str, Any], folder: Path, python: str, exact: bool
) -> list[str]:
    """What came out, where it lies, and what to type next.

    Args:
        summary, settings: what is in summary.json and args.json.
        folder: of the run.
        python: the interpreter, as one would type it here.
        exact: the device gives the same weights with and without the cache.
    """
    lines = [
        "",
        f"accuracy  {summary['val_accuracy']:.2%} of the validation images "
        f"(best epoch {summary['best_val_accuracy']:.2%})",
        *time_words(summary),
    ]
    if summary["plan"] is not None:
        lines += comparison_words(summary)
    lines += [
        *_cache_words(summary),
        f"run       {folder} (args.json, metrics.jsonl and .csv, summary.json, last.pt, best.pt)",
        f"weights   SHA-256 {summary['weights_sha256'][:16]}...",
    ]
    hints = _hints(summary, settings, python, exact)
    return [*lines, "", "what to type next:", *hints] if hints else lines


def _cache_words(summary: Mapping[str, Any]) -> list[str]:
    """What the cache brought, and what it left."""
    cache, saved = summary["cache"], amount({"summary": summary}, SAVED)
    if not cache["boundaries"]:
        if not (cache["enabled"] and summary["frozen_units"]):
            return []
        cost = f", and cost {duration(-saved)} to measure that" if saved < -0.05 else ""
        return [
            f"cache     held nothing{cost}: no store would have saved more time than filling it "
            "takes; more --epochs or a smaller --t0 leave more to save"
        ]
    saving = ""
    if timed(summary):
        verdict = "saved" if saved >= 0 else "cost more than it saved:"
        saving = f"{verdict} {duration(abs(saved))} (estimated), filling and measuring included; "
    lines = [f"cache     {saving}{cache['rows_served']:,} rows came from it"]
    if cache["rows_verified"]:
        lines.append(
            f"          {cache['rows_verified']:,} of its rows were computed once more to "
            "verify them: no difference"
        )
    if cache["store"]:
        stays = "kept for later runs" if cache["kept"] else "until a later run fills its own"
        lines.append(f"store     {cache['store']} ({stays})")
    return lines


def _hints(
    summary: Mapping[str, Any], settings: Mapping[str, Any], python: str, exact: bool
) -> list[str]:
    """Commands that go on from here, each with what it gives."""
    hints, events = [], summary["cache"]["boundaries"]
    train = f"{python} -m cachefreeze.train"
    if events:
        same = "the same weights" if exact else "nearly the same weights"
        if any(event["lossy"] for event in events):
            same = "the weights without what the cache rounded"
        slower = ", in more time" if amount({"summary": summary}, SAVED) > 0 else ""
        hints = [
            f"  {train} {shlex.join([*settings['command'], '--no-cache'])}",
            f"      {same}{slower}",
            f"  {python} scripts/cache_stats.py {shlex.quote(settings['cache_dir'])}",
            "      what is in the cache",
        ]
    if settings["dataset"] == "digits":
        hints += [f"  {train} --dataset cifar10", "      the paper's setting (wants a GPU)"]
    return hints


def duration(seconds: float) -> str:
    """A time in the largest two units: `48.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"
