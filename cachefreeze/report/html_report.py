"""report.html: a run as a page in one file, made of what is in its folder. Needs matplotlib."""

import json
import math
import shlex
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.files import write_atomically
from cachefreeze.freezeout.schedule import Schedule
from cachefreeze.report import figures
from cachefreeze.report.markup import (
    code,
    document,
    figure,
    folded,
    frozen_units,
    glossary,
    left_out,
    linked,
    number,
    table,
    terms,
    tiles,
)
from cachefreeze.report.run_results import RunResults
from cachefreeze.report.summary_text import opening_words
from cachefreeze.report.time_breakdown import COST, SAVED, WHOLE, Time, reached, spent, timed, ways

REPORT = "report.html"
# Points that a curve is drawn through.
CURVE = 48
# Whole runs that were measured, by what they are called.
Measured = dict[str, RunResults]
# The first of each in the page leads here.
WORDS = {
    "unit": "the smallest part of a network that freezes: its first layers, a block, the "
    "classifier; each takes only the output of the one before it",
    "measured": "a whole run that was really made",
    "estimated": "worked out from this run's own clocks: what frozen units took when they last "
    "ran, for every row that came from the cache instead",
    "predicted": "what the plan said beforehand",
    "freezing only": "the same with FreezeOut and without a cache: frozen units run in every step",
    "no freezing": "the same with all units trained to the end, without a cache",
    "limit": "the same with frozen units that cost nothing: what no cache can beat",
    "efficiency": "the share of the time that a cache can save: one is the limit, zero is freezing "
    "only",
    "materialise": "to fill a store: every row runs through newly frozen units once, and what "
    "comes out is written",
    "store": "the output of frozen units, or decoded pixels, for every row",
    "row": "an image, as pixels or as what units made of it",
    "suffix": "the units that still train",
    "prefix": "the units that are frozen; they come first",
    "frontier": "how many units are frozen",
    "boundary": "how many units the store stands for; zero if rows come from pixels",
}


def write_report(folder: Path, measured: dict[str, Path] | None = None) -> Path:
    """Make a run's folder into a page; returns its path.

    Args:
        folder: of a run that has come to its end.
        measured: folders of the same run with `freezing only` and with `no freezing`, if there are
            such; else those times are estimated, or the plan's predictions.

    Raises:
        UserError: there is no such run, its files are damaged, another run is not the same but for
            cache and freezing, or the page cannot be written.
    """
    record = RunResults.load(folder)
    others = {name: RunResults.load(path) for name, path in (measured or {}).items()}
    for name, other in others.items():
        _refuse_another(record, name, other)
    path = folder / REPORT
    try:
        write_atomically(path, report(record, others))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make room for it") from error
    return path


def _refuse_another(record: RunResults, name: str, other: RunResults) -> None:
    """Raises UserError if the other run is not what its name says."""
    same = ("network", "dataset", "epochs", "batch_size", "precision", "weights", "freeze_first")
    for setting in same:
        if record.args.get(setting) != other.args.get(setting):
            raise UserError(
                f"{other.folder} was run with {setting} {other.args.get(setting)}, and "
                f"{record.folder} with {record.args.get(setting)}: their times cannot be compared"
            )
    if other.args["freeze"] != (name == "freezing only") or other.args["cache"]:
        options = "--no-cache" if name == "freezing only" else "--no-freeze --no-cache"
        raise UserError(f"{other.folder} is no run with {name}: that is one with {options}")


def report(record: RunResults, measured: Measured) -> bytes:
    """The page, as bytes of UTF-8."""
    args = record.args
    title = f"{args['network']} on {args['dataset']}"
    figures_html = "\n".join(
        draw(record) for draw in (_rates, _seconds, _frontier, _learning, _store)
    )
    command = shlex.join(["python", "-m", "cachefreeze.train", *args["command"]])
    body = f"""<header><h1>{escape(title)}</h1>
<p>A training run of cachefreeze: {linked("unit", "units")} of the network freeze one after another,
and what the frozen ones compute is kept instead of computed again.</p></header>
<main>
{tiles(_result(record, measured))}
<h2>What was run</h2>
<pre>{code(command)}</pre>
{terms(_what_was_run(record))}
<h2>What took how long</h2>
{_times(record, measured)}
<h2>How it went</h2>
<div class="figures">
{figures_html}
{_predicted_beside_actual(record, measured)}
</div>
<h2>All numbers</h2>
{folded("every epoch", _epochs(record))}
{folded("every unit", _units(record))}
{folded("all settings", _settings(record))}
<h2>Words</h2>
{glossary(WORDS)}
</main>"""
    return document(title, body, figures.COLOURS)


def _result(record: RunResults, measured: Measured) -> list[tuple[str, str]]:
    shown = [
        (number(record, "summary.val_accuracy", "percent"), "of the validation images are right"),
        (number(record, "summary.best_val_accuracy", "percent"), "in the best epoch"),
        (number(record, WHOLE, "seconds"), "is the time of the run"),
    ]
    shown += [
        (_speed_up(record, way, run), f"as fast as {linked(way.name)} ({linked(way.known)})")
        for way, run in _ways(record, measured)[1:]
        if way.name != "limit"
    ]
    return [*shown, (frozen_units(record, "summary.frozen_units"), "units are frozen in the end")]


def _what_was_run(record: RunResults) -> list[tuple[str, str]]:
    args, summary = record.args, record.summary
    pairs = []
    if "about" in summary:
        first = summary["freeze_steps"].count(0)
        lines = opening_words(args, summary["units"], **summary["about"], first=first)
        # A word, and from the tenth column on what there is to say.
        pairs += [(line[:10].strip(), code(line[10:])) for line in lines]
    if "numerics" in summary:
        machine = ", ".join(f"{name} {value}" for name, value in summary["numerics"].items())
        pairs.append(("machine", code(machine)))
    if summary["resumed_at"]:
        steps = (
            number(record, f"summary.resumed_at.{place}", "count")
            for place in range(len(summary["resumed_at"]))
        )
        pairs.append(("resumed", f"after step {', '.join(steps)}"))
    pairs.append(("weights", code(f"SHA-256 {summary['weights_sha256']}")))
    return pairs


def _ways(record: RunResults, measured: Measured) -> list[tuple[Time, RunResults]]:
    """This run first, then others of whose times something is known, each with the run that took
    it: a measured time takes the place of an estimate."""
    found = []
    for way in ways(record.summary):
        if way.name in measured:
            way = replace(way, actual=WHOLE)
        if way.known:
            found.append((way, measured.get(way.name, record)))
    return found


def _speed_up(record: RunResults, way: Time, run: RunResults) -> str:
    """The time of another way by this run's. What was only predicted is set against what was
    predicted of this run: a machine that is slower than it was is so for both."""
    own = WHOLE
    if way.known == "predicted":
        own = ways(record.summary)[0].predicted or WHOLE
    return number(run, way.best, "times", by=(record, own))


def _times(record: RunResults, measured: Measured) -> str:
    """What it took, and beside it what it would have taken otherwise."""
    parts = spent(record.summary).items()
    rows = [[name, number(record, at, "seconds")] for name, at in parts]
    rows.append(["<b>the time of the run</b>", f"<b>{number(record, WHOLE, 'seconds')}</b>"])
    cut_off = ", nor is the time until it went on after it was cut off"
    return (
        "<p>The time of the run is what its user waited: from the command to the end of the last "
        "epoch, everything included. Starting Python and drawing this page are not in it"
        f"{cut_off if record.summary['resumed_at'] else ''}. The rest is loading, checkpoints and "
        "the like.</p>"
        f"{table(('', 'time'), rows, right=[1])}"
        f"{_beside(record, measured)}"
    )


def _beside(record: RunResults, measured: Measured) -> str:
    found = _ways(record, measured)
    if len(found) == 1 and found[0][0].predicted is None:
        return (
            "<p>Nothing is known to set beside it: "
            f"{code('scripts/write_report.py')} shows other runs, with "
            f"{code('--freezing-only RUN')} and {code('--no-freezing RUN')}.</p>"
        )
    header = ["", "time", "known", "speed-up over it"]
    rows = [
        [
            linked(way.name) if way.name in WORDS else way.name,
            number(run, way.best, "seconds"),
            way.known,
            _speed_up(record, way, run),
        ]
        for way, run in found
    ]
    if any(way.predicted for way, _ in found):
        header.append("predicted")
        for row, (way, _) in zip(rows, found, strict=True):
            row.append(number(record, way.predicted, "seconds") if way.predicted else "")
    return (
        f"<p>Beside it, what is {linked('measured')} is the time of a whole run. What is "
        f"{linked('estimated')} or {linked('predicted')} is this run's time, but for what freezing "
        "and the cache change. Speed-up is that time by this run's (of what is only predicted: by "
        "what was predicted of this run).</p>"
        f"{table(header, rows, right=(1, 3, 4))}"
        f"{'' if 'freezing only' in measured else _saving(record)}"
    )


def _saving(record: RunResults) -> str:
    """What the cache brought or cost, by this run's own clocks."""
    summary = record.summary
    if not (summary["cache"]["enabled"] and timed(summary)):
        return ""
    cost = number(record, COST, "seconds")
    if not summary["cache"]["boundaries"]:
        return f"<p>The cache held nothing; measuring that cost {cost}.</p>"
    if record.at(SAVED) < 0:
        return f"<p>The cache cost {cost} more than it saved (estimated).</p>"
    saved = f"The cache saved {number(record, SAVED, 'seconds')} (estimated)"
    if reached(summary) is not None:
        share = number(record, "summary.plan.actual.efficiency", "share")
        saved += f", an {linked('efficiency')} of {share}"
    served = number(record, "summary.cache.rows_served", "count")
    return f"<p>{saved}; {served} {linked('row', 'rows')} came from it.</p>"


def _rates(record: RunResults) -> str:
    title = "Rate of every unit"
    summary = record.summary
    names = summary["units"]
    curves = _curves(record)
    if max(map(len, curves)) < 2:
        return left_out(title, "this run had one epoch, and did not note the rates before it")
    freezes = [None if step is None else _epochs_at(record, step) for step in _freeze_steps(record)]
    frozen = [
        f"{name} at {time:.4g}"
        for name, time in zip(names, freezes, strict=True)
        if time is not None
    ]
    how = (
        f"they freeze one after another, in epochs: {', '.join(frozen)}"
        if frozen
        else "none freezes"
    )
    return figure(
        title,
        figures.rates(curves, names, freezes, _end(record)),
        f"Learning rates of {len(names)} units over {_count(summary['epochs'], 'epoch')}; {how}.",
        "A row a unit, the first of the network on top, each as high as its highest rate (on the "
        "right). Where a rate comes to nothing, the unit is frozen for good.",
    )


def _curves(record: RunResults) -> list[list[tuple[float, float]]]:
    """Epochs and rates of every unit, up to its freeze."""
    args, summary = record.args, record.summary
    units, steps = range(len(summary["units"])), summary["steps"]
    if "freeze_steps" not in summary:  # an older run: what it noted at the end of each epoch
        return [
            [(_epochs_at(record, line["step"]), line["lr"][unit]) for line in record.metrics]
            for unit in units
        ]
    t0, first = args["t0"] if args["freeze"] else 1.0, summary["freeze_steps"].count(0)
    schedule = Schedule(len(units), steps, t0, args["schedule"], args["scale_lr"], first)
    return [
        [
            (_epochs_at(record, step), args["lr"] * schedule.factor(unit, step))
            for step in sorted({round(end * part / CURVE) for part in range(CURVE + 1)})
        ]
        for unit, end in zip(units, summary["freeze_steps"], strict=True)
    ]


def _seconds(record: RunResults) -> str:
    lines = record.metrics
    rest = {
        "materialising": [line["materialize_seconds"] for line in lines],
        "validation": [line["validate_seconds"] for line in lines],
    }
    if timed(record.summary) and all("prefix_seconds" in line for line in lines):
        prefix = [line["prefix_seconds"] for line in lines]
        reading = [line["read_seconds"] for line in lines]
        own = [
            max(line["train_seconds"] - line["prefix_seconds"] - line["read_seconds"], 0.0)
            for line in lines
        ]
        parts = {"suffix": own, "prefix": prefix, "reading": reading, **rest}
        caption = (
            f"{linked('suffix', 'Suffix')}: forward and backward through what still trains. "
            f"{linked('prefix', 'Prefix')}: decoding images and running frozen units. Reading: "
            f"rows from the cache. "
        )
    else:
        parts = {"training": [line["train_seconds"] for line in lines], **rest}
        caption = "The parts of a training step were not timed in this run. "
    caption += f"{linked('materialise', 'Materialising')}: filling a {linked('store')}."
    first, last = (number(record, f"metrics.{which}.seconds", "seconds") for which in (0, -1))
    took = (
        f"The first epoch took {first}, the last {last}"
        if len(lines) > 1
        else f"The epoch took {last}"
    )
    return figure(
        "Seconds of every epoch",
        figures.seconds(parts),
        f"Seconds of {_count(len(lines), 'epoch')}, stacked by what they were spent on: "
        f"{', '.join(name for name in parts if any(parts[name]))}.",
        f"{caption} {took}.",
    )


def _frontier(record: RunResults) -> str:
    title, summary = "Frozen units, and where rows come from", record.summary
    if not summary["frozen_units"]:
        return left_out(title, "no unit was frozen in this run")
    steps = sorted(step for step in _freeze_steps(record) if step is not None)
    frozen = [(_epochs_at(record, step), float(count)) for count, step in enumerate(steps, 1)]
    end = _epochs_at(record, summary["steps"])
    units = len(summary["units"])
    moved = _over_time(record, "boundary", "boundary")
    highest = max(boundary for _, boundary in moved)
    return figure(
        title,
        figures.frontier(frozen, moved, units, end),
        f"Of {units} units, {summary['frozen_units']} are frozen in the end; rows come from the "
        f"cache after up to {highest:.0f} of them.",
        f"The {linked('frontier')} is the upper edge of what is frozen, the {linked('boundary')} "
        "that of what the cache stands for. Between them frozen units run in every step.",
    )


def _learning(record: RunResults) -> str:
    lines = record.metrics
    train, val, accuracy = (
        [line[name] for line in lines] for name in ("train_loss", "val_loss", "val_accuracy")
    )
    last = number(record, "metrics.-1.train_loss", "loss")
    return figure(
        "Accuracy and loss",
        figures.learning(train, val, accuracy),
        f"Validation accuracy over {_count(len(lines), 'epoch')}, from {accuracy[0]:.2%} to "
        f"{accuracy[-1]:.2%}; below, the training and validation loss.",
        f"At the end of every epoch. The last training loss is {last}.",
    )


def _store(record: RunResults) -> str:
    title, summary = "Size of the store", record.summary
    if not summary["cache"]["boundaries"]:
        why = (
            "nothing was kept in this run" if summary["cache"]["enabled"] else "there was no cache"
        )
        return left_out(title, why)
    sizes = _over_time(record, "bytes", "store_bytes")
    budget = summary["cache"].get("max_bytes")
    largest = max(
        range(len(summary["cache"]["boundaries"])),
        key=lambda place: summary["cache"]["boundaries"][place]["bytes"],
    )
    most = number(record, f"summary.cache.boundaries.{largest}.bytes", "bytes")
    caption = f"On disk, of the store that rows come from. The largest took {most}"
    if budget is not None and math.isfinite(budget):
        allowed = number(record, "summary.cache.max_bytes", "bytes")
        caption += f"; the cache was allowed {allowed}"
    return figure(
        title,
        figures.store(sizes, math.inf if budget is None else budget, _end(record)),
        f"Bytes of the store over the run, in {_count(len(summary['cache']['boundaries']), 'step')}"
        f" from a store to the next.",
        f"{caption}.",
    )


def _predicted_beside_actual(record: RunResults, measured: Measured) -> str:
    title, found = "Predicted beside actual", _ways(record, measured)
    totals = [
        (
            way.name,
            None if way.predicted is None else record.at(way.predicted),
            None if way.actual is None else run.at(way.actual),
            way.known == "estimated",
        )
        for way, run in found
    ]
    fillings = [
        (_place(each), each["predicted_seconds"], each["seconds"], False)
        for each in record.summary["cache"]["boundaries"]
        if not each.get("reused")
    ]
    planned = found[0][0].predicted
    if planned is None and not fillings:
        return left_out(title, "nothing was predicted in this run")
    captions = []
    if planned is not None:
        captions = [
            f"Of the run: {number(record, planned, 'seconds')} predicted, "
            f"{number(record, WHOLE, 'seconds')} taken. What was only predicted has one bar."
        ]
    if fillings:
        captions.append("Fillings are predicted by the plan made just before each.")
    return figure(
        title,
        figures.predicted(totals if planned is not None else [], fillings),
        f"Bars of predicted and actual seconds: {'of the run, and ' if planned else ''}of "
        f"{_count(len(fillings), 'filling')}.",
        " ".join(captions),
    )


def _place(filling: dict[str, Any]) -> str:
    return f"after {filling['unit']}" if filling["boundary"] else "pixels"


def _freeze_steps(record: RunResults) -> list[int | None]:
    """The step before which each unit is frozen; None if it trains to the end."""
    summary = record.summary
    if "freeze_steps" in summary:
        return [step if step < summary["steps"] else None for step in summary["freeze_steps"]]
    # Older runs note at the end of every epoch how many are.
    return [
        next((line["step"] for line in record.metrics if line["frozen_units"] > unit), None)
        for unit in range(len(summary["units"]))
    ]


def _over_time(record: RunResults, of_filling: str, of_epoch: str) -> list[tuple[float, float]]:
    """A value that moves when a store is filled, and is noted at the end of every epoch too."""
    fillings = record.summary["cache"]["boundaries"]
    moved = [(_epochs_at(record, each["step"]), float(each[of_filling])) for each in fillings]
    lines = [line for line in record.metrics if of_epoch in line]
    return moved + [(_epochs_at(record, line["step"]), float(line[of_epoch])) for line in lines]


def _epochs_at(record: RunResults, step: float) -> float:
    return step * record.summary["epochs"] / record.summary["steps"]


def _end(record: RunResults) -> float:
    return float(record.summary["epochs"])


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _epochs(record: RunResults) -> str:
    columns = [
        ("epoch", "epoch", "count"),
        ("step", "step", "count"),
        ("training loss", "train_loss", "loss"),
        ("validation loss", "val_loss", "loss"),
        ("accuracy", "val_accuracy", "percent"),
        ("frozen", "frozen_units", "count"),
        ("boundary", "boundary", "count"),
        ("seconds", "seconds", "seconds"),
        ("images/s", "images_per_second", "count"),
    ]
    rows = [
        [
            frozen_units(record, place) if key == "frozen_units" else number(record, place, how)
            for _, key, how in columns
            for place in [f"metrics.{epoch}.{key}"]
        ]
        for epoch in range(len(record.metrics))
    ]
    return table([title for title, _, _ in columns], rows, right=range(len(columns)))


def _units(record: RunResults) -> str:
    summary = record.summary
    rows = []
    for unit, (name, step) in enumerate(zip(summary["units"], _freeze_steps(record), strict=True)):
        known = "freeze_steps" in summary
        when = "never"
        if step is not None:
            when = number(record, f"summary.freeze_steps.{unit}", "count") if known else ""
        rate = number(record, f"summary.initial_rates.{unit}", "rate") if known else ""
        rows.append([code(name), rate, when])
    return table(("unit", "initial rate", "frozen from step"), rows, right=[1, 2])


def _settings(record: RunResults) -> str:
    rows = [
        [code(name), code(json.dumps(value))]
        for name, value in record.args.items()
        if name != "command"  # which stands above
    ]
    return table(("setting", "value"), rows)
